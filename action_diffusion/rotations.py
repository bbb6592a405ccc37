"""Rotations as six numbers that a network can learn, and as the three or four that simulators and arms speak.

6D (Zhou et al. 2019, "On the Continuity of Rotation Representations in Neural Networks", section 4.2): two axes of the
rotation matrix, from which Gram-Schmidt gives the third. No two close rotations are far apart in it, unlike in three or
four numbers. Here they are the first two ROWS of the matrix, as in pytorch3d and the Diffusion Policy code (the paper
writes columns; the inverse rotation's 6D has those):

    R = | r0 r1 r2 |
        | r3 r4 r5 |  ─▶  [r0 r1 r2 r3 r4 r5]
        |  .  .  . |      (row 0 × row 1)

All functions take any leading dimensions, compute in float64 and give the floating type that they were given (float64
for whole numbers). Axis-angle [..., 3]: axis times angle in rad. Quaternions [..., 4] are x, y, z, w, as in robosuite
and scipy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial.transform import Rotation

from action_diffusion.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def matrix_to_6d(matrix: np.ndarray) -> np.ndarray:
    """Rotation matrices [..., 3, 3] -> their first two rows [..., 6]."""
    matrix = _floating(matrix, (3, 3))
    return matrix[..., :2, :].reshape(*matrix.shape[:-2], 6)


def six_d_to_matrix(six_d: np.ndarray) -> np.ndarray:
    """[..., 6] -> rotation matrices [..., 3, 3].

    The two rows need not be orthogonal nor of unit length: row 0 keeps its direction, row 1 gives up what it has of
    it. Raises `InputError` where they are parallel, zero or not finite, and so mean no rotation.
    """
    six_d = _floating(six_d, (6,))
    first, second = six_d[..., :3].astype(np.float64), six_d[..., 3:].astype(np.float64)
    x = first / _lengths(first)
    direction = second / _lengths(second)
    y = direction - (x * direction).sum(-1, keepdims=True) * x
    y = y / _lengths(y, shortest=1e-6)
    return np.stack([x, y, np.cross(x, y)], axis=-2).astype(six_d.dtype)


def six_d_to_axis_angle(six_d: np.ndarray) -> np.ndarray:
    """[..., 6] -> axis times angle [..., 3], angles from 0 to pi rad. Raises `InputError` as `six_d_to_matrix`."""
    result: np.ndarray = _rotation(six_d).as_rotvec().reshape(*np.shape(six_d)[:-1], 3).astype(_dtype(six_d))
    return result


def axis_angle_to_6d(axis_angle: np.ndarray) -> np.ndarray:
    """Axis times angle [..., 3] (rad, of any length) -> [..., 6]."""
    axis_angle = _floating(axis_angle, (3,))
    return _to_6d(Rotation.from_rotvec(axis_angle.reshape(-1, 3)), axis_angle)


def six_d_to_quaternion(six_d: np.ndarray) -> np.ndarray:
    """[..., 6] -> unit quaternions x, y, z, w [..., 4] with w >= 0. Raises `InputError` as `six_d_to_matrix`."""
    result: np.ndarray = (
        _rotation(six_d).as_quat(canonical=True).reshape(*np.shape(six_d)[:-1], 4).astype(_dtype(six_d))
    )
    return result


def quaternion_to_6d(quaternion: np.ndarray) -> np.ndarray:
    """Quaternions x, y, z, w [..., 4] of any length but zero -> [..., 6]; q and -q are the same rotation."""
    quaternion = _floating(quaternion, (4,))
    _lengths(quaternion)
    return _to_6d(Rotation.from_quat(quaternion.reshape(-1, 4)), quaternion)


def torch_six_d_to_matrix(six_d: Tensor) -> Tensor:
    """`six_d_to_matrix` of a tensor [..., 6], differentiable, on its device and in its type.

    Nothing is raised, so as not to wait for the device: rows of zeros give rows of zeros.
    """
    import torch
    from torch.nn.functional import normalize

    x = normalize(six_d[..., :3], dim=-1)
    direction = normalize(six_d[..., 3:], dim=-1)
    y = normalize(direction - (x * direction).sum(-1, keepdim=True) * x, dim=-1)
    return torch.stack([x, y, torch.linalg.cross(x, y)], dim=-2)


def _rotation(six_d: np.ndarray) -> Rotation:
    return Rotation.from_matrix(six_d_to_matrix(np.asarray(six_d, np.float64)).reshape(-1, 3, 3))


def _to_6d(rotation: Rotation, given: np.ndarray) -> np.ndarray:
    """The 6D of one rotation for each row of `given`, in its leading dimensions and type."""
    return matrix_to_6d(rotation.as_matrix()).reshape(*given.shape[:-1], 6).astype(given.dtype)


def _dtype(values: np.ndarray) -> np.dtype:
    dtype = np.asarray(values).dtype
    return dtype if dtype.kind == "f" else np.dtype(np.float64)


def _floating(values: np.ndarray, last: tuple[int, ...]) -> np.ndarray:
    values = np.asarray(values, dtype=_dtype(values))
    if values.shape[values.ndim - len(last) :] != last:
        raise InputError(f"rotations of shape {list(values.shape)}: expected [..., {', '.join(map(str, last))}]")
    return values


def _lengths(vectors: np.ndarray, shortest: float = 1e-12) -> np.ndarray:
    """Lengths [..., 1] of vectors [..., n], all of them above `shortest`."""
    lengths: np.ndarray = np.linalg.norm(vectors, axis=-1, keepdims=True)
    bad = ~((lengths > shortest) & np.isfinite(lengths))
    if bad.any():
        row = tuple(int(i) for i in np.argwhere(bad)[0][:-1])
        raise InputError(
            f"rotation {list(row)} of {list(vectors.shape[:-1])}: its axes are zero, parallel or not finite"
        )
    return lengths
