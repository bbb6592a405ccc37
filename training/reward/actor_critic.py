"""What methods share that learn critics of chunks: the rows, the critics, and when they learn.

    critic     Q(s, a)  ←  r + γⁿ V(s'),   a what was tried
    value      V(s)     ←  of min Q'(s, a): each method says of which a

`ActorCritic` is for policies that go where the critic says: V is the mean of what the policy would do now, and
`improve` moves the policy, once for each update of the critics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from action_diffusion.policy.extensions.stored import condition_dim
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.value.averages import averaged_copy, follow
from action_diffusion.policy.value.networks import Value
from action_diffusion.training.reward.critics import step
from action_diffusion.training.reward.method import Method
from action_diffusion.training.reward.optimizers import OPTIMIZERS
from action_diffusion.training.reward.transitions import Rows


class CriticMethod(Method):
    """Its options are those of `options.finetune.Critics`."""

    def __init__(
        self,
        policy: DiffusionPolicy,
        *,
        seed: int = 0,
        hidden: Sequence[int] = (256, 256),
        octaves: int = 4,
        members: int = 2,
        updates: float = 1.0,
        batch_size: int = 128,
        lr: float = 3e-4,
        follow: float = 0.005,
        warmup: int = 500,
        capacity: int = 200_000,
        optimizer: str = "adam",
    ) -> None:
        super().__init__(policy, seed=seed, capacity=capacity)
        self.shape = self.spec.noise_shape
        self.action_dim = self.spec.n_action_steps * self.spec.noise_shape[1]
        self.sizes: dict[str, Any] = {"condition_dim": condition_dim(policy), "hidden": hidden, "octaves": octaves}
        torch.manual_seed(seed)
        self.critic = Value(action_dim=self.action_dim, members=members, **self.sizes).to(self.device)
        self.target = averaged_copy(self.critic)
        self.value = Value(members=1, **self.sizes).to(self.device)
        self.modules = {"critic": self.critic, "target": self.target, "value": self.value}
        self.parameters = [*self.critic.parameters(), *self.value.parameters()]
        self.optimizers = {"critics": OPTIMIZERS[optimizer](self.parameters, lr=lr)}
        self.updates, self.batch_size, self.share, self.warmup, self.lr = updates, batch_size, follow, warmup, lr
        self.hidden, self.members = list(hidden), members
        self._owed = 0.0

    @property
    def learning(self) -> bool:
        """Whether there are rows enough."""
        return len(self.rows) >= self.warmup

    def learn(self, rows: Rows) -> dict[str, float]:
        if rows:
            self.rows.add(rows)
        if not self.learning or not rows:
            return {}
        self._owed += self.updates * len(rows["reward"])
        numbers: dict[str, float] = {}
        while self._owed >= 1:
            numbers = self.update(self.rows.sample(self.batch_size, self.random))
            self._owed -= 1
        return numbers

    def learn_also(self, module: torch.nn.Module) -> None:
        """Let the critics' optimizer learn this one too."""
        more = list(module.parameters())
        self.parameters += more
        self.optimizers["critics"].add_param_group({"params": more})

    def update(self, rows: Rows) -> dict[str, float]:
        """One step of all networks, of rows [B]; numbers for the curves."""
        raise NotImplementedError


class ActorCritic(CriticMethod):
    """Rows hold "action" [B, Ta · A]: what was tried."""

    def acted(self, rows: Rows) -> Tensor:
        """What the policy would do now in the conditions of rows: [B, Ta · A], normalised, without gradients."""
        raise NotImplementedError

    def improve(self, rows: Rows) -> dict[str, float]:
        """One step of the policy; numbers for the curves."""
        raise NotImplementedError

    def update(self, rows: Rows) -> dict[str, float]:
        return self._learn_critics(rows) | self.improve(rows)

    def _learn_critics(self, rows: Rows) -> dict[str, float]:
        condition = rows["condition"]
        with torch.no_grad():
            now = self.target(condition, self.acted(rows)).amin(0)
            aim = rows["reward"] + rows["discount"] * self.value(rows["next_condition"])[0]
        said = self.critic(condition, rows["action"])
        critic_loss = (said - aim).square().mean()
        value_loss = (self.value(condition)[0] - now).square().mean()
        step(self.optimizers["critics"], critic_loss + value_loss, self.parameters)
        follow(self.target, self.critic, self.share)
        return {"critic_loss": float(critic_loss.detach()), "value": float(said.detach().mean())}
