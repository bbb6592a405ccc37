"""Fixed functions of a low-dimensional observation, applied before normalisation.

An angle jumps where it wraps, and a pose says little about where an object's edges are; a network learns far more
from the same numbers written smoothly. Each feature maps a vector [..., n] to a vector [..., m].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from action_diffusion.errors import InputError

_PARTS = nn.ModuleDict()


def take(x: Tensor, indices: Sequence[int]) -> Tensor:
    """x[..., indices], where a list as an index would be copied to the device in every call, and wait for a GPU."""
    return torch.stack([x[..., index] for index in indices], dim=-1) if indices else x[..., :0]


def module_name(key: str) -> str:
    """A key as torch takes it for the name of a part: the key itself, unless it has dots or means something to torch.

    Different keys have different names.
    """
    return key.replace("%", "%25").replace(".", "%2E") + "%" * hasattr(_PARTS, key)


class SinCos(nn.Module):
    """Replaces angles (radians) by their sine and cosine: [..., n] → [..., n + len(columns)]."""

    def __init__(self, *, n: int, columns: Sequence[int]):
        super().__init__()
        _check_columns("sin_cos", columns, n)
        self.columns = list(columns)
        self.others = [i for i in range(n) if i not in self.columns]
        self.output_dim = n + len(self.columns)

    def forward(self, x: Tensor) -> Tensor:
        angles = take(x, self.columns)
        return torch.cat([take(x, self.others), angles.sin(), angles.cos()], dim=-1)


class Magnified(nn.Module):
    """Adds asinh(x / scale) of some columns: [..., n] → [..., n + len(columns)].

    Where a hand is beside an object matters to the millimetre there and hardly half a metre away. Beyond `scale` (the
    columns' unit) this grows like a logarithm, around zero it is x / scale.
    """

    def __init__(self, *, n: int, columns: Sequence[int], scale: float):
        super().__init__()
        _check_columns("magnified", columns, n)
        if not scale > 0:
            raise InputError(f"features.magnified: scale={scale} must be above 0")
        self.columns, self.scale = list(columns), scale
        self.output_dim = n + len(self.columns)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.asinh(take(x, self.columns) / self.scale)], dim=-1)


class PlanarObject(nn.Module):
    """Writes a planar pose (x, y, angle) as points fixed to the object, and other positions in the object's frame.

    n: size of the input. pose: its three columns. points: [P, 2] in the object's frame, same unit as x and y.
    relative: columns (x, y) of positions that are also given in the object's frame. landmarks: [L, 2], places that
    never move (a goal's corners), given in the object's frame.
    [..., n] → [..., n − 1 + 2 + 2 P + len(relative) + 2 L]: input without the angle, its sine and cosine, the points,
    the relative positions, the landmarks.
    """

    points: Tensor
    landmarks: Tensor

    def __init__(
        self,
        *,
        n: int,
        pose: Sequence[int],
        points: Sequence[Sequence[float]],
        relative: Sequence[int] = (),
        landmarks: Sequence[Sequence[float]] = (),
    ):
        super().__init__()
        _check_columns("planar_object", [*pose, *relative], n)
        if len(pose) != 3 or len(relative) % 2:
            raise InputError("planar_object: pose takes three columns (x, y, angle), relative pairs of columns")
        self.pose, self.relative = list(pose), list(relative)
        self.others = [i for i in range(n) if i != self.pose[2]]
        self.register_buffer("points", torch.tensor(points, dtype=torch.float32).view(-1, 2), persistent=False)
        self.register_buffer("landmarks", torch.tensor(landmarks, dtype=torch.float32).view(-1, 2), persistent=False)
        self.output_dim = n + 1 + 2 * len(self.points) + len(self.relative) + 2 * len(self.landmarks)

    def forward(self, x: Tensor) -> Tensor:
        origin, angle = take(x, self.pose[:2]), x[..., self.pose[2]]
        sin, cos = angle.sin(), angle.cos()
        rotation = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))
        points = self.points @ rotation.mT + origin.unsqueeze(-2)
        offsets = take(x, self.relative).unflatten(-1, (-1, 2)) - origin.unsqueeze(-2)
        relative = offsets @ rotation
        landmarks = (self.landmarks - origin.unsqueeze(-2)) @ rotation
        parts = [
            take(x, self.others),
            sin.unsqueeze(-1),
            cos.unsqueeze(-1),
            points.flatten(-2),
            relative.flatten(-2),
            landmarks.flatten(-2),
        ]
        return torch.cat(parts, dim=-1)


def _check_columns(name: str, given: Sequence[int], n: int) -> None:
    for column in given:
        if not 0 <= column < n:
            raise InputError(f"features.{name}: column {column} does not exist in an observation of {n} values")
