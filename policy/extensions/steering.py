"""The initial noise, chosen by what learnt from reward which noise leads where (DSRL, Wagenmaker et al. 2025).

    condition ──actor──▶ w in ±bound ──the frozen policy, without noise of its own──▶ chunk

A sampler that draws nothing in its steps makes of each noise one chunk, so noise is as good as an action, and one that
cannot leave what the policy knows: every w gives a chunk that the policy would make. Nothing of the policy changes.
`action-diffusion finetune method=dsrl` learns the actor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from action_diffusion.datasets.batches.loader import BatchSource
from action_diffusion.errors import InputError
from action_diffusion.policy.extensions.extension import Extension, Fitted
from action_diffusion.policy.extensions.stored import condition_dim, hidden_sizes, number, restore
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.sample import Encoded
from action_diffusion.policy.value.networks import NoiseActor


class Steering(Extension):
    """Every chunk begins at the actor's best noise; what is drawn is not looked at."""

    def __init__(self, policy: DiffusionPolicy, fitted: Fitted) -> None:
        super().__init__(policy, fitted)
        if not policy.sampler.deterministic:
            raise InputError(
                "extension steering: the noise that a chunk begins with says which it is only with a sampler that "
                "draws none in its steps: sampler.scheduler=ddim (eta=0), dpm_solver++ or flow"
            )
        with torch.device("meta"):
            self.actor = NoiseActor(
                condition_dim=condition_dim(policy),
                noise_dim=policy.spec.horizon * policy.spec.action.shape[0],
                bound=number("steering", fitted, "bound", 1e-3, 100.0),
                hidden=hidden_sizes("steering", fitted),
            )
        restore("steering", fitted, "actor", self.actor, policy.device)

    @classmethod
    def fit(
        cls, policy: DiffusionPolicy, train: BatchSource, held_out: BatchSource, options: Mapping[str, Any]
    ) -> Fitted:
        raise InputError(
            "extension steering learns from trials, not from demonstrations: action-diffusion finetune method=dsrl"
        )

    def start(self, seen: Encoded, noise: Tensor) -> Tensor:
        best = self.actor.best(seen.condition.float()).view(len(noise), 1, *noise.shape[2:])
        return best.expand_as(noise).contiguous()
