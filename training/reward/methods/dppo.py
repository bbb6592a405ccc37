"""DPPO: the denoising steps themselves are trained by policy gradients (Ren et al. 2025, "Diffusion Policy Policy
Optimization"), over two times at once: chunk after chunk in the simulator, step after step in each chunk.

    p(c_{k+1} | x_k, s) = N(of the mean of the scheduler's step, σ²)              ratio  r_k = p_new / p_old
    loss                = −E min(r_k γ_d^{K−1−k} A,  clip(r_k, 1 ± ε_k) γ_d^{K−1−k} A)

A is the advantage of the chunk, by GAE (Schulman et al. 2016) on a value of the condition; γ_d discounts noisy steps,
and ε_k grows from a tenth of `clip` at the noisiest step to `clip` at the last one, since there a change shows in what
is executed. Only the last `trained` of the sampler's steps are noisy and trained; the earlier ones go without noise,
with the same network (decided here: the paper keeps a frozen copy for them, which a bundle of one network cannot hold).
The encoder stays as it is. Where nothing after a chunk counts, and its steps count alike, this is DDPO (Black et al.
2024): `trials.gamma=0.5 method.gae=0 method.denoising_discount=1`, as near as makes no difference over eight steps.

What is tried (decided here; the paper adds independent noise to every number, at least 0.1 of it):

- c are the first `frequencies` of what is executed: `Coherent`. A finger, or an arm, hardly follows noise that changes
  with every step, so noise in few slow movements does as much with less, and fewer numbers are credited with what came
  of it. All frequencies are white noise again.
- σ follows the policy: `own` times the spread of what it does itself, over one look at the first observations that it
  meets, and at least `floor`. One that always does the same is lost where another one only begins to look around.
- The sampler draws no noise of its own: what is evaluated is what was learnt, less σ.

An update learns from the chunks since the last one, several times over, and stops where the policy has moved further
than `most_kl`. The rate of learning follows: a third less after an update that was stopped, half as much again after
one that moved by less than a quarter of it. Before the first updates, of `warmup`, only the value learns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from action_diffusion.errors import InputError
from action_diffusion.policy.diffusion.sampler import Hook, StepState
from action_diffusion.policy.extensions.stored import condition_dim
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.value.networks import Value
from action_diffusion.policy.value.noise import cosine_basis
from action_diffusion.training.reward.critics import step
from action_diffusion.training.reward.experience import Acted
from action_diffusion.training.reward.policy_gradient import OnPolicy, advantages, standardised, surrogate
from action_diffusion.training.reward.transitions import Rows

LOOKS = 16
"""Chunks of one observation that say how far the policy itself spreads."""
SLOWER, FASTER, LITTLE = 1 / 1.5, 1.5, 0.25
"""What the rate of learning is multiplied by, and the share of `most_kl` that is little."""


class Coherent:
    """The first F frequencies of what is executed of chunks [.., H, A], so that numbers of standard deviation σ move it
    by σ in the root mean square. Before and after it, a movement goes on as at its first and at its last step."""

    def __init__(self, *, horizon: int, now: int, steps: int, frequencies: int) -> None:
        with torch.device("cpu"):
            self.basis = cosine_basis(steps)[:frequencies] * (steps / frequencies) ** 0.5
            self.nearest = (torch.arange(horizon) - now).clamp(0, steps - 1)
        self.executed, self.share = slice(now, now + steps), frequencies / steps

    def put(self, coefficients: Tensor) -> Tensor:
        """[B, F, A] → movements [B, H, A]."""
        return torch.einsum("fh,bfa->bha", self.basis[:, self.nearest].to(coefficients), coefficients)

    def of(self, movement: Tensor) -> Tensor:
        """Movements [B, H, A] → their coefficients [B, F, A]."""
        return self.share * torch.einsum("fh,bha->bfa", self.basis.to(movement), movement[:, self.executed])


class Explore(Hook):
    """Moves what the steps from `first` on give, by `deviation`, and remembers what each of them began with and gave.

    before, after: [K', B, H, A].
    """

    def __init__(self, first: int, deviation: float, coherent: Coherent, generator: torch.Generator) -> None:
        self.first, self.deviation, self.coherent, self.generator = first, deviation, coherent, generator
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []

    def after_step(self, state: StepState, x_next: Tensor) -> Tensor:
        if state.k < self.first:
            return x_next
        shape = (len(x_next), len(self.coherent.basis), x_next.shape[2])
        z = torch.randn(shape, generator=self.generator).to(x_next)
        moved = x_next + self.deviation * self.coherent.put(z)
        self.before.append(state.x)
        self.after.append(moved)
        return moved


class Pace(nn.Module):
    """What a run found out about itself, for its checkpoints: deviation, σ of what is tried (0: not known yet); lr, the
    rate of learning now; updates, how many there were."""

    deviation: Tensor
    lr: Tensor
    updates: Tensor

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.register_buffer("deviation", torch.zeros(()))
        self.register_buffer("lr", torch.tensor(lr))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))


class Dppo(OnPolicy):
    """chunks: from one update to the next. trained: K', the last steps that are noisy and trained; None: all.
    frequencies: F, at most the executed steps. own: times the policy's spread; floor: least deviation, normalised.
    clip: ε. denoising_discount: γ_d. gae: λ. epochs: times that an update goes over its chunks. lr: of the denoiser, at
    first; critic_lr: of the value. most_kl: where an update stops early. warmup: updates of the value alone.

    Raises `InputError` for a sampler that looks at more than its last estimate, or draws noise in its steps.
    """

    deterministic = True
    trains_policy = True

    def __init__(
        self,
        policy: DiffusionPolicy,
        *,
        seed: int = 0,
        chunks: int = 1024,
        trained: int | None = 1,
        frequencies: int = 3,
        own: float = 1.0,
        floor: float = 0.015,
        clip: float = 0.2,
        denoising_discount: float = 0.95,
        gae: float = 0.95,
        epochs: int = 4,
        batch_size: int = 256,
        lr: float = 2e-6,
        critic_lr: float = 1e-3,
        most_kl: float = 0.05,
        warmup: int = 1,
        hidden: Sequence[int] = (256, 256),
        octaves: int = 4,
    ) -> None:
        super().__init__(policy, seed=seed, chunks=chunks)
        solver, sampler = policy.sampler.solver, policy.sampler
        if solver.memory > 1 or not sampler.deterministic or solver.start == 0.0:
            raise InputError(
                f"method=dppo needs steps that begin at noise, draw none, and look at their last estimate only, and "
                f"scheduler={sampler.scheduler} has others: give sampler.scheduler=ddim (eta=0) or flow"
            )
        total = len(solver.steps)
        self.n_trained = total if trained is None else trained
        if not 1 <= self.n_trained <= total:
            raise InputError(f"method.trained={trained} must be between 1 and the sampler's {total} steps")
        self.first = total - self.n_trained
        self.shape = (self.spec.horizon, *self.spec.action.shape)
        self.coherent = Coherent(
            horizon=self.spec.horizon,
            now=self.spec.n_obs_steps - 1,
            steps=self.spec.n_action_steps,
            frequencies=min(frequencies, self.spec.n_action_steps),
        )
        torch.manual_seed(seed)
        dim = condition_dim(policy)
        self.value = Value(condition_dim=dim, hidden=hidden, octaves=octaves, members=1).to(self.device)
        self.pace = Pace(lr).to(self.device)
        policy.denoiser.requires_grad_(True)
        self.parameters = list(policy.denoiser.parameters())
        self.modules = {"denoiser": policy.denoiser, "value": self.value, "pace": self.pace}
        self.optimizers = {
            "denoiser": torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0),
            "value": torch.optim.Adam(self.value.parameters(), lr=critic_lr),
        }
        self.own, self.floor, self.gae, self.epochs, self.batch_size = own, floor, gae, epochs, batch_size
        self.most_kl, self.warmup = most_kl, warmup
        depth = torch.arange(self.n_trained - 1, -1, -1, device=self.device)
        self.weights = denoising_discount ** depth.float()
        self.clips = clip * 0.1 ** (depth.float() / max(1, self.n_trained - 1))

    @torch.no_grad()
    def act(self, obs: Mapping[str, np.ndarray]) -> Acted:
        tensors = self.tensors(obs)
        condition = self.policy.see(tensors).condition.float()
        if not self.pace.deviation:
            self.pace.deviation.fill_(max(self.floor, self.own * self._spread(tensors, len(condition))))
        explore = Explore(self.first, float(self.pace.deviation), self.coherent, self.random)
        sample = self.policy.sample(tensors, noise=self.normal(len(condition), *self.shape), hooks=[explore])
        before, after = torch.stack(explore.before, dim=1), torch.stack(explore.after, dim=1)
        remembered = {"condition": condition, "before": before, "after": after}
        return Acted(sample.action.float().cpu().numpy(), remembered)

    def _spread(self, obs: Mapping[str, Tensor], n: int) -> float:
        """How far what the policy does itself varies for one observation, in coefficients: a median over n of them."""
        looked = self.policy.sample(obs, noise=self.normal(n * LOOKS, *self.shape), n_samples=LOOKS).normalized
        found = self.coherent.of(looked.flatten(0, 1)).reshape(n, LOOKS, -1)
        return float(found.var(dim=1).mean(dim=1).sqrt().median())

    def update(self, rows: Rows) -> dict[str, float]:
        condition, count = rows["condition"], len(rows["reward"])
        with torch.no_grad():
            value, following = self.value(condition)[0], self.value(rows["next_condition"])[0]
            error = rows["reward"] + rows["discount"] * following - value
            advantage = advantages(error, rows["discount"] * self.gae, rows["simulator"], rows["time"])
            returned = advantage + value
            old = torch.cat([self._log_density(rows, part) for part in torch.arange(count).split(self.batch_size)])
        standard = standardised(advantage)
        stopped, kl = int(self.pace.updates) < self.warmup, 0.0
        for group in self.optimizers["denoiser"].param_groups:
            group["lr"] = float(self.pace.lr)
        for _ in range(self.epochs):
            for part in torch.randperm(count, generator=self.random).split(self.batch_size):
                value_loss = (self.value(condition[part])[0] - returned[part]).square().mean()
                step(self.optimizers["value"], value_loss, self.value.parameters())
                if stopped:
                    continue
                change = self._log_density(rows, part) - old[part]
                kl = float((change.exp() - 1 - change).mean().detach())
                stopped = kl > self.most_kl
                if not stopped:
                    loss = surrogate(change.exp(), standard[part], self.weights, self.clips)
                    step(self.optimizers["denoiser"], loss, self.parameters, most=1.0)
        if int(self.pace.updates) >= self.warmup:
            self.pace.lr *= SLOWER if stopped else FASTER if kl < LITTLE * self.most_kl else 1.0
        self.pace.updates += 1
        numbers = {"value": float(value.mean()), "value_loss": float(value_loss.detach()), "kl": kl}
        return numbers | {name: float(getattr(self.pace, name)) for name in ("deviation", "lr")}

    def _log_density(self, rows: Rows, part: Tensor) -> Tensor:
        """log p of each trained step of some rows, up to a constant, [n, K']."""
        policy, sampler = self.policy, self.policy.sampler
        film = policy.denoiser.prepare(rows["condition"][part], sampler.times(self.device))
        densities = []
        for index, at in enumerate(sampler.steps[self.first :]):
            x, after = rows["before"][part, index], rows["after"][part, index]
            prefix = policy._prefix(None, x, 1)
            output = policy.denoiser(x if prefix is None else prefix.mark(x), film.at(at.index, None))
            off = self.coherent.of(after - sampler.mean(output, x, at)) / self.pace.deviation
            densities.append(-off.square().flatten(1).sum(dim=1) / 2)
        return torch.stack(densities, dim=1)
