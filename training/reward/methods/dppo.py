"""DPPO: the denoising steps themselves are trained by policy gradients (Ren et al. 2025, "Diffusion Policy Policy
Optimization"), over two times at once: chunk after chunk in the simulator, step after step in each chunk.

    p(x_{k+1} | x_k, s) = N(mean of the scheduler's step, max(σ_k, floor)²)       ratio  r_k = p_new / p_old
    loss                = −E min(r_k γ_d^{K−1−k} A,  clip(r_k, 1 ± ε_k) γ_d^{K−1−k} A)

A is the advantage of the chunk, by GAE (Schulman et al. 2016) on a value of the condition; γ_d discounts noisy steps,
and ε_k grows from a tenth of `clip` at the noisiest step to `clip` at the last one, since there a change shows in what
is executed. Only the last `trained` of the sampler's steps are noisy and trained; the earlier ones go without noise,
with the same network (decided here: the paper keeps a frozen copy for them, which a bundle of one network cannot hold).
The encoder stays as it is. Where nothing after a chunk counts, and its steps count alike, this is DDPO (Black et al.
2024): `trials.gamma=0.5 method.gae=0 method.denoising_discount=1`, as near as makes no difference over eight steps.

An update learns from the chunks since the last one, several times over, and stops early where the policy has moved
further than `most_kl`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.diffusion.sampler import Hook, StepState
from action_diffusion.policy.extensions.stored import condition_dim, executed
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.value.networks import Value
from action_diffusion.training.reward.critics import step
from action_diffusion.training.reward.experience import Acted
from action_diffusion.training.reward.policy_gradient import OnPolicy, advantages, standardised, surrogate
from action_diffusion.training.reward.transitions import Rows


class Explore(Hook):
    """Makes the steps from `first` on noisy, with a standard deviation of at least `floor`, and remembers them.

    x, x_next: [K', B, H, A], what each of them began with and what it gave.
    """

    def __init__(self, first: int, floor: float, spreads: Sequence[float], generator: torch.Generator) -> None:
        self.first, self.floor, self.spreads, self.generator = first, floor, spreads, generator
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []

    def after_step(self, state: StepState, x_next: Tensor) -> Tensor:
        if state.k < self.first:
            return x_next
        more = max(self.floor**2 - self.spreads[state.k] ** 2, 0.0) ** 0.5  # what the scheduler drew is there already
        z = torch.randn(x_next.shape, generator=self.generator).to(x_next.device)
        noisy: Tensor = x_next + more * z
        self.before.append(state.x)
        self.after.append(noisy)
        return noisy


class Dppo(OnPolicy):
    """chunks: from one update to the next. trained: K', the last steps that are noisy and trained; None: all. floor:
    least standard deviation of a step, normalised. clip: ε. denoising_discount: γ_d. gae: λ. epochs: times that an
    update goes over its chunks. lr: of the denoiser; critic_lr: of the value. most_kl: where an update stops early.

    Raises `InputError` for a sampler that looks at more than its last estimate, or has no Gaussian steps.
    """

    trains_policy = True

    def __init__(
        self,
        policy: DiffusionPolicy,
        *,
        seed: int = 0,
        chunks: int = 1024,
        trained: int | None = None,
        floor: float = 0.03,
        clip: float = 0.1,
        denoising_discount: float = 0.95,
        gae: float = 0.95,
        epochs: int = 4,
        batch_size: int = 256,
        lr: float = 1e-5,
        critic_lr: float = 1e-3,
        most_kl: float = 0.02,
        hidden: Sequence[int] = (256, 256),
        octaves: int = 4,
    ) -> None:
        super().__init__(policy, seed=seed, chunks=chunks)
        solver = policy.sampler.solver
        if solver.memory > 1 or not solver.gaussian or solver.start == 0.0:
            raise InputError(
                f"method=dppo needs steps that are normal about a mean of their own, and scheduler="
                f"{policy.sampler.scheduler} has none: give sampler.scheduler=ddim, ddpm or flow"
            )
        total = len(solver.steps)
        self.n_trained = total if trained is None else trained
        if not 1 <= self.n_trained <= total:
            raise InputError(f"method.trained={trained} must be between 1 and the sampler's {total} steps")
        self.first = total - self.n_trained
        self.spreads = [move.spread for move in solver.moves]
        self.stds = [max(spread, floor) for spread in self.spreads[self.first :]]
        self.shape = self.spec.noise_shape
        torch.manual_seed(seed)
        dim = condition_dim(policy)
        self.value = Value(condition_dim=dim, hidden=hidden, octaves=octaves, members=1).to(self.device)
        policy.denoiser.requires_grad_(True)
        self.parameters = list(policy.denoiser.parameters())
        self.modules = {"denoiser": policy.denoiser, "value": self.value}
        self.optimizers = {
            "denoiser": torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0),
            "value": torch.optim.Adam(self.value.parameters(), lr=critic_lr),
        }
        self.floor, self.gae, self.epochs, self.batch_size = floor, gae, epochs, batch_size
        self.most_kl = most_kl
        depth = torch.arange(self.n_trained - 1, -1, -1, device=self.device)
        self.weights = denoising_discount ** depth.float()
        self.clips = clip * 0.1 ** (depth.float() / max(1, self.n_trained - 1))

    @torch.no_grad()
    def act(self, obs: Mapping[str, np.ndarray]) -> Acted:
        tensors = self.tensors(obs)
        condition = self.policy.see(tensors).condition.float()
        explore = Explore(self.first, self.floor, self.spreads, self.random)
        noise = self.normal(len(condition), *self.shape)
        sample = self.policy.sample(tensors, noise=noise, generator=self.random, hooks=[explore])
        before, after = torch.stack(explore.before, dim=1), torch.stack(explore.after, dim=1)
        remembered = {"condition": condition, "before": before, "after": after}
        return Acted(sample.action.float().cpu().numpy(), remembered)

    def update(self, rows: Rows) -> dict[str, float]:
        condition, count = rows["condition"], len(rows["reward"])
        with torch.no_grad():
            value, following = self.value(condition)[0], self.value(rows["next_condition"])[0]
            error = rows["reward"] + rows["discount"] * following - value
            advantage = advantages(error, rows["discount"] * self.gae, rows["simulator"], rows["time"])
            returned = advantage + value
            old = torch.cat([self._log_density(rows, part) for part in torch.arange(count).split(self.batch_size)])
        standard = standardised(advantage)
        numbers = {"value": float(value.mean()), "kl": 0.0}
        for _ in range(self.epochs):
            for part in torch.randperm(count, generator=self.random).split(self.batch_size):
                step(
                    self.optimizers["value"],
                    (self.value(condition[part])[0] - returned[part]).square().mean(),
                    self.value.parameters(),
                )
                new = self._log_density(rows, part)
                difference = new - old[part]
                kl = float((difference.exp() - 1 - difference).mean().detach())
                if kl > self.most_kl:
                    return numbers | {"kl": kl}
                loss = surrogate(difference.exp(), standard[part], self.weights, self.clips)
                step(self.optimizers["denoiser"], loss, self.parameters, most=1.0)
                numbers |= {"kl": kl, "policy_loss": float(loss.detach())}
        return numbers

    def _log_density(self, rows: Rows, part: Tensor) -> Tensor:
        """log p of each trained step of some rows, a mean over what is executed, [n, K']."""
        policy, sampler = self.policy, self.policy.sampler
        steps = sampler.steps[self.first :]
        film = policy.denoiser.prepare(rows["condition"][part], sampler.times(self.device))
        densities = []
        for index, at in enumerate(steps):
            x, after = rows["before"][part, index], rows["after"][part, index]
            prefix = policy._prefix(None, x, 1)
            output = policy.denoiser(x if prefix is None else prefix.mark(x), film.at(at.index, None))
            mean = sampler.mean(output, x, at)
            density = torch.distributions.Normal(mean, self.stds[index]).log_prob(after)
            densities.append(executed(policy, density).mean(dim=1))
        return torch.stack(densities, dim=1)
