"""Points from depth, by geometry that is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from action_diffusion.datasets.images.points import farthest, from_depth, orbited, pinhole, within
from action_diffusion.errors import InputError


def looking(position: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The pose of a camera at `position` that looks `at` a point, the world's z up in its picture."""
    forward = (at - position) / np.linalg.norm(at - position)
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = np.stack([right, np.cross(forward, right), forward], axis=1), position
    return pose


def test_a_floor_is_where_it_is_from_wherever_it_is_seen() -> None:
    size, at = (24, 32), np.array([0.1, -0.2, 0.0])
    intrinsics = pinhole(size, 40)
    assert intrinsics[1, 1] == pytest.approx(12 / np.tan(np.radians(20)))
    pose = looking(np.array([0.7, 0.3, 1.1]), at)
    for degrees in (0.0, 10.0, -75.0):
        camera = orbited(pose, degrees, (0.1, -0.2))
        v, u = np.indices(size)
        rays = np.stack([u - 15.5, v - 11.5, np.full(size, intrinsics[0, 0])], axis=-1) / intrinsics[0, 0]
        depth = -camera[2, 3] / (rays @ camera[:3, :3].T)[..., 2]  # how far each ray goes until z = 0
        points = from_depth(depth, intrinsics, camera)
        np.testing.assert_allclose(points[..., 2], 0, atol=1e-12)
        np.testing.assert_allclose(points[11:13, 15:17].mean(axis=(0, 1)), at, atol=0.01)  # still in the middle
        seen = np.linalg.inv(camera) @ np.append(points[3, 5], 1)  # and back into the picture
        np.testing.assert_allclose((intrinsics @ seen[:3] / seen[2])[:2], [5, 3], atol=1e-9)


def test_unknown_depth_is_no_point() -> None:
    points = from_depth(np.array([[0.0, 1.0], [np.nan, 2.0]]), pinhole((2, 2), 90), np.eye(4))
    assert np.isfinite(points).all(axis=-1).tolist() == [[False, True], [False, True]]
    assert within(points.reshape(-1, 3), np.full(3, -9), np.full(3, 9)).shape == (2, 3)


@pytest.mark.parametrize(
    ("intrinsics", "pose", "message"),
    [
        (np.eye(2), np.eye(4), "expected .H, W., .3, 3. and .4, 4."),
        (np.diag([0.0, 1, 1]), np.eye(4), "focal length above 0"),
        (np.eye(3), np.diag([1.0, 1, -1, 1]), "no rotation and translation"),
    ],
)
def test_what_is_no_camera(intrinsics: np.ndarray, pose: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_depth(np.ones((2, 2)), intrinsics, pose)


def test_the_farthest_points_are_spread_and_the_same_in_any_frame() -> None:
    random = np.random.default_rng(0)
    cloud = np.concatenate([random.normal(0, 0.01, (500, 3)), [[1, 0, 0], [0, 1, 0], [-1, -1, 0]]]).astype(np.float32)
    chosen = farthest(cloud, 4)
    np.testing.assert_array_equal(chosen[:3], cloud[[502, 500, 501]])
    turned = (cloud @ Rotation.from_rotvec([0.3, -0.8, 0.5]).as_matrix().T + 0.2).astype(np.float32)
    order = random.permutation(len(cloud))
    places = [np.flatnonzero((turned[order] == point).all(axis=1))[0] for point in farthest(turned[order], 40)]
    np.testing.assert_array_equal(cloud[order[places]], farthest(cloud, 40))


def test_few_points_are_repeated() -> None:
    few = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(farthest(few, 5), few[[0, 1, 0, 1, 0]])
    assert farthest(few[:0], 5).shape == (5, 3)
