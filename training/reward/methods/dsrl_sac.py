"""DSRL by soft actor-critic: a frozen policy is steered by the noise that its chunks begin with (Wagenmaker et al.
2025, "Steering Your Diffusion Policy with Latent Space Reinforcement Learning").

With a sampler that draws nothing in its steps, a chunk is a function a = π(s, w) of the initial noise. So noise is the
action of another problem, and what is learnt cannot leave what the policy knows (w: its first frequencies):

    critic of actions    Q(s, a)    ←  r + γⁿ V(s')
    value                V(s)       ←  the expectile τ of min Q'(s, π(s, w)),     w of the actor, and of plain noise
    critic of noise      A(s, w)    ←  min Q(s, π(s, w)) less its mean over the noises of this state, over its spread
    actor                max E[A(s, w) − α log p(w | s)],   α so that the entropy stays at its target (Haarnoja et al.
                         2018)

`decoded` noises of each state are denoised when it is visited, in one batch with the one that is tried, and kept with
the row. Decided here: the paper denoises in every update, which costs as much as all the rest many times over. And its
critic of noise learns Q itself; of that nearly all is which state it is, and what a chunk makes of it drowns in the
error of the fit. So the value is one network, what noise adds is another one, and what noise adds is learnt centred.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from action_diffusion.policy.extensions.extension import Fitted
from action_diffusion.policy.extensions.stored import arrays, executed
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.value.averages import follow
from action_diffusion.policy.value.networks import Value
from action_diffusion.policy.value.noise import Frequencies, NoiseActor
from action_diffusion.training.reward.actor_critic import CriticMethod
from action_diffusion.training.reward.critics import expectile_loss, step
from action_diffusion.training.reward.experience import Acted
from action_diffusion.training.reward.method import require_steerable
from action_diffusion.training.reward.transitions import Rows


class DsrlSac(CriticMethod):
    """frequencies: of the noise that are chosen, see `policy.value.noise`. bound: of each coefficient. decoded: other
    noises that are denoised for each state, half of them the actor's. expectile: τ. entropy: of the actor, for each
    number of the noise. The others are as of `CriticMethod`.

    Raises `InputError` for a policy whose sampler draws noise in its steps, or does not look at where it begins.
    """

    deterministic = True

    def __init__(
        self,
        policy: DiffusionPolicy,
        *,
        seed: int = 0,
        frequencies: int = 2,
        bound: float = 3.0,
        decoded: int = 4,
        expectile: float = 0.7,
        entropy: float = 0.0,
        **critics: Any,
    ) -> None:
        super().__init__(policy, seed=seed, **critics)
        require_steerable(policy, "dsrl_sac")
        self.first = min(frequencies, self.spec.horizon)
        self.frequencies = Frequencies(self.spec.horizon, self.first)
        noise_dim = self.first * self.spec.noise_shape[1]
        self.noise_critic = Value(action_dim=noise_dim, members=2, **self.sizes).to(self.device)
        self.actor = NoiseActor(dim=noise_dim, bound=bound, **self.sizes).to(self.device)
        self.temperature = torch.nn.ParameterDict({"log_alpha": torch.tensor(-3.0, device=self.device)})
        self.modules |= {"noise_critic": self.noise_critic, "actor": self.actor, "temperature": self.temperature}
        self.learn_also(self.noise_critic)
        self.optimizers |= {
            "actor": torch.optim.Adam(self.actor.parameters(), lr=self.lr),
            "temperature": torch.optim.Adam(self.temperature.parameters(), lr=10 * self.lr),
        }
        self.entropy = entropy * noise_dim
        self.bound, self.decoded, self.expectile = bound, decoded, expectile

    @torch.no_grad()
    def act(self, obs: Mapping[str, np.ndarray]) -> Acted:
        tensors = self.tensors(obs)
        condition = self.policy.see(tensors).condition.float()
        b, k = len(condition), self.decoded + 1
        noise = self.normal(b, k, *self.shape)
        if self.learning:  # the first is tried; every second other one is the actor's as well
            own = (k + 1) // 2
            repeated, drawn = condition.repeat_interleave(own, dim=0), noise[:, :own].flatten(0, 1)
            coefficients, _ = self.actor.draw(repeated, self.frequencies.of(drawn))
            noise[:, :own] = self.frequencies.put(drawn, coefficients).view(b, own, *self.shape)
        sample = self.policy.sample(tensors, noise=noise.flatten(0, 1), n_samples=k)
        action = executed(self.policy, sample.normalized.reshape(b * k, *self.shape)).unflatten(0, (b, k))
        remembered = {
            "condition": condition,
            "noise": self.frequencies.of(noise.flatten(0, 1)).view(b, k, -1),
            "action": action,
        }
        return Acted(sample.action.view(b, k, *self.shape)[:, 0].float().cpu().numpy(), remembered)

    def update(self, rows: Rows) -> dict[str, float]:
        condition, action, count = rows["condition"], rows["action"], rows["action"].shape[1]
        repeated = condition.repeat_interleave(count, dim=0)
        with torch.no_grad():
            known = self.target(repeated, action.flatten(0, 1)).amin(0).view(-1, count)
            aim = rows["reward"] + rows["discount"] * self.value(rows["next_condition"])[0]
            centred = known - known.mean(dim=1, keepdim=True)
            spread = centred.std().clamp_min(1e-6)
        value_loss = expectile_loss(known - self.value(condition)[0].unsqueeze(1), self.expectile)
        said = self.critic(condition, action[:, 0])
        critic_loss = (said - aim).square().mean()
        added = self.noise_critic(repeated, rows["noise"].flatten(0, 1))
        noise_loss = (added - (centred / spread).flatten()).square().mean()
        step(self.optimizers["critics"], value_loss + critic_loss + noise_loss, self.parameters)
        follow(self.target, self.critic, self.share)

        alpha = self.temperature["log_alpha"].exp()
        noise, log_density = self.actor.draw(condition, self.normal(len(condition), rows["noise"].shape[2]))
        gain = self.noise_critic(condition, noise).amin(0)
        step(self.optimizers["actor"], (alpha.detach() * log_density - gain).mean(), self.actor.parameters())
        entropy = -log_density.detach().mean()
        step(self.optimizers["temperature"], alpha.log() * (entropy - self.entropy), self.temperature.parameters())
        return {
            "critic_loss": float(critic_loss.detach()),
            "noise_loss": float(noise_loss.detach()),
            "value": float(said.detach().mean()),
            "spread": float(spread),
            "alpha": float(alpha.detach()),
            "entropy": float(entropy),
        }

    def fitted(self) -> dict[str, Fitted]:
        options = {"frequencies": self.first, "bound": self.bound, "octaves": self.actor.octaves}
        return {"steering": Fitted({**options, "hidden": self.hidden}, arrays(actor=self.actor))}
