"""The initial noise, chosen by what learnt from reward which noise leads where (DSRL, Wagenmaker et al. 2025).

    condition, drawn noise ──actor──▶ its first frequencies, in ±bound ──the frozen policy──▶ chunk

A sampler that draws nothing in its steps makes of each noise one chunk, so noise is as good as an action, and one that
cannot leave what the policy knows: every w gives a chunk that the policy would make. Nothing of the policy changes. The
actor stays as random as it learnt to be: who is stuck gets out of it by trying something else.
What the actor does not choose of the noise stays as it was drawn. `action-diffusion finetune method=dsrl` learns it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.extensions.extension import Extension, Fitted
from action_diffusion.policy.extensions.stored import condition_dim, hidden_sizes, number, restore, whole
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.sample import Encoded
from action_diffusion.policy.value.noise import Frequencies, NoiseActor


class Steering(Extension):
    """Every chunk begins at a noise of the actor, which the one that was drawn is turned into."""

    def __init__(self, policy: DiffusionPolicy, fitted: Fitted) -> None:
        super().__init__(policy, fitted)
        if not policy.sampler.deterministic:
            raise InputError(
                "extension steering: the noise that a chunk begins with says which it is only with a sampler that "
                "draws none in its steps: sampler.scheduler=ddim (eta=0), dpm_solver++ or flow"
            )
        frequencies = whole("steering", fitted, "frequencies", 1, policy.spec.horizon)
        self.frequencies = Frequencies(policy.spec.horizon, frequencies)
        with torch.device("meta"):
            self.actor = NoiseActor(
                condition_dim=condition_dim(policy),
                dim=frequencies * policy.spec.noise_shape[1],
                bound=number("steering", fitted, "bound", 1e-3, 100.0),
                octaves=whole("steering", fitted, "octaves", 0, 16),
                hidden=hidden_sizes("steering", fitted),
            )
        restore("steering", fitted, "actor", self.actor, policy.device)

    def start(self, seen: Encoded, noise: Tensor) -> Tensor:
        condition, drawn = seen.condition.float().repeat_interleave(noise.shape[1], dim=0), noise.flatten(0, 1)
        coefficients, _ = self.actor.draw(condition, self.frequencies.of(drawn))
        return self.frequencies.put(drawn, coefficients).view_as(noise)
