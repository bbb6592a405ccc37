"""Chunks of a frozen policy, each moved a little to where more is earned (Fisher Decorator, Cheng et al. 2026).

    chunk ──▶ T(a) = a + δ(s, a),   a what is executed of it, δ within ±bound, normalised units

The policy says what may be done, the map which of its neighbours is better. `action-diffusion finetune method=fisher`
learns the map, so that it moves along what the policy does, and hardly across.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from action_diffusion.policy.extensions.extension import Extension, Fitted
from action_diffusion.policy.extensions.stored import (
    condition_dim,
    executed,
    hidden_sizes,
    number,
    restore,
    whole,
)
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.sample import Encoded
from action_diffusion.policy.value.networks import Displacement


class Transport(Extension):
    """What is executed of every chunk is moved by the map; the rest stays."""

    def __init__(self, policy: DiffusionPolicy, fitted: Fitted) -> None:
        super().__init__(policy, fitted)
        with torch.device("meta"):
            self.map = Displacement(
                condition_dim=condition_dim(policy),
                action_dim=policy.spec.n_action_steps * policy.spec.action.shape[0],
                bound=number("transport", fitted, "bound", 1e-6, 10.0),
                octaves=whole("transport", fitted, "octaves", 0, 16),
                hidden=hidden_sizes("transport", fitted),
            )
        restore("transport", fitted, "map", self.map, policy.device)

    def finish(self, seen: Encoded, normalized: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        return transported(self.policy, self.map, seen.condition.float(), normalized), {}


def transported(policy: DiffusionPolicy, displacement: Displacement, condition: Tensor, normalized: Tensor) -> Tensor:
    """Chunks [B, H, A], normalised, with what is executed of them moved. condition: [B, C]."""
    now, action = policy.spec.n_obs_steps - 1, executed(policy, normalized)
    moved = normalized.clone()
    window = moved[:, now : now + policy.spec.n_action_steps]
    window += displacement(condition, action).view_as(window)
    return moved
