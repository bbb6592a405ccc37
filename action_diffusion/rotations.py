"""Rotations as six numbers that a network can learn, and as the three or four that simulators and arms speak.

6D (Zhou et al. 2019, "On the Continuity of Rotation Representations in Neural Networks", section 4.2): two axes of the
rotation matrix, from which Gram-Schmidt gives the third. No two close rotations are far apart in it, unlike in three or
four numbers. Here they are the first two ROWS of the matrix, as in pytorch3d and the Diffusion Policy code (the paper
writes columns; the inverse rotation's 6D has those):

    R = | r0 r1 r2 |
        | r3 r4 r5 |  ─▶  [r0 r1 r2 r3 r4 r5]
        |  .  .  . |      (row 0 × row 1)

In three or four numbers a rotation has several names: q and −q, a vector and the one that is 2π longer on its axis, an
angle and a turn more. `nearest` chooses among them, so that `continuous` windows have no jumps where nothing jumps.

The functions of 6D take any leading dimensions, compute in float64 and give the floating type that they were given
(float64 for whole numbers). Axis-angle [..., 3]: axis times angle in rad. Quaternions [..., 4] are x, y, z, w there, as
in robosuite and scipy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from scipy.spatial.transform import Rotation

from action_diffusion.errors import InputError, unknown
from action_diffusion.schema import Between, OneOf, Sized

if TYPE_CHECKING:
    from torch import Tensor

SIZES = {
    "quaternion": 4,
    "quaternion_xyzw": 4,
    "quaternion_wxyz": 4,
    "rotation_vector": 3,
    "euler": 3,
    "euler_degrees": 3,
    "angle": 1,
    "angle_degrees": 1,
}
"""Representation that has several numbers for one rotation → how many values it takes. Signs of a quaternion do not
depend on its order; Euler angles and single ones are right but for whole turns."""
WIDTHS = SIZES | {"rotation_6d": 6}
"""The same of all representations, also of the one whose numbers are always continuous."""
_TINY = 1e-6
_SHORTEST = 1e-3
"""Of a quaternion that still says something of a rotation."""


@dataclass(frozen=True)
class RotationColumns:
    """The columns of a vector, from `first` on, that are a rotation.

    reference: the rotation whose neighbourhood the first step of a window is written in; none for the identity.
    """

    first: Annotated[int, Between(0, 100_000)]
    representation: Annotated[str, OneOf(*WIDTHS)]
    reference: Annotated[tuple[Annotated[float, Between(-1e4, 1e4)], ...], Sized(0, 4)] = ()

    def __post_init__(self) -> None:
        if self.representation in WIDTHS and len(self.reference) not in (0, WIDTHS[self.representation]):
            raise InputError(f"rotation {self.representation}: its reference has {len(self.reference)} values")

    @property
    def columns(self) -> slice:
        return slice(self.first, self.first + WIDTHS[self.representation])

    @property
    def origin(self) -> tuple[float, ...]:
        """The reference, or the identity: (0, 0, 0, 1), or (1, 0, 0, 0) where w comes first."""
        zeros = (0.0,) * WIDTHS[self.representation]
        if self.representation == "rotation_6d":
            return self.reference or (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
        if self.reference or len(zeros) < 4:
            return self.reference or zeros
        return (1.0, *zeros[1:]) if self.representation == "quaternion_wxyz" else (*zeros[1:], 1.0)

    @property
    def no_rotation(self) -> str:
        """What `missing` looks for, in words."""
        six = self.representation == "rotation_6d"
        return "6D rotations whose axes are zero or parallel" if six else "quaternions of zeros"

    def fitted(self, values: np.ndarray) -> RotationColumns:
        """With the mean rotation of rows [N, D] for its reference, so that few of them lie half a turn from it."""
        if self.representation not in SIZES:
            return self
        rows = np.asarray(values, np.float64)[:, self.columns]
        rows = rows[np.isfinite(rows).all(axis=1)]
        return replace(self, reference=_mean(rows, self.representation)) if len(rows) else self

    def missing(self, values: np.ndarray) -> np.ndarray:
        """Which rows of `values` [N, D] hold no rotation, [N] bool: quaternions of zeros, and 6D whose axes are zero or
        parallel."""
        part = np.asarray(values, np.float64)[:, self.columns]
        if self.representation == "rotation_6d":
            first, second = part[:, :3], part[:, 3:]
            lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
            area = np.linalg.norm(np.cross(first, second), axis=1)
            return np.asarray(area <= _SHORTEST * np.maximum(lengths, _SHORTEST))
        length = np.linalg.norm(part, axis=1)
        return np.asarray((length < _SHORTEST) & (WIDTHS[self.representation] == 4))


def parse_rotations(texts: Sequence[str], n: int, where: str) -> tuple[RotationColumns, ...]:
    """["quaternion_xyzw@3"] → columns 3 to 6 of n; without @ from column 0 on. Raises `InputError` naming `where`."""
    found = []
    for text in texts:
        name, _, first = text.partition("@")
        if name not in WIDTHS:
            raise unknown("rotation", name, WIDTHS, where)
        if not (first or "0").isdecimal() or int(first or 0) + WIDTHS[name] > n:
            raise InputError(f"{where}={text}: expected {name}@COLUMN, whose {WIDTHS[name]} columns are among {n}")
        found.append(RotationColumns(int(first or 0), name))
    found.sort(key=lambda rotation: rotation.first)
    for one, other in pairwise(found):
        if one.columns.stop > other.first:
            raise InputError(f"{where}: {one.representation} and {other.representation} share column {other.first}")
    return tuple(found)


def check_rotations(rotations: Sequence[RotationColumns], n: int) -> None:
    """Raises `InputError` unless they lie in a vector of `n` values, one behind the other."""
    parse_rotations([f"{rotation.representation}@{rotation.first}" for rotation in rotations], n, "rotations")


def nearest(values: Any, before: Any, representation: str) -> Any:
    """Of all numbers for the rotations `values` [..., n], those nearest to `before` [..., n]: arrays or tensors."""
    if representation not in SIZES:
        return values
    if SIZES[representation] == 4:
        return values * (1 - 2 * ((values * before).sum(-1, keepdims=True) < 0))
    if representation != "rotation_vector":
        turn = 360.0 if representation.endswith("degrees") else 2 * np.pi
        return values - turn * ((values - before) / turn).round()
    angle, far = _length(values), _length(before)
    none = angle < _TINY  # any axis will do
    axis = values / (angle + none) + none * before / (far + _TINY)
    return values + 2 * np.pi * (((before * axis).sum(-1, keepdims=True) - angle) / (2 * np.pi)).round() * axis


def continuous(values: Tensor, rotations: Sequence[RotationColumns]) -> Tensor:
    """Windows [..., T, D] in which each step takes the numbers nearest to those of the step before, and the first one
    those nearest to the reference. The same where it is done twice; differentiable."""
    import torch

    for rotation in rotations:
        if rotation.representation not in SIZES:
            continue
        part = values[..., rotation.columns]
        before, steps = _filled(part[..., 0, :], rotation.origin), []
        for step in part.unbind(-2):
            before = nearest(step, before, rotation.representation)
            steps.append(before)
        values = _with_part(values, rotation, torch.stack(steps, dim=-2))
    return values


def valid(values: Tensor, rotations: Sequence[RotationColumns]) -> Tensor:
    """What a network says [..., D] as rotations: quaternions of unit length, the reference where nearly zero."""
    import torch

    for rotation in rotations:
        if WIDTHS[rotation.representation] == 4:
            part = values[..., rotation.columns]
            length = torch.linalg.vector_norm(part, dim=-1, keepdim=True)
            unit = torch.where(length > _SHORTEST, part / length.clamp_min(_SHORTEST), _filled(part, rotation.origin))
            values = _with_part(values, rotation, unit)
    return values


def continuous_rows(rows: np.ndarray, rotation: RotationColumns) -> np.ndarray:
    """float64 [N, n] of an episode's `rows` [N, D]: `continuous` along them. What is not finite stays as it is."""
    part = np.array(rows[:, rotation.columns], np.float64)
    finite = np.flatnonzero(np.isfinite(part).all(axis=1))
    chain = np.concatenate([[rotation.origin], part[finite]])
    if WIDTHS[rotation.representation] == 4:
        flips = np.cumsum((chain[1:] * chain[:-1]).sum(axis=1) < 0) % 2
        part[finite] *= 1 - 2 * flips[:, None]
    elif (nearest(chain[1:], chain[:-1], rotation.representation) != chain[1:]).any():
        for place in range(1, len(chain)):
            chain[place] = nearest(chain[place], chain[place - 1], rotation.representation)
        part[finite] = chain[1:]
    return part


