"""DSRL: a frozen policy is steered by the noise that its chunks begin with (Wagenmaker et al. 2025, "Steering Your
Diffusion Policy with Latent Space Reinforcement Learning").

With a sampler that draws nothing in its steps, a chunk is a function a = π(s, w) of the initial noise. So noise is the
action of another problem, and what is learnt cannot leave what the policy knows. Decided here:

- Of the noise the first `frequencies` are chosen, the rest is drawn as ever: `policy.value.noise`. Few numbers are
  learnt much sooner than all of them, and they do nearly all that noise does to a chunk.
- Where trials are cheap they are learnt from by clipped policy gradients (PPO, Schulman et al. 2017) in u, which w is a
  function of: each update begins with the policy as it is, and no error of a critic is ever followed.
  `method=dsrl_sac` is the paper's soft actor-critic, for trials that are few: on an arm, in slow simulators.

    actor    N(μ(s), σ(s)²) over u     ←  max E min(r A, clip(r, 1 ± clip) A),   r = p_new(u | s) / p_old(u | s)
    value    V(s)                      ←  r + γⁿ V(s') + what GAE adds
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from action_diffusion.policy.extensions.extension import Fitted
from action_diffusion.policy.extensions.stored import arrays, condition_dim
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.value.networks import Value
from action_diffusion.policy.value.noise import Frequencies, NoiseActor
from action_diffusion.training.reward.critics import step
from action_diffusion.training.reward.experience import Acted
from action_diffusion.training.reward.method import require_steerable
from action_diffusion.training.reward.policy_gradient import OnPolicy, advantages, standardised, surrogate
from action_diffusion.training.reward.transitions import Rows


class Dsrl(OnPolicy):
    """frequencies: F, at most those of a chunk. bound: of each coefficient. deviation: that
    coefficients begin with; those of plain noise have 1. chunks: from one update to the next. clip:
    of the ratio. gae: λ. epochs: times that an update goes over its chunks. most_kl: where it stops early. lr: of the
    actor; critic_lr: of the value. hidden, octaves: of both networks.

    Raises `InputError` for a policy whose sampler draws noise in its steps, or does not look at where it begins.
    """

    deterministic = True

    def __init__(
        self,
        policy: DiffusionPolicy,
        *,
        seed: int = 0,
        frequencies: int = 2,
        bound: float = 4.0,
        deviation: float = 2.0,
        chunks: int = 1024,
        clip: float = 0.2,
        gae: float = 0.95,
        epochs: int = 8,
        batch_size: int = 512,
        lr: float = 1e-3,
        critic_lr: float = 1e-3,
        most_kl: float = 0.1,
        hidden: Sequence[int] = (256, 256),
        octaves: int = 4,
    ) -> None:
        super().__init__(policy, seed=seed, chunks=chunks)
        require_steerable(policy, "dsrl")
        spec = self.spec
        self.shape = spec.noise_shape
        self.first = min(frequencies, spec.horizon)
        self.frequencies = Frequencies(spec.horizon, self.first)
        torch.manual_seed(seed)
        sizes: dict[str, Any] = {"condition_dim": condition_dim(policy), "hidden": hidden, "octaves": octaves}
        dim = self.first * spec.noise_shape[1]
        self.actor = NoiseActor(dim=dim, bound=bound, deviation=deviation, **sizes).to(self.device)
        self.value = Value(members=1, **sizes).to(self.device)
        self.modules = {"actor": self.actor, "value": self.value}
        self.optimizers = {
            "actor": torch.optim.Adam(self.actor.parameters(), lr=lr),
            "value": torch.optim.Adam(self.value.parameters(), lr=critic_lr),
        }
        self.clip, self.gae, self.epochs, self.batch_size, self.most_kl = clip, gae, epochs, batch_size, most_kl
        self.hidden = list(hidden)

    @torch.no_grad()
    def act(self, obs: Mapping[str, np.ndarray]) -> Acted:
        tensors = self.tensors(obs)
        condition = self.policy.see(tensors).condition.float()
        noise = self.normal(len(condition), *self.shape)
        mean, log_std = self.actor.moments(condition)
        before = mean + log_std.exp() * self.frequencies.of(noise)
        sample = self.policy.sample(tensors, noise=self.frequencies.put(noise, self.actor.squashed(before)))
        density = self._density(mean, log_std, before)
        remembered = {"condition": condition, "before": before, "density": density}
        return Acted(sample.action.float().cpu().numpy(), remembered)

    @staticmethod
    def _density(mean: Tensor, log_std: Tensor, before: Tensor) -> Tensor:
        """log p(u | s), [B]."""
        density: Tensor = torch.distributions.Normal(mean, log_std.exp()).log_prob(before).sum(dim=-1)
        return density

    def update(self, rows: Rows) -> dict[str, float]:
        condition = rows["condition"]
        with torch.no_grad():
            value, following = self.value(condition)[0], self.value(rows["next_condition"])[0]
            error = rows["reward"] + rows["discount"] * following - value
            advantage = advantages(error, rows["discount"] * self.gae, rows["simulator"], rows["time"])
            returned, standard = advantage + value, standardised(advantage)
        one, clips = standard.new_ones(1), standard.new_full((1,), self.clip)
        numbers, moved = {"value": float(value.mean())}, False
        for _ in range(self.epochs):
            for part in torch.randperm(len(condition), generator=self.random).split(self.batch_size):
                value_loss = (self.value(condition[part])[0] - returned[part]).square().mean()
                step(self.optimizers["value"], value_loss, self.value.parameters())
                mean, log_std = self.actor.moments(condition[part])
                change = self._density(mean, log_std, rows["before"][part]) - rows["density"][part]
                kl = float((change.exp() - 1 - change).mean().detach())
                moved = moved or kl > self.most_kl
                numbers |= {"kl": kl, "value_loss": float(value_loss.detach())}
                if not moved:
                    loss = surrogate(change.exp().unsqueeze(1), standard[part], one, clips)
                    step(self.optimizers["actor"], loss, self.actor.parameters(), most=0.5)
        return numbers | {"deviation": float(log_std.exp().mean().detach())}

    def fitted(self) -> dict[str, Fitted]:
        options = {"frequencies": self.first, "bound": self.actor.bound, "octaves": self.actor.octaves}
        return {"steering": Fitted({**options, "hidden": self.hidden}, arrays(actor=self.actor))}
