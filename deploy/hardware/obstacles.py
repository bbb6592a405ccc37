"""What an arm must not touch: balls round its links against a box, a table and other balls.

Only for drivers that say where their links are: `Arm.spheres`. Without such a method, limits on positions are all
there is, and asking for more is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from action_diffusion.deploy.hardware.limits import numbers
from action_diffusion.errors import InputError, unknown

NAMES = ("workspace", "table", "spheres")


@dataclass(frozen=True, kw_only=True)
class Obstacles:
    """In the arm's base frame, m.

    Attributes:
        workspace: [2, 3], the low and the high corner of the box that the arm's balls stay in; None: no box.
        table: the height (z) that they stay above; None: no table.
        spheres: [N, 4], x, y, z, radius of what they stay out of: a camera's mount, the base of another arm.
    """

    workspace: np.ndarray | None = None
    table: float | None = None
    spheres: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, value, shape in (("workspace", self.workspace, (2, 3)), ("spheres", self.spheres, (None, 4))):
            if value is None:
                continue
            if value.ndim != 2 or value.shape[1] != shape[1] or (shape[0] and len(value) != shape[0]):
                raise InputError(f"obstacles.{name} has shape {list(value.shape)}, expected {list(shape)}")
            if not np.isfinite(value).all():
                raise InputError(f"obstacles.{name} is not finite: {value.tolist()}")
        if self.workspace is not None and not (self.workspace[0] < self.workspace[1]).all():
            raise InputError(f"obstacles.workspace leaves no room: {self.workspace.tolist()}")

    @classmethod
    def of(cls, values: object) -> Obstacles | None:
        """From plain lists, as a configuration has them; None where there are none. Raises `InputError`."""
        if not isinstance(values, Mapping | None):
            raise InputError(f"obstacles={str(values)[:80]}: write {{workspace: […], table: z, spheres: […]}}")
        given = {name: value for name, value in (values or {}).items() if value is not None}
        for name in given:
            if name not in NAMES:
                raise unknown("obstacle", str(name), NAMES)
        arrays = {
            name: numbers(given[name], f"obstacles.{name}", axes=2)
            for name in ("workspace", "spheres")
            if name in given
        }
        table = float(numbers([given["table"]], "obstacles.table")[0]) if "table" in given else None
        return cls(table=table, **arrays) if given else None

    def touched(self, balls: np.ndarray | Sequence[Sequence[float]]) -> str | None:
        """What the arm's `balls` [S, 4] (x, y, z, radius) touch, in a few words; None where nothing."""
        balls = np.asarray(balls, dtype=np.float64)
        centre, radius = balls[:, :3], balls[:, 3]
        if not np.isfinite(balls).all():
            return "a place that is not finite"
        if self.table is not None and (centre[:, 2] - radius < self.table).any():
            return f"the table: {float((centre[:, 2] - radius).min()):.3f} m is below {self.table:g} m"
        if self.workspace is not None:
            low, high = self.workspace
            if (centre - radius[:, None] < low).any() or (centre + radius[:, None] > high).any():
                return "the side of the workspace"
        if self.spheres is not None and len(self.spheres):
            distance = np.linalg.norm(centre[:, None] - self.spheres[None, :, :3], axis=-1)
            room = distance - radius[:, None] - self.spheres[None, :, 3]
            if (room < 0).any():
                return f"sphere {int(room.min(axis=0).argmin())}"
        return None
