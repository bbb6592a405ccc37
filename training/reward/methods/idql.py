"""IDQL: the policy stays as it is, a critic chooses among its chunks (Hansen-Estruch et al. 2023, "IDQL: Implicit
Q-Learning as an Actor-Critic Method with Diffusion Policies"), with FASTER's noise critic where it is asked for.

Implicit Q-learning (Kostrikov et al. 2022) on chunks, which never asks what an action that nobody tried is worth:

    value      V(s)     ←  the expectile τ of  min Q'(s, a),   a tried
    critic     Q(s, a)  ←  r + γⁿ V(s')
    noise      Q_w(s, w) ← min Q(s, π(s, w)),   with `drawn` (FASTER), of all chunks that were made

While it learns, `tried` chunks are made and the critic's best of them is tried, so that what is learnt from stays near
the policy and gets better with the critic. Afterwards `best_of` chooses among n, and each of `drawn` noises is judged
before it is denoised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from action_diffusion.errors import InputError
from action_diffusion.policy.extensions.extension import Fitted
from action_diffusion.policy.extensions.stored import arrays, executed
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.value.averages import follow
from action_diffusion.policy.value.networks import Value
from action_diffusion.training.reward.actor_critic import CriticMethod
from action_diffusion.training.reward.critics import expectile_loss, step
from action_diffusion.training.reward.experience import Acted
from action_diffusion.training.reward.transitions import Rows


class Idql(CriticMethod):
    """n: candidates of the bundle. tried: of which one is tried, while learning. expectile: τ. drawn: noises that the n
    are chosen from before they are denoised; 0: none. The others are as of `CriticMethod`.

    Raises `InputError` for `drawn` with a sampler that draws noise in its steps.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        *,
        seed: int = 0,
        n: int = 16,
        tried: int = 4,
        expectile: float = 0.7,
        drawn: int = 0,
        **critics: Any,
    ) -> None:
        super().__init__(policy, seed=seed, **critics)
        if drawn and not policy.sampler.deterministic:
            raise InputError(
                f"method.drawn={drawn}: noises are judged before they are denoised, which needs a sampler that draws "
                "none in its steps: sampler.scheduler=ddim with sampler.eta=0, dpm_solver++ or flow"
            )
        noise_dim = self.spec.horizon * self.spec.noise_shape[1]
        self.noise_critic = Value(action_dim=noise_dim, members=self.members, **self.sizes).to(self.device)
        self.modules["noise_critic"] = self.noise_critic
        if drawn:
            self.learn_also(self.noise_critic)
        self.n, self.tried, self.expectile, self.drawn = n, tried, expectile, drawn

    @torch.no_grad()
    def act(self, obs: Mapping[str, np.ndarray]) -> Acted:
        tensors, k = self.tensors(obs), self.tried
        condition = self.policy.see(tensors).condition.float()
        rows = len(condition)
        noise = self.normal(rows * k, *self.shape)
        generator = torch.Generator(self.device).manual_seed(int(torch.randint(2**62, (1,), generator=self.random)))
        sample = self.policy.sample(tensors, noise=noise, n_samples=k, generator=generator)
        chunks, normalized = (part.view(rows, k, *self.shape) for part in (sample.action, sample.normalized))
        action = executed(self.policy, normalized.flatten(0, 1)).unflatten(0, (rows, k))
        best = torch.zeros(rows, dtype=torch.long, device=self.device)
        if self.learning:
            said = self.critic(condition.repeat_interleave(k, dim=0), action.flatten(0, 1)).amin(0)
            best = said.view(rows, k).argmax(dim=1)
        first = (torch.arange(k, device=self.device) + best.unsqueeze(1)) % k  # the one that is tried comes first
        place = torch.arange(rows, device=self.device).unsqueeze(1)
        remembered = {
            "condition": condition,
            "noise": noise.view(rows, k, -1)[place, first],
            "action": action[place, first],
        }
        return Acted(chunks[place[:, 0], best].float().cpu().numpy(), remembered)

    def update(self, rows: Rows) -> dict[str, float]:
        condition, action = rows["condition"], rows["action"]
        with torch.no_grad():
            known = self.target(condition, action[:, 0]).amin(0)
            target = rows["reward"] + rows["discount"] * self.value(rows["next_condition"])[0]
        value_loss = expectile_loss(known - self.value(condition)[0], self.expectile)
        said = self.critic(condition, action[:, 0])
        critic_loss = (said - target).square().mean()
        loss = value_loss + critic_loss
        if self.drawn:
            which = torch.randint(action.shape[1], (len(action), 1, 1), generator=self.random).to(self.device)
            with torch.no_grad():
                taught = self.critic(condition, action.take_along_dim(which, dim=1)[:, 0]).amin(0)
            noise = rows["noise"].take_along_dim(which, dim=1)[:, 0]
            loss = loss + (self.noise_critic(condition, noise) - taught).square().mean()
        step(self.optimizers["critics"], loss, self.parameters)
        follow(self.target, self.critic, self.share)
        return {
            "critic_loss": float(critic_loss.detach()),
            "value_loss": float(value_loss.detach()),
            "value": float(said.detach().mean()),
        }

    def fitted(self) -> dict[str, Fitted]:
        options: dict[str, Any] = {"n": self.n, "drawn": self.drawn, "octaves": self.critic.octaves}
        options |= {"hidden": self.hidden, "members": self.members}
        modules = {"critic": self.critic} | ({"noise_critic": self.noise_critic} if self.drawn else {})
        return {"best_of": Fitted(options, arrays(**modules))}
