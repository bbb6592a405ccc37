"""What demonstrations record and a running policy does not see, told from what it sees.

    observations ─▶ encoder ─▶ embedding ─┬──────────────────────────────────▶ condition ─▶ denoiser
                                          └▶ estimator ─▶ state ─▶ features ──┘    also: the action frame

In training, the recorded state is the target of the estimator, and its estimate goes on from there, as when the policy
runs: what follows learns to live with its errors. A picture's many numbers become the few that the motion depends on
long before imitation alone would find them ("learning by cheating", Chen et al. 2020, teaches by such states too).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from action_diffusion.errors import InputError
from action_diffusion.policy.model.features import take

SHARP = 0.05
"""Normalised error below which the loss is quadratic: a few wild errors are not to outweigh many small ones."""


class PlanarPose(nn.Module):
    """Estimates a state [n] that holds a pose (x, y, angle in rad) in the plane and what observations say anyway.

    state: its key among the task's `estimates`. pose: its three columns. known: observation key → the columns of the
    state that are this observation's value now, [len(columns)]. low, high: of x and y, in the data's unit.
    embedding_dim: of the encoder. n: size of the state. weight: of the loss beside the denoiser's.

    Raises `InputError` where the columns are not each of the n once.
    """

    def __init__(
        self,
        *,
        state: str,
        pose: Sequence[int],
        known: Mapping[str, Sequence[int]],
        low: float,
        high: float,
        embedding_dim: int,
        n: int,
        hidden: int = 256,
        weight: float = 1.0,
    ):
        super().__init__()
        used = [*pose, *(column for taken in known.values() for column in taken)]
        if len(pose) != 3 or sorted(used) != list(range(n)):
            raise InputError(
                f"estimator planar_pose: pose takes three columns, known the others of the {n}; got {sorted(used)}"
            )
        if not high > low:
            raise InputError(f"estimator planar_pose: high={high} must be above low={low}")
        self.key, self.pose, self.known = state, list(pose), {key: list(taken) for key, taken in known.items()}
        self.middle, self.reach, self.n, self.weight = (high + low) / 2, (high - low) / 2, n, weight
        self.network = nn.Sequential(nn.Linear(embedding_dim, hidden), nn.SiLU(), nn.Linear(hidden, 4))

    def forward(self, embedding: Tensor) -> Tensor:
        """[B, C] → [B, 4]: x and y, −1 at `low` and 1 at `high`, and the angle's sine and cosine, not of length 1."""
        result: Tensor = self.network(embedding)
        return result

    def loss(self, output: Tensor, state: Tensor) -> Tensor:
        """How far `output` [B, 4] is from the recorded `state` [B, n], a scalar."""
        x_y, angle = (take(state, self.pose[:2]) - self.middle) / self.reach, state[:, self.pose[2]]
        target = torch.cat([x_y, angle.sin()[:, None], angle.cos()[:, None]], dim=1)
        return self.weight * F.smooth_l1_loss(output, target, beta=SHARP)

    def estimate(self, output: Tensor, obs: Mapping[str, Tensor]) -> Tensor:
        """The state [B, n], data's units. obs: key → [B, To, …], of which the last step is now."""
        place, angle = output[:, :2] * self.reach + self.middle, torch.atan2(output[:, 2], output[:, 3])
        values = dict(zip(self.pose, (*place.unbind(1), angle), strict=True))
        for key, taken in self.known.items():
            values |= zip(taken, obs[key][:, -1].to(output.dtype).flatten(1).unbind(1), strict=True)
        return torch.stack([values[column] for column in range(self.n)], dim=1)
