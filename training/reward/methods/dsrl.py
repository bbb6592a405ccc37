"""DSRL: a frozen policy is steered by the noise that its chunks begin with (Wagenmaker et al. 2025, "Steering Your
Diffusion Policy with Latent Space Reinforcement Learning").

With a sampler that draws nothing in its steps, a chunk is a function a = π(s, w) of the initial noise. So noise is the
action of another problem, which soft actor-critic learns (Haarnoja et al. 2018), w in [−b, b]:

    critic of actions    Q(s, a)    ←  r + γⁿ · (min Q'_w(s', w') − α log p(w' | s')),     w' ~ actor(s')
    critic of noise      Q_w(s, w)  ←  min Q(s, π(s, w)),      of what was tried, and of other noises of the same state
    actor                max E[min Q_w(s, w) − α log p(w | s)],   α so that the entropy stays at its target

The critic of actions can learn from chunks that came of no known noise, the critic of noise needs none to have been
executed: `decoded` noises a state are denoised when it is visited, in one batch with the one that is tried, and kept
with the row (decided here: the paper denoises in every update, which costs as much as all the rest many times over; and
the target of Q is read off the critic of noise, for the same reason).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from action_diffusion.errors import InputError
from action_diffusion.policy.extensions.extension import Fitted
from action_diffusion.policy.extensions.stored import arrays, condition_dim, executed
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.value.networks import NoiseActor, Value
from action_diffusion.training.reward.critics import averaged_copy, follow, step
from action_diffusion.training.reward.experience import Acted
from action_diffusion.training.reward.method import Method
from action_diffusion.training.reward.transitions import Rows


class Dsrl(Method):
    """bound: b. decoded: other noises that are denoised for each state. hidden: layers of all networks. members: of
    each ensemble. updates: of all networks for each chunk that was tried. warmup: chunks from plain noise before the
    first update. follow: share that the target moves by. entropy: the target, per number of the noise, beside that of a
    standard normal one; None: no entropy is asked for. capacity: rows that are kept.

    Raises `InputError` for a policy whose sampler draws noise in its steps, or does not look at where it begins.
    """

    deterministic = True

    def __init__(
        self,
        policy: DiffusionPolicy,
        *,
        seed: int = 0,
        bound: float = 1.5,
        decoded: int = 4,
        hidden: Sequence[int] = (256, 256),
        members: int = 2,
        updates: float = 1.0,
        batch_size: int = 256,
        lr: float = 3e-4,
        warmup: int = 500,
        follow: float = 0.005,
        entropy: float = -1.0,
        capacity: int = 200_000,
    ) -> None:
        super().__init__(policy, seed=seed, capacity=capacity)
        if not policy.sampler.deterministic:
            raise InputError(
                "method=dsrl steers by the noise that chunks begin with, and this policy's sampler draws more in its "
                "steps: give sampler.scheduler=ddim (eta=0), dpm_solver++ or flow"
            )
        if policy.sampler.solver.start == 0.0:
            raise InputError(
                f"method=dsrl steers by the noise that chunks begin with, and scheduler={policy.sampler.scheduler} "
                "begins with none: take method=idql"
            )
        spec = self.spec
        self.shape = (spec.horizon, *spec.action.shape)
        noise_dim, action_dim = spec.horizon * spec.action.shape[0], spec.n_action_steps * spec.action.shape[0]
        dim = condition_dim(policy)
        torch.manual_seed(seed)
        self.critic = Value(input_dim=dim + action_dim, hidden=hidden, members=members).to(self.device)
        self.noise_critic = Value(input_dim=dim + noise_dim, hidden=hidden, members=members).to(self.device)
        self.noise_target = averaged_copy(self.noise_critic)
        self.actor = NoiseActor(condition_dim=dim, noise_dim=noise_dim, bound=bound, hidden=hidden).to(self.device)
        self.temperature = torch.nn.ParameterDict({"log_alpha": torch.tensor(-5.0, device=self.device)})
        self.entropy = entropy * noise_dim
        self.bound, self.decoded, self.hidden, self.warmup = bound, decoded, list(hidden), warmup
        self.updates, self.batch_size, self.share = updates, batch_size, follow
        self.critic_optimizer = torch.optim.Adam([*self.critic.parameters(), *self.noise_critic.parameters()], lr=lr)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=lr)
        self.alpha_optimizer = torch.optim.Adam([self.temperature["log_alpha"]], lr=10 * lr)
        self.modules = {
            "critic": self.critic,
            "noise_critic": self.noise_critic,
            "noise_target": self.noise_target,
            "actor": self.actor,
            "temperature": self.temperature,
        }
        self.optimizers = {
            "critic": self.critic_optimizer,
            "actor": self.actor_optimizer,
            "temperature": self.alpha_optimizer,
        }
        self._owed = 0.0

    @property
    def learning(self) -> bool:
        return len(self.rows) >= self.warmup

    @torch.no_grad()
    def act(self, obs: Mapping[str, np.ndarray]) -> Acted:
        tensors = self.tensors(obs)
        seen = self.policy.see(tensors)
        condition = seen.condition.float()
        b, k = len(condition), self.decoded
        others = self.normal(b, k, *self.shape).clamp(-self.bound, self.bound)
        if self.learning:
            tried = self.actor.draw(condition)[0].view(b, 1, *self.shape)
            half = self.actor.draw(condition.repeat_interleave(k // 2, dim=0))[0].view(b, k // 2, *self.shape)
            others = torch.cat([half, others[:, k // 2 :]], dim=1)
        else:
            tried = self.normal(b, 1, *self.shape).clamp(-self.bound, self.bound)
        noise = torch.cat([tried, others], dim=1)
        sample = self.policy.sample(tensors, noise=noise.flatten(0, 1), n_samples=k + 1)
        action = executed(self.policy, sample.normalized.flatten(0, 1)).unflatten(0, (b, k + 1))
        remembered = {"condition": condition, "noise": noise.flatten(2), "action": action}
        return Acted(sample.action[:, 0].float().cpu().numpy(), remembered)

    def learn(self, rows: Rows) -> dict[str, float]:
        if rows:
            self.rows.add(rows)
        if not self.learning or not rows:
            return {}
        self._owed += self.updates * len(rows["reward"])
        numbers: dict[str, float] = {}
        while self._owed >= 1:
            numbers = self._update(self.rows.sample(self.batch_size, self.random))
            self._owed -= 1
        return numbers

    def _update(self, rows: Rows) -> dict[str, float]:
        alpha = self.temperature["log_alpha"].exp().detach()
        condition, action = rows["condition"], rows["action"]
        with torch.no_grad():
            noise, log_density = self.actor.draw(rows["next_condition"])
            following = self.noise_target(rows["next_condition"], noise).amin(0) - alpha * log_density
            target = rows["reward"] + rows["discount"] * following
        said = self.critic(condition, action[:, 0])
        loss = (said - target).square().mean()
        which = torch.randint(action.shape[1], (len(action), 1, 1), generator=self.random).to(self.device)
        with torch.no_grad():
            taught = self.critic(condition, action.take_along_dim(which, dim=1)[:, 0]).amin(0)
        noise_said = self.noise_critic(condition, rows["noise"].take_along_dim(which, dim=1)[:, 0])
        distilled = (noise_said - taught).square().mean()
        step(self.critic_optimizer, loss + distilled, [*self.critic.parameters(), *self.noise_critic.parameters()])
        follow(self.noise_target, self.noise_critic, self.share)
        noise, log_density = self.actor.draw(condition)
        value = self.noise_critic(condition, noise).amin(0)
        step(self.actor_optimizer, (alpha * log_density - value).mean(), self.actor.parameters())
        entropy = -log_density.detach().mean()
        step(
            self.alpha_optimizer,
            self.temperature["log_alpha"] * (entropy - self.entropy),
            [self.temperature["log_alpha"]],
        )
        return {
            "critic_loss": float(loss.detach()),
            "distilled_loss": float(distilled.detach()),
            "value": float(said.detach().mean()),
            "alpha": float(alpha),
            "entropy": float(entropy),
        }

    def fitted(self) -> dict[str, Fitted]:
        return {"steering": Fitted({"bound": self.bound, "hidden": self.hidden}, arrays(actor=self.actor))}
