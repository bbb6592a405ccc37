"""Rotations against scipy: random ones, and those where formulas break (none, 180 degrees and nearly, tiny ones)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from action_diffusion.errors import InputError
from action_diffusion.rotations import (
    axis_angle_to_6d,
    matrix_to_6d,
    quaternion_to_6d,
    six_d_to_axis_angle,
    six_d_to_matrix,
    six_d_to_quaternion,
    torch_six_d_to_matrix,
)

EDGES = [0.0, 1e-300, 1e-12, 1e-8, 1e-4, np.pi / 2, np.pi - 1e-4, np.pi - 1e-8, np.pi - 1e-12, np.pi]
AXES = [[1, 0, 0], [0, -1, 0], [0, 0, 1], [1, 1, 0], [1, -1, 1], [1e-9, 1, 0], [0.3, -0.2, 0.9]]
CASES = [(angle, axis) for angle in EDGES for axis in AXES]

angles = st.one_of(st.sampled_from(EDGES), st.floats(0, np.pi))
axes = st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda axis: np.linalg.norm(axis) > 1e-3)


def rotation_of(angle: float, axis: object) -> Rotation:
    direction = np.asarray(axis, np.float64)
    return Rotation.from_rotvec(angle * direction / np.linalg.norm(direction))


def assert_same_rotation(found: Rotation, expected: Rotation, tolerance: float = 1e-9) -> None:
    """The angle between both; axis-angles themselves jump at 180 degrees."""
    assert (found.inv() * expected).magnitude() < tolerance


def check_every_way(expected: Rotation) -> None:
    six_d = matrix_to_6d(expected.as_matrix())
    np.testing.assert_array_equal(six_d, expected.as_matrix()[:2].ravel())
    np.testing.assert_allclose(six_d_to_matrix(six_d), expected.as_matrix(), atol=1e-14)
    np.testing.assert_allclose(axis_angle_to_6d(expected.as_rotvec()), six_d, atol=1e-14)
    np.testing.assert_allclose(quaternion_to_6d(expected.as_quat()), six_d, atol=1e-14)
    np.testing.assert_allclose(quaternion_to_6d(-expected.as_quat() * 3), six_d, atol=1e-14)
    axis_angle, quaternion = six_d_to_axis_angle(six_d), six_d_to_quaternion(six_d)
    assert np.linalg.norm(axis_angle) <= np.pi + 1e-12
    assert_same_rotation(Rotation.from_rotvec(axis_angle), expected)
    assert quaternion[3] >= 0
    np.testing.assert_allclose(np.linalg.norm(quaternion), 1, atol=1e-14)
    assert_same_rotation(Rotation.from_quat(quaternion), expected)
    np.testing.assert_allclose(torch_six_d_to_matrix(torch.tensor(six_d)), expected.as_matrix(), atol=1e-14)


@pytest.mark.parametrize(("angle", "axis"), CASES)
def test_edge_cases_agree_with_scipy(angle: float, axis: list[float]) -> None:
    check_every_way(rotation_of(angle, axis))


@pytest.mark.slow
@given(angle=angles, axis=axes)
@settings(max_examples=200, deadline=None)
def test_random_rotations_agree_with_scipy(angle: float, axis: tuple[float, float, float]) -> None:
    check_every_way(rotation_of(angle, axis))


@given(turns=st.integers(-3, 3), axis=axes)
@settings(max_examples=30, deadline=None)
def test_more_than_half_a_turn_is_the_same_rotation(turns: int, axis: tuple[float, float, float]) -> None:
    direction = np.asarray(axis) / np.linalg.norm(axis)
    full = axis_angle_to_6d((0.4 + 2 * np.pi * turns) * direction)
    np.testing.assert_allclose(full, axis_angle_to_6d(0.4 * direction), atol=1e-13)


@given(axis=axes, angle=st.floats(1e-6, np.pi - 1e-6))
@settings(max_examples=50, deadline=None)
def test_axis_angles_below_half_a_turn_come_back(axis: tuple[float, float, float], angle: float) -> None:
    axis_angle = rotation_of(angle, axis).as_rotvec()
    np.testing.assert_allclose(six_d_to_axis_angle(axis_angle_to_6d(axis_angle)), axis_angle, atol=1e-8)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_leading_dimensions_and_types_are_kept(lead: tuple[int, ...], dtype: type) -> None:
    quaternions: np.ndarray = np.random.default_rng(0).standard_normal((*lead, 4)).astype(dtype)
    six_d = quaternion_to_6d(quaternions)
    outputs = [
        (six_d, 6),
        (six_d_to_quaternion(six_d), 4),
        (six_d_to_axis_angle(six_d), 3),
        (axis_angle_to_6d(six_d_to_axis_angle(six_d)), 6),
        (matrix_to_6d(six_d_to_matrix(six_d)), 6),
    ]
    for values, size in outputs:
        assert values.shape == (*lead, size)
        assert values.dtype == dtype
    np.testing.assert_allclose(outputs[3][0], six_d, atol=1e-6)
    np.testing.assert_allclose(outputs[4][0], six_d, atol=1e-6)


@given(
    rows=st.lists(st.floats(-5, 5), min_size=6, max_size=6).map(np.array),
    scales=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
)
@settings(max_examples=100, deadline=None)
def test_what_a_network_puts_out_becomes_a_rotation(rows: np.ndarray, scales: tuple[float, float]) -> None:
    if np.linalg.norm(np.cross(rows[:3], rows[3:])) < 1e-2:
        return
    matrix = six_d_to_matrix(rows)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(matrix) > 0
    assert matrix[0] @ rows[:3] == pytest.approx(np.linalg.norm(rows[:3]))
    assert matrix[1] @ rows[3:] > 0
    scaled = np.concatenate([rows[:3] * scales[0], rows[3:] * scales[1]])
    np.testing.assert_allclose(six_d_to_matrix(scaled), matrix, atol=1e-9)
    np.testing.assert_allclose(torch_six_d_to_matrix(torch.tensor(rows)), matrix, atol=1e-12)


def test_gradients_pass_through_the_torch_twin() -> None:
    six_d = torch.randn(4, 6, dtype=torch.float64, generator=torch.manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(torch_six_d_to_matrix, six_d)
    torch_six_d_to_matrix(torch.zeros(1, 6, requires_grad=True)).sum().backward()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: six_d_to_matrix(np.zeros(6)), r"rotation \[\] of \[\]: its axes are zero, parallel or not finite"),
        (
            lambda: six_d_to_matrix(np.array([[1, 0, 0, 0, 1, 0], [1, 0, 0, -2, 0, 0]])),
            r"rotation \[1\] of \[2\]: its axes",
        ),
        (lambda: six_d_to_axis_angle(np.full((2, 6), np.nan)), r"rotation \[0\] of"),
        (lambda: quaternion_to_6d(np.zeros((1, 4))), r"rotation \[0\] of"),
        (lambda: six_d_to_matrix(np.zeros((2, 5))), r"rotations of shape \[2, 5\]: expected \[..., 6\]"),
        (lambda: matrix_to_6d(np.zeros((2, 9))), r"rotations of shape \[2, 9\]: expected \[..., 3, 3\]"),
    ],
)
def test_what_is_no_rotation_is_refused(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
