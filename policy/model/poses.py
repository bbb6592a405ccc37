"""Chunks and observations relative to where the grippers are now: UMI's relative poses (Chi et al. 2024).

With T = (R, p) a pose of a gripper, "now" step To-1, and an action's pose T_t:

    enter     T_now⁻¹ T_t = (R_nowᵀ R_t, R_nowᵀ (p_t − p_now))      position [3] and 6D rotation [6]
    observe   T_now⁻¹ T_s of each observed step s, the last of which is the identity
              T'_now⁻¹ T_s for every other gripper, whose pose is T'
    leave     T_now T, in the numbers that the data has for a rotation

The same motion of the hand is then the same numbers wherever the arm starts, however it is turned, and wherever its
base is. 6D (Zhou et al. 2019): the first two rows of the rotation matrix, see `action_diffusion.rotations`. Nothing
here is singular: numbers that mean the same pose are the same in the frame, also at half a turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from action_diffusion.errors import InputError, unknown
from action_diffusion.policy.model.frames import ActionFrame
from action_diffusion.rotations import RotationColumns, continuous, torch_six_d_to_matrix

if TYPE_CHECKING:
    from action_diffusion.policy.spec import PolicySpec

KNOWN = ("rotation_vector", "quaternion_xyzw", "quaternion_wxyz", "rotation_6d")
"""Representations that say which rotation they mean: an order of Euler angles, and `quaternion` alone, do not."""
POSE = 9
"""Numbers of a pose in the frame."""
_SMALL = 1e-12


def to_matrix(values: Tensor, representation: str) -> Tensor:
    """Rotations [..., n] in one of `KNOWN` → matrices [..., 3, 3]. Quaternions may be of any length but zero."""
    if representation == "rotation_6d":
        return torch_six_d_to_matrix(values)
    if representation == "rotation_vector":
        angle = (values * values).sum(-1, keepdim=True).clamp_min(_SMALL**2).sqrt()
        values = torch.cat([values * torch.sinc(angle / (2 * torch.pi)) / 2, (angle / 2).cos()], dim=-1)
    elif representation == "quaternion_wxyz":
        values = values.roll(-1, -1)
    x, y, z, w = normalize(values, dim=-1).unbind(-1)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], dim=-1),
        torch.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], dim=-1),
        torch.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], dim=-1),
    ]
    return torch.stack(rows, dim=-2)


def from_matrix(matrix: Tensor, representation: str) -> Tensor:
    """The inverse of `to_matrix`: quaternions of unit length, vectors of half a turn at most."""
    if representation == "rotation_6d":
        return matrix[..., :2, :].flatten(-2)
    quaternion = _quaternion(matrix)
    if representation == "rotation_vector":
        quaternion = torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)
        sine = (quaternion[..., :3] ** 2).sum(-1, keepdim=True).clamp_min(_SMALL**2).sqrt()
        return quaternion[..., :3] * (2 * torch.atan2(sine, quaternion[..., 3:]) / sine)
    return quaternion.roll(1, -1) if representation == "quaternion_wxyz" else quaternion


def _quaternion(matrix: Tensor) -> Tensor:
    """x, y, z, w [..., 4] of matrices [..., 3, 3], from the largest of the four (Shepperd 1978)."""
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in matrix.unbind(-2))
    rows = (
        (1 + a - e - i, b + d, c + g, h - f),
        (b + d, 1 - a + e - i, f + h, c - g),
        (c + g, f + h, 1 - a - e + i, d - b),
        (h - f, c - g, d - b, 1 + a + e + i),
    )
    each = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)  # 4 q qᵀ
    largest = each.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None].expand(*each.shape[:-2], 1, 4)
    return normalize(each.gather(-2, largest).squeeze(-2), dim=-1)


@dataclass(frozen=True)
class Gripper:
    """Where one gripper's pose is: the key of the state that holds its position, and that position's first column; the
    same of its rotation; the first column of the action's position, and the action's rotation."""

    position: str
    first: int
    rotation: str
    turn: RotationColumns
    action_first: int
    action_turn: RotationColumns


class Pose(ActionFrame):
    """Actions that hold a pose for each gripper, relative to the pose that is observed of it now.

    position: the observation that holds a gripper's position, KEY, or KEY@3 from column 3 on; a list for several.
    rotation: the same for its rotation, by default in the position's observation, where `task.rotations` says there is
    one. action_positions: first columns of the action's positions, by default those right before its rotations. What
    else an action holds stays as it is, behind the poses. observed: "relative", see `observe`, or "absolute", as they
    are.
    """

    order: Tensor
    others: Tensor

    def __init__(
        self,
        *,
        position: str | Sequence[str],
        rotation: str | Sequence[str] | None = None,
        action_positions: Sequence[int] | None = None,
        observed: str = "relative",
        spec: PolicySpec,
    ):
        grippers = _grippers(spec, _listed(position), _listed(rotation or position), action_positions)
        super().__init__(observation=grippers[0].position)
        self.grippers = grippers
        self.observations = tuple(
            dict.fromkeys(key for gripper in self.grippers for key in (gripper.position, gripper.rotation))
        )
        self._relative = observed == "relative"
        self._sizes = {key: spec.observations[key].shape[0] for key in self.observations}
        self._rotations = spec.action.rotations
        n_action = spec.action.shape[0]
        posed = [column for gripper in self.grippers for column in _columns(gripper)]
        others = [column for column in range(n_action) if column not in posed]
        self.output_dim = POSE * len(self.grippers) + len(others)
        places = {column: place for place, column in enumerate([*posed, *others])}
        self.register_buffer("others", torch.tensor(others, dtype=torch.long), persistent=False)
        order = torch.tensor([places[column] for column in range(n_action)])
        self.register_buffer("order", order, persistent=False)

    def enter(self, action: Tensor, now: Tensor) -> Tensor:
        states, parts = dict(zip(self._sizes, now.split(list(self._sizes.values()), dim=-1), strict=True)), []
        for gripper in self.grippers:
            turn = to_matrix(action[..., gripper.action_turn.columns], gripper.action_turn.representation)
            place = action[..., gripper.action_first : gripper.action_first + 3]
            parts += _relative(_pose(gripper, states, of_steps=True), (turn, place))
        return torch.cat([*parts, action.index_select(-1, self.others)], dim=-1)

    def leave(self, action: Tensor, now: Tensor) -> Tensor:
        states, parts = dict(zip(self._sizes, now.split(list(self._sizes.values()), dim=-1), strict=True)), []
        for place, gripper in enumerate(self.grippers):
            turn, origin = _pose(gripper, states, of_steps=True)
            at, six_d = action[..., POSE * place : POSE * place + 3], action[..., POSE * place + 3 : POSE * (place + 1)]
            parts += [
                origin + (turn @ at.unsqueeze(-1)).squeeze(-1),
                from_matrix(turn @ torch_six_d_to_matrix(six_d), gripper.action_turn.representation),
            ]
        whole = torch.cat([*parts, action[..., POSE * len(self.grippers) :]], dim=-1)
        return continuous(whole.index_select(-1, self.order), self._rotations)

    def observe(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self._relative:
            return {}
        now = {key: states[key][:, -1] for key in self.observations}
        parts = {key: [_without(states[key], taken)] for key, taken in self._taken().items()}
        for gripper in self.grippers:
            pose = _pose(gripper, states)
            for other in (gripper, *(one for one in self.grippers if one is not gripper)):
                place, turn = _relative(_pose(other, now, of_steps=True), pose)
                parts[gripper.position].append(place)
                parts[gripper.rotation].append(turn)
        return {key: torch.cat(found, dim=-1) for key, found in parts.items()}

    @property
    def observed_dims(self) -> dict[str, int]:
        if not self._relative:
            return {}
        sizes = {key: self._sizes[key] - len(taken) for key, taken in self._taken().items()}
        for gripper in self.grippers:
            sizes[gripper.position] += 3 * len(self.grippers)
            sizes[gripper.rotation] += 6 * len(self.grippers)
        return sizes

    def _taken(self) -> dict[str, list[int]]:
        """Columns of each observation that are poses."""
        taken: dict[str, list[int]] = {key: [] for key in self.observations}
        for gripper in self.grippers:
            taken[gripper.position] += range(gripper.first, gripper.first + 3)
            taken[gripper.rotation] += range(gripper.turn.columns.start, gripper.turn.columns.stop)
        return taken


def _pose(gripper: Gripper, states: Mapping[str, Tensor], *, of_steps: bool = False) -> tuple[Tensor, Tensor]:
    """Rotation [..., 3, 3] and position [..., 3] of a gripper in states [..., n]; of_steps: with a dimension of 1, for
    the steps that it is compared with."""
    turn = to_matrix(states[gripper.rotation][..., gripper.turn.columns], gripper.turn.representation)
    place = states[gripper.position][..., gripper.first : gripper.first + 3]
    return (turn.unsqueeze(-3), place.unsqueeze(-2)) if of_steps else (turn, place)


def _relative(origin: tuple[Tensor, Tensor], pose: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Position [..., 3] and 6D rotation [..., 6] of `pose` as seen from `origin`."""
    inverse = origin[0].mT
    place = (inverse @ (pose[1] - origin[1]).unsqueeze(-1)).squeeze(-1)
    return [place, from_matrix(inverse @ pose[0], "rotation_6d")]


