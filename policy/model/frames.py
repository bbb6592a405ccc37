"""The frame that a chunk of actions is learnt in: what a person means by "to the left of it" rather than "to x = 310".

    chunk in the data's units ──enter──▶ chunk in the frame ─▶ normalise ─▶ diffusion
                              ◀──leave──                    ◀─ unnormalise ◀─

The frame is where something was at step To-1, "now", in the observations that the chunk is predicted from. The same
motion beside the same object is then the same numbers wherever both are, so that less has to be learnt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from action_diffusion.errors import InputError
from action_diffusion.policy.model.features import take


class ActionFrame(nn.Module):
    """observation: the state key that holds the frame's pose. `now` [B, n] is its value at step To-1, data's units; of
    several `observations` one behind the other.
    """

    output_dim: int | None = None
    """Values D of an action in the frame; None: as many as in the data."""

    def __init__(self, *, observation: str):
        super().__init__()
        self.observations: tuple[str, ...] = (observation,)

    def enter(self, action: Tensor, now: Tensor) -> Tensor:
        """[B, H, A] in the data's units → [B, H, D] in the frame."""
        raise NotImplementedError

    def leave(self, action: Tensor, now: Tensor) -> Tensor:
        """The inverse of `enter`."""
        raise NotImplementedError

    def observe(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of states, key → [B, To, n], those that are observed from the frame, as the policy sees them: [B, To, m]."""
        return {}

    @property
    def observed_dims(self) -> dict[str, int]:
        """Key → m, of those."""
        return {}


class Position(ActionFrame):
    """Actions that are positions, given from a position of the observation. Their axes stay the data's: rotations, and
    positions as seen from a gripper that turns, are `policy.model.poses`.

    columns: of the observation, subtracted from the `action_columns` of the action, which are as many.
    """

    def __init__(
        self, *, observation: str, columns: Sequence[int], action_columns: Sequence[int], n: int, n_action: int
    ):
        super().__init__(observation=observation)
        _check("columns", columns, n, "an observation")
        _check("action_columns", action_columns, n_action, "an action")
        if len(columns) != len(action_columns):
            raise InputError(f"action_frame position: {len(columns)} columns for {len(action_columns)} action_columns")
        self.columns, self.action_columns, self.n_action = list(columns), list(action_columns), n_action

    def _origin(self, now: Tensor) -> Tensor:
        zero, sources = torch.zeros_like(now[:, 0]), dict(zip(self.action_columns, self.columns, strict=True))
        values = [now[:, sources[i]] if i in sources else zero for i in range(self.n_action)]
        return torch.stack(values, dim=-1).unsqueeze(1)

    def enter(self, action: Tensor, now: Tensor) -> Tensor:
        return action - self._origin(now)

    def leave(self, action: Tensor, now: Tensor) -> Tensor:
        return action + self._origin(now)


class PlanarObjectFrame(ActionFrame):
    """Actions [x, y] in the frame of an object in the plane, whose pose (x, y, angle in rad) the observation holds.

    With R the rotation by the angle, and o the origin: enter is Rᵀ (a − o), leave is R a + o.
    """

    def __init__(self, *, observation: str, pose: Sequence[int], n: int, n_action: int):
        super().__init__(observation=observation)
        _check("pose", pose, n, "an observation")
        if len(pose) != 3 or n_action != 2:
            raise InputError("action_frame planar_object: pose takes three columns (x, y, angle), the action is [x, y]")
        self.pose = list(pose)

    def _origin_and_rotation(self, now: Tensor) -> tuple[Tensor, Tensor]:
        pose = take(now, self.pose)
        sin, cos = pose[:, 2].sin(), pose[:, 2].cos()
        return pose[:, None, :2], torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))

    def enter(self, action: Tensor, now: Tensor) -> Tensor:
        origin, rotation = self._origin_and_rotation(now)
        return (action - origin) @ rotation

    def leave(self, action: Tensor, now: Tensor) -> Tensor:
        origin, rotation = self._origin_and_rotation(now)
        return action @ rotation.mT + origin


def _check(name: str, columns: Sequence[int], n: int, what: str) -> None:
    for column in columns:
        if not 0 <= column < n:
            raise InputError(f"action_frame {name}: column {column} does not exist in {what} of {n} values")
