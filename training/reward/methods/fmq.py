"""FMQ: a policy of one step is moved to where a critic says, inside a trust region (Ziakas et al. 2026, "Aligning Flow
Map Policies with Optimal Q-Guidance").

A flow map goes all the way from noise w to a chunk in one evaluation, a = X(w, 1 → 0 | s). The best that a linear Q
allows within a radius ρ of the demonstrated chunk a₀ = X₀(w | s), that the policy began with, is known in closed form,

    a* = a₀ + ρ g / ‖g‖,   g = ∇_a min Q(s, a)

and Q is no more than nearly linear, so that it is gone to in steps, each to the nearest place within the radius:

    target     a₀ + Π_ρ(a + η g / ‖g‖ − a₀)              Π_ρ(d) = d · min(1, ρ / ‖d‖)
    flow map   X(w, 1 → 0 | s)  ←  target,               by the mean square error

‖·‖ is the root mean square over what is executed of a chunk, normalised units: η and ρ mean the same for every horizon.
The encoder stays as it is. No gradient goes through a sampler, and a chunk costs one evaluation, in trials as later.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.extensions.stored import executed
from action_diffusion.policy.model.denoisers.denoiser import Denoiser
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.training.reward.actor_critic import ActorCritic
from action_diffusion.training.reward.critics import step
from action_diffusion.training.reward.experience import Acted
from action_diffusion.training.reward.transitions import Rows


class Fmq(ActorCritic):
    """step: η. radius: ρ. policy_lr: of the denoiser. The others are as of `ActorCritic`.

    Raises `InputError` for a policy that is no flow map of one step.
    """

    trains_policy = True

    def __init__(
        self,
        policy: DiffusionPolicy,
        *,
        seed: int = 0,
        step: float = 0.05,
        radius: float = 0.3,
        policy_lr: float = 1e-4,
        **critics: Any,
    ) -> None:
        super().__init__(policy, seed=seed, **critics)
        if not policy.sampler.two_times or len(policy.sampler.steps) != 1:
            raise InputError(
                "method=fmq trains a policy that goes from noise to a chunk in one step: give a bundle that was "
                "trained with policy/objective=flow_map, mean_flow or shortcut, and sampler.num_inference_steps=1"
            )
        self.anchor = copy.deepcopy(policy.denoiser).requires_grad_(False)
        policy.denoiser.requires_grad_(True)
        self.policy_parameters = list(policy.denoiser.parameters())
        self.modules["denoiser"] = policy.denoiser
        self.optimizers["denoiser"] = torch.optim.AdamW(self.policy_parameters, lr=policy_lr, weight_decay=0.0)
        self.step, self.radius = step, radius

    @torch.no_grad()
    def act(self, obs: Mapping[str, np.ndarray]) -> Acted:
        tensors = self.tensors(obs)
        condition = self.policy.see(tensors).condition.float()
        sample = self.policy.sample(tensors, noise=self.normal(len(condition), *self.shape))
        action = executed(self.policy, sample.normalized)
        return Acted(sample.action.float().cpu().numpy(), {"condition": condition, "action": action})

    @torch.no_grad()
    def acted(self, rows: Rows) -> Tensor:
        condition = rows["condition"]
        return executed(self.policy, self._jump(self.policy.denoiser, condition, self._noise(condition)))

    def improve(self, rows: Rows) -> dict[str, float]:
        condition = rows["condition"]
        noise = self._noise(condition)
        chunk = self._jump(self.policy.denoiser, condition, noise)
        action = executed(self.policy, chunk)
        with torch.no_grad():
            anchor = executed(self.policy, self._jump(self.anchor, condition, noise))
        there = action.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.critic(condition, there).amin(0).sum(), there)
        aim = guided(there.detach(), anchor, gradient, self.step, self.radius)
        loss = (action - aim).square().mean()
        step(self.optimizers["denoiser"], loss, self.policy_parameters, most=1.0)
        return {"policy_loss": float(loss.detach()), "moved": float(_rms(action.detach() - anchor).mean())}

    def _noise(self, condition: Tensor) -> Tensor:
        return self.normal(len(condition), *self.shape)

    def _jump(self, denoiser: Denoiser, condition: Tensor, noise: Tensor) -> Tensor:
        """Chunks [B, H, A], normalised, of noise: the flow map from 1 to 0."""
        policy, sampler = self.policy, self.policy.sampler
        film = denoiser.prepare(condition, sampler.times(self.device))
        prefix = policy._prefix(None, noise, 1)
        output = denoiser(noise if prefix is None else prefix.mark(noise), film.at(0, None))
        return policy.process.x0_from_output(output, noise, sampler.steps[0])


def guided(action: Tensor, anchor: Tensor, gradient: Tensor, step: float, radius: float) -> Tensor:
    """Where chunks [B, D] are to go: a step up the gradient, and not further than the radius from their anchors."""
    tiny = torch.finfo(action.dtype).tiny
    moved = action + step * gradient / _rms(gradient).clamp_min(tiny) - anchor
    return anchor + moved * (radius / _rms(moved).clamp_min(tiny)).clamp_max(1.0)


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(dim=1, keepdim=True).sqrt()


__all__ = ["Fmq", "guided"]
