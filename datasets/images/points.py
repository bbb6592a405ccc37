"""Points in space from what depth cameras see, in one frame whatever camera saw them.

    depth [H, W] ─▶ `from_depth`: along each pixel's ray, then by the camera's pose ─▶ `within` a box ─▶ `farthest` [n]

A camera looks along its z, with x to the right and y down, as OpenCV has it; the centres of pixels count from 0:

    u = fx · x / z + cx        v = fy · y / z + cy
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.transform import Rotation

from action_diffusion.errors import InputError


def pinhole(size: tuple[int, int], field_of_view: float) -> np.ndarray:
    """Intrinsics [3, 3] of a camera of `size` (height, width) px. field_of_view: degrees from top to bottom."""
    height, width = size
    if not 0 < field_of_view < 180:
        raise InputError(f"a field of view of {field_of_view} degrees: expected more than 0 and less than 180")
    focal = height / 2 / np.tan(np.radians(field_of_view) / 2)
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])


def from_depth(depth: np.ndarray, intrinsics: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Where pixels see something: float64 [H, W, 3] in m, in the frame that the camera's pose is in.

    depth: [H, W] in m along the camera's z, 0 where it is unknown, which gives NaN. intrinsics: [3, 3]. pose: [4, 4] of
    the camera in that frame. Raises `InputError` for other shapes, intrinsics without a focal length, and a pose that
    is no rotation and translation.
    """
    depth, intrinsics, pose = (np.asarray(value, np.float64) for value in (depth, intrinsics, pose))
    if depth.ndim != 2 or intrinsics.shape != (3, 3) or pose.shape != (4, 4):
        shapes = ", ".join(str(list(value.shape)) for value in (depth, intrinsics, pose))
        raise InputError(f"points from depth, intrinsics and pose of {shapes}: expected [H, W], [3, 3] and [4, 4]")
    if not (np.isfinite(intrinsics).all() and intrinsics[0, 0] > 0 and intrinsics[1, 1] > 0):
        raise InputError(f"intrinsics {intrinsics.tolist()}: expected a focal length above 0")
    rotation = pose[:3, :3]
    rigid = np.isfinite(pose).all() and np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-4)
    if not (rigid and np.linalg.det(rotation) > 0 and np.array_equal(pose[3], [0, 0, 0, 1])):
        raise InputError(f"the camera's pose {pose.tolist()} is no rotation and translation")
    v, u = np.indices(depth.shape)
    x = (u - intrinsics[0, 2] - intrinsics[0, 1] * (v - intrinsics[1, 2]) / intrinsics[1, 1]) / intrinsics[0, 0]
    y = (v - intrinsics[1, 2]) / intrinsics[1, 1]
    z = np.where(np.isfinite(depth) & (depth > 0), depth, np.nan)
    return np.stack([x * z, y * z, z], axis=-1) @ rotation.T + pose[:3, 3]


def within(points: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The points [N, 3 or more] whose position is in the box from `low` [3] to `high` [3]; none that are NaN."""
    position = points[:, :3]
    return points[((position >= low) & (position <= high)).all(axis=1)]


def farthest(points: np.ndarray, n: int) -> np.ndarray:
    """`n` of the points [N, 3 or more], each the farthest from those before it: the same for the same points.

    The first is the farthest from the mean; of equals it is the one that comes first. Fewer than `n` are repeated from
    the first on, which changes no maximum over points; of none, all are zeros.
    """
    if len(points) == 0:
        return np.zeros((n, points.shape[1]), points.dtype)
    if len(points) <= n:
        return points[np.arange(n) % len(points)]
    position = np.ascontiguousarray(points[:, :3], np.float32)
    chosen = np.empty(n, np.int64)
    distance = ((position - position.mean(axis=0)) ** 2).sum(axis=1)
    chosen[0] = distance.argmax()
    distance[:] = np.inf
    for place in range(1, n):
        np.minimum(distance, ((position - position[chosen[place - 1]]) ** 2).sum(axis=1), out=distance)
        chosen[place] = distance.argmax()
    return points[chosen]


def orbited(pose: np.ndarray, degrees: float, centre: ArrayLike = (0.0, 0.0)) -> np.ndarray:
    """The pose [4, 4] after a turn about the vertical through `centre` (x, y): what was in the middle of the picture on
    that line still is."""
    turn, shift = np.eye(4), np.append(centre, 0.0)
    turn[:3, :3] = Rotation.from_euler("z", degrees, degrees=True).as_matrix()
    turn[:3, 3] = shift - turn[:3, :3] @ shift
    result: np.ndarray = turn @ pose
    return result
