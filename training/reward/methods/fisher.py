"""Fisher Decorator: the chunks of a frozen policy are moved by a map that knows in which directions the policy is
certain (Cheng et al. 2026, "Fisher Decorator: Refining Flow Policy via a Local Transport Map").

    T(a) = a + δ(s, a)                             a of the frozen policy
    δ      max E[Q(s, T(a))],   E[δᵀ F δ] ≤ ε      F the policy's Fisher information at a, its trace one a dimension

For small δ, ½ δᵀ F δ is what the policy's distribution changes by, in KL, F(a) = E[∇log p (∇log p)ᵀ]. Where chunks lie
near a curve or a surface, F is large across it and small along it, so that the same ε allows a long way along what was
demonstrated and a short one off it; a plain square allows both alike (`metric=euclidean`, to compare with). ε is kept
by a Lagrange multiplier, as in its published code.

∇log p is what the denoiser says at the noise b: of x = α a + b z, (α x̂0 − x) / b², for `scores` draws of z around each
chunk. So F is that of the chunk's own surroundings, as wide as b (decided here: the published code averages it over the
chunks of a state, which on a bent surface averages directions). It is asked for when a chunk is tried, and kept with
the row. `damping` of the identity is added: a direction in which nothing is known is no free one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from action_diffusion.policy.extensions.extension import Fitted
from action_diffusion.policy.extensions.stored import arrays, executed
from action_diffusion.policy.extensions.transport import transported
from action_diffusion.policy.planning.restart import step_at
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.value.networks import Displacement
from action_diffusion.training.reward.actor_critic import ActorCritic
from action_diffusion.training.reward.critics import step
from action_diffusion.training.reward.experience import Acted
from action_diffusion.training.reward.transitions import Rows


class Fisher(ActorCritic):
    """metric: "fisher", or "euclidean": F is the identity. divergence: ε. noise: b, between 0 and 1: how far around a
    chunk the policy is asked. bound: of δ, normalised. damping: of F. The others are as of `ActorCritic`.

    Raises `InputError` where no step of the sampler begins with so little noise.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        *,
        seed: int = 0,
        metric: str = "fisher",
        divergence: float = 0.02,
        scores: int = 8,
        noise: float = 0.2,
        bound: float = 0.5,
        damping: float = 0.01,
        **critics: Any,
    ) -> None:
        super().__init__(policy, seed=seed, **critics)
        self.level = step_at(policy.sampler.steps, noise)
        self.map = Displacement(action_dim=self.action_dim, bound=bound, **self.sizes).to(self.device)
        self.multiplier = torch.nn.ParameterDict({"log": torch.zeros((), device=self.device)})
        self.modules |= {"map": self.map, "multiplier": self.multiplier}
        self.optimizers |= {
            "map": torch.optim.Adam(self.map.parameters(), lr=self.lr),
            "multiplier": torch.optim.Adam(self.multiplier.parameters(), lr=10 * self.lr),
        }
        self.metric, self.divergence, self.scores, self.damping = metric, divergence, scores, damping

    @torch.no_grad()
    def act(self, obs: Mapping[str, np.ndarray]) -> Acted:
        tensors = self.tensors(obs)
        seen = self.policy.see(tensors)
        condition = seen.condition.float()
        generator = torch.Generator(self.device).manual_seed(int(torch.randint(2**62, (1,), generator=self.random)))
        noise = self.normal(len(condition), *self.shape)
        drawn = self.policy.sample(tensors, noise=noise, generator=generator).normalized
        moved = transported(self.policy, self.map, condition, drawn)
        remembered = {
            "condition": condition,
            "base": executed(self.policy, drawn),
            "action": executed(self.policy, moved),
            "scores": self._around(condition, drawn),
        }
        return Acted(self.policy.unnormalize_action(moved, seen.obs).float().cpu().numpy(), remembered)

    def _around(self, condition: Tensor, chunk: Tensor) -> Tensor:
        """Scores of the policy around chunks [B, H, A], normalised: [B, scores, Ta · A]."""
        condition, chunk = (part.repeat_interleave(self.scores, dim=0) for part in (condition, chunk))
        x = self.level.a * chunk + self.level.b * self.normal(*chunk.shape)
        found = executed(self.policy, score(self.policy, condition, x, self.level.index))
        return found.view(-1, self.scores, self.action_dim)

    @torch.no_grad()
    def acted(self, rows: Rows) -> Tensor:
        moved: Tensor = rows["base"] + self.map(rows["condition"], rows["base"])
        return moved

    def improve(self, rows: Rows) -> dict[str, float]:
        condition, base = rows["condition"], rows["base"]
        moved = self.map(condition, base)
        earned = self.critic(condition, base + moved).amin(0)
        if self.metric == "fisher":
            change = fisher_quadratic(moved, rows["scores"], self.damping).mean()
        else:
            change = moved.square().mean()
        price = self.multiplier["log"].exp()
        loss = -(earned.mean() - price.detach() * change) / (1.0 + price.detach())
        step(self.optimizers["map"], loss, self.map.parameters())
        over = change.detach() / self.divergence - 1.0
        step(self.optimizers["multiplier"], -self.multiplier["log"] * over, self.multiplier.parameters())
        return {
            "divergence": float(change.detach()),
            "moved": float(moved.detach().square().mean().sqrt()),
            "price": float(price.detach()),
        }

    def fitted(self) -> dict[str, Fitted]:
        options = {"bound": self.map.bound, "octaves": self.map.octaves, "hidden": list(self.sizes["hidden"])}
        return {"transport": Fitted(options, arrays(map=self.map))}


def score(policy: DiffusionPolicy, condition: Tensor, x: Tensor, index: int) -> Tensor:
    """∇ log p of noisy chunks x [B, H, A] at a step of the policy's sampler: (a x̂0 − x) / b²."""
    at = policy.sampler.steps[index]
    film = policy.denoiser.prepare(condition, policy.sampler.times(x.device))
    prefix = policy._prefix(None, x, 1)
    output = policy.denoiser(x if prefix is None else prefix.mark(x), film.at(index, None))
    return (at.a * policy.process.x0_from_output(output, x, at) - x) / at.b**2


def fisher_quadratic(moved: Tensor, scores: Tensor, damping: float) -> Tensor:
    """δᵀ F δ / D, [B], for displacements [B, D] and the scores [B, m, D] that F is made of; F + damping has a trace of
    D (1 + damping), so that it is the mean square of δ where no direction differs from others."""
    along = torch.einsum("bmd,bd->bm", scores, moved).square().mean(dim=1)
    trace = scores.square().sum(dim=2).mean(dim=1).clamp_min(torch.finfo(scores.dtype).tiny)
    return along / trace + damping * moved.square().mean(dim=1)


__all__ = ["Fisher", "fisher_quadratic", "score"]