def _filled(like: Tensor, values: Sequence[float]) -> Tensor:
    """`values` [n] in the shape of `like` [..., n], made on its device: a copy from the host would wait for a GPU."""
    import torch

    return torch.stack([torch.full_like(like[..., 0], value) for value in values], dim=-1)


def _with_part(values: Tensor, rotation: RotationColumns, part: Tensor) -> Tensor:
    import torch

    columns = rotation.columns
    return torch.cat([values[..., : columns.start], part, values[..., columns.stop :]], dim=-1)


def _length(vectors: Any) -> Any:
    return (vectors * vectors).sum(-1, keepdims=True) ** 0.5


def _mean(rows: np.ndarray, representation: str) -> tuple[float, ...]:
    """Of rotations [N, n]. Of a quaternion's two signs the one that makes its largest number positive."""
    if representation == "rotation_vector":
        rows = Rotation.from_rotvec(rows).as_quat()
    elif SIZES[representation] != 4:
        scale = 180 / np.pi if representation.endswith("degrees") else 1.0
        return tuple((scale * np.arctan2(np.sin(rows / scale).sum(0), np.cos(rows / scale).sum(0))).tolist())
    mean = np.linalg.eigh(rows.T @ rows)[1][:, -1]
    mean *= np.sign(mean[np.argmax(np.abs(mean))])
    return tuple((Rotation.from_quat(mean).as_rotvec() if representation == "rotation_vector" else mean).tolist())


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
