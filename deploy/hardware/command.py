"""How the numbers of a command are laid out, and the coordinates in which an arm's process works on them.

    command [A]      joints | position | rotation | gripper          in the data's terms, as `protocols.Group` says
    coordinates [A]  the same numbers, but rotations as rotation vectors from their group's reference

Coordinates are what limits, smoothing and stops work on. A rotation vector turns into an angular velocity by a matrix
whose singular values are at most 1, so a limit on its rate is one on the turning too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy.spatial.transform import Rotation

from action_diffusion.deploy.hardware.limits import RATES, Limits
from action_diffusion.deploy.hardware.protocols import Group
from action_diffusion.errors import InputError
from action_diffusion.rotations import axis_angle_to_6d, six_d_to_axis_angle


class CommandLayout:
    """Where the groups of a command lie, and the way to coordinates and back.

    Attributes:
        size: A.
        smooth, held: indices of the numbers that are interpolated, and of those that are held.
        recalled: indices of the numbers whose command is where the arm is, after a stop and at a new beginning.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)
        self.size = sum(group.size for group in groups)
        self.smooth = self._indices(lambda group: group.kind != "hold")
        self.held = self._indices(lambda group: group.kind == "hold")
        self.recalled = self._indices(lambda group: group.at_stop == "present")

    def slices(self) -> Iterator[tuple[Group, slice]]:
        """Each group, and where its numbers are."""
        start = 0
        for group in self.groups:
            yield group, slice(start, start + group.size)
            start += group.size

    def _indices(self, chosen: Callable[[Group], bool]) -> np.ndarray:
        parts = [np.arange(part.start, part.stop) for group, part in self.slices() if chosen(group)]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _rotations(self) -> Iterator[tuple[Rotation, slice]]:
        for group, part in self.slices():
            if group.kind == "rotation":
                yield Rotation.from_rotvec(np.asarray(group.reference, dtype=np.float64)), part

    def to_coordinates(self, commands: np.ndarray) -> np.ndarray:
        """commands [..., A] → coordinates [..., A]."""
        coordinates = np.array(commands, dtype=np.float64)
        for reference, part in self._rotations():
            turns = coordinates[..., part]
            turned = reference.inv() * Rotation.from_rotvec(turns.reshape(-1, 3))
            coordinates[..., part] = turned.as_rotvec().reshape(turns.shape)
        return coordinates

    def to_command(self, coordinates: np.ndarray) -> np.ndarray:
        """coordinates [..., A] → commands [..., A]."""
        commands = np.array(coordinates, dtype=np.float64)
        for reference, part in self._rotations():
            turns = commands[..., part]
            turned = reference * Rotation.from_rotvec(turns.reshape(-1, 3))
            commands[..., part] = turned.as_rotvec().reshape(turns.shape)
        return commands

    def groups_of(self, size: int) -> list[tuple[str, int, str]]:
        """(name, size, unit) of the parts of an action of `size` numbers: those of a command, or with 6D rotations.

        Raises `InputError` for another number.
        """
        n_rotations = sum(group.kind == "rotation" for group in self.groups)
        if size not in (self.size, self.size + 3 * n_rotations):
            wide = f", or {self.size + 3 * n_rotations} with 6D rotations" if n_rotations else ""
            raise InputError(f"an action of {size} values is no command: the arm takes {self.size}{wide}")
        more = size > self.size
        parts = [(group, 3 if more and group.kind == "rotation" else 0) for group in self.groups]
        return [(group.name, group.size + extra, "6D" if extra else group.unit) for group, extra in parts]

    def from_actions(self, actions: np.ndarray) -> np.ndarray:
        """actions [n, A] as commands have them, or [n, A + 3 each] with 6D rotations → commands [n, A].

        Raises `InputError` for another shape, and for six numbers that are no rotation.
        """
        actions, columns, start = np.asarray(actions, np.float64), [], 0
        for group, (_, size, _) in zip(self.groups, self.groups_of(actions.shape[-1]), strict=True):
            part = actions[..., start : start + size]
            columns.append(part if size == group.size else six_d_to_axis_angle(part))
            start += size
        return np.concatenate(columns, axis=-1)

    def to_actions(self, commands: np.ndarray, size: int) -> np.ndarray:
        """commands [..., A] → actions [..., size]: what `from_actions` takes."""
        columns = []
        for (group, part), (_, wide, _) in zip(self.slices(), self.groups_of(size), strict=True):
            numbers = np.asarray(commands)[..., part]
            columns.append(numbers if wide == group.size else axis_angle_to_6d(numbers))
        return np.concatenate(columns, axis=-1)

    def between(self, a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
        """What lies between coordinates `a` and `b`, both [A], at `share` in [0, 1) of the way."""
        q: np.ndarray = a + share * (b - a)
        q[self.held] = a[self.held]
        for group, part in self.slices():
            if group.kind == "rotation":
                start = Rotation.from_rotvec(a[part])
                turn = (start.inv() * Rotation.from_rotvec(b[part])).as_rotvec()
                q[part] = (start * Rotation.from_rotvec(share * turn)).as_rotvec()
        return q

    def check_limits(self, limits: Limits, where: str = "limits") -> None:
        """Raises `InputError` where a number of a command has no limit of a kind that it needs, or an unusable one."""
        if len(limits.low) != self.size:
            raise InputError(f"{where} are for {len(limits.low)} values, a command has {self.size}")
        needs = [(name, self.smooth) for name in RATES] + [("max_step", self.held)]
        needs += [("low", np.arange(self.size)), ("high", np.arange(self.size))]
        for name, indices in needs:
            value = getattr(limits, name)
            if len(indices) and (value is None or not np.isfinite(value[indices]).all()):
                raise InputError(f"{where}.{name} has no value for {self._named(indices)}: nothing moves without")
        for group, part in self.slices():
            if group.kind == "rotation":
                turn = np.linalg.norm(np.maximum(np.abs(limits.low[part]), np.abs(limits.high[part])))
                if not turn < np.pi:
                    raise InputError(
                        f"{where} let {group.name} turn by {turn:.2f} rad from its reference; less than pi is needed"
                    )

    def _named(self, indices: np.ndarray) -> str:
        return ", ".join(group.name for group, part in self.slices() if part.start in indices)