def _without(values: Tensor, columns: Sequence[int]) -> Tensor:
    """[..., n] without some of its columns, which lie in few pieces."""
    kept = [values[..., first:end] for first, end in _stretches(columns, values.shape[-1])]
    return torch.cat([values[..., :0], *kept], dim=-1)


def _stretches(columns: Sequence[int], n: int) -> Iterator[tuple[int, int]]:
    """The stretches (first, end) of 0 to n that lie between `columns`."""
    ends = [-1, *sorted(columns), n]
    return ((before + 1, after) for before, after in pairwise(ends) if after > before + 1)


def _columns(gripper: Gripper) -> list[int]:
    """Of an action, in the order of what `Pose.leave` makes."""
    turn = gripper.action_turn.columns
    return [*range(gripper.action_first, gripper.action_first + 3), *range(turn.start, turn.stop)]


def _listed(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _grippers(
    spec: PolicySpec, positions: list[str], rotations: list[str], action_positions: Sequence[int] | None
) -> list[Gripper]:
    """Raises `InputError` for what is not there, and for rotations whose numbers do not say which they are."""
    turns = spec.action.rotations
    if len(positions) != len(rotations) or len(turns) != len(positions):
        raise InputError(
            f"action_frame pose: {len(positions)} positions and {len(rotations)} rotations are observed, the action "
            f"has {len(turns)} rotations: each gripper has one of each (task.rotations.{spec.action.source}=[…] says "
            "where those of the action are, such as rotation_vector@3)"
        )
    firsts = [turn.first - 3 for turn in turns] if action_positions is None else list(action_positions)
    if len(firsts) != len(turns):
        raise InputError(f"action_frame pose: {len(firsts)} action_positions for {len(turns)} rotations of the action")
    found = []
    for position, rotation, first, turn in zip(positions, rotations, firsts, turns, strict=True):
        key, place = _placed(spec, position, "position")
        of, column = _placed(spec, rotation, "rotation")
        own = None if rotation == position else column
        found.append(Gripper(key, place or 0, of, _turn(spec, of, own), first, _said(turn, "the action")))
    taken = [column for gripper in found for column in _columns(gripper)]
    _check_apart(taken, spec.action.shape[0], "the action")
    for key, state in spec.observations.items():
        columns = [column for one in found if one.position == key for column in range(one.first, one.first + 3)]
        turned = [one.turn.columns for one in found if one.rotation == key]
        _check_apart([*columns, *(c for part in turned for c in range(part.start, part.stop))], state.shape[0], key)
    return found


def _check_apart(columns: Sequence[int], n: int, what: str) -> None:
    for column in columns:
        if not 0 <= column < n:
            raise InputError(f"action_frame pose: column {column} does not exist in {what} of {n} values")
        if columns.count(column) > 1:
            raise InputError(f"action_frame pose: column {column} of {what} is in two positions or rotations")


def _placed(spec: PolicySpec, text: str, what: str) -> tuple[str, int | None]:
    """KEY@COLUMN, or KEY."""
    key, at, column = text.rpartition("@")
    if not at or not column.isdecimal() or len(column) > 6:
        key, column = text, ""
    states = {name: state for name, state in spec.observations.items() if state.kind == "state"}
    if key not in states or len(states[key].shape) != 1:
        raise unknown(f"state in policy.action_frame.{what}", key, states)
    return key, int(column) if column else None


def _turn(spec: PolicySpec, key: str, column: int | None) -> RotationColumns:
    """The rotation of an observation that begins at `column`; None: its only one."""
    found = [one for one in spec.observations[key].rotations if column is None or one.first == column]
    if len(found) != 1:
        source = spec.observations[key].source or key
        raise InputError(
            f"action_frame pose: {key!r} has {len(found)} rotations{'' if column is None else f' at column {column}'}: "
            f"task.rotations.{source}=… says where one is, such as quaternion_xyzw@3, and rotation={key}@COLUMN which"
        )
    return _said(found[0], repr(key))


def _said(turn: RotationColumns, where: str) -> RotationColumns:
    if turn.representation not in KNOWN:
        raise InputError(
            f"action_frame pose: the rotation of {where} is {turn.representation}, which does not say what its numbers "
            f"are: expected {', '.join(KNOWN)}"
        )
    return turn
