"""The best of several chunks, by a critic that learnt from reward (IDQL, Hansen-Estruch et al. 2023).

    drawn noises ──noise critic──▶ the best of them ──denoising──▶ n candidates ──critic Q(s, a)──▶ the chunk

Without `drawn` each of n noises is denoised. With it only the n are that a critic on noise finds best, of `drawn` ones
("FASTER": the value of a noise, Q_w(s, w) = Q(s, π(s, w)), is known before it is denoised); that needs a sampler that
adds no noise of its own, since else the noise at the beginning does not say which chunk comes of it.

Q is the least of an ensemble. What is executed of a chunk is judged, in normalised units. `action-diffusion finetune
method=idql` learns both critics in a simulator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.extensions.extension import Extension, Fitted
from action_diffusion.policy.extensions.stored import condition_dim, executed, hidden_sizes, restore, whole
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.sample import Encoded
from action_diffusion.policy.value.networks import Value

MOST = 1024
"""Noises or candidates a chunk."""


class BestOf(Extension):
    """n: candidates. drawn: noises that they are chosen from before they are denoised; 0: no others."""

    def __init__(self, policy: DiffusionPolicy, fitted: Fitted) -> None:
        super().__init__(policy, fitted)
        spec = policy.spec
        self.candidates = whole("best_of", fitted, "n", 1, MOST)
        self.noises = max(self.candidates, whole("best_of", fitted, "drawn", 0, MOST))
        sizes: dict[str, Any] = {"hidden": hidden_sizes("best_of", fitted)}
        sizes["members"] = whole("best_of", fitted, "members", 1, 64)
        sizes["octaves"] = whole("best_of", fitted, "octaves", 0, 16)
        sizes["condition_dim"], n = condition_dim(policy), spec.noise_shape[1]
        with torch.device("meta"):  # no memory before the arrays' shapes are looked at
            self.critic = Value(action_dim=spec.n_action_steps * n, **sizes)
            self.noise_critic = Value(action_dim=spec.horizon * n, **sizes)
        restore("best_of", fitted, "critic", self.critic, policy.device)
        if self.noises > self.candidates:
            if not policy.sampler.deterministic:
                raise InputError(
                    "extension best_of: drawn noises are judged before they are denoised, which needs a sampler that "
                    "draws none in its steps: sampler.scheduler=ddim (eta=0), dpm_solver++ or flow"
                )
            restore("best_of", fitted, "noise_critic", self.noise_critic, policy.device)

    def start(self, seen: Encoded, noise: Tensor) -> Tensor:
        if self.noises == self.candidates:
            return noise
        condition = seen.condition.float().repeat_interleave(noise.shape[1], dim=0)
        value = self.noise_critic(condition, noise.flatten(0, 1).flatten(1)).amin(0).unflatten(0, noise.shape[:2])
        best = value.topk(self.candidates, dim=1).indices
        return noise[torch.arange(len(noise), device=noise.device).unsqueeze(1), best]

    def choose(self, seen: Encoded, normalized: Tensor) -> Tensor:
        condition = seen.condition.float().repeat_interleave(normalized.shape[1], dim=0)
        value = self.critic(condition, executed(self.policy, normalized.flatten(0, 1))).amin(0)
        best: Tensor = value.unflatten(0, normalized.shape[:2]).argmax(dim=1)
        return best
