"""Plans under a cost that the policy was not trained for, from chunks that it could have made.

What is looked for is the policy's distribution, tilted by a cost J that the caller gives, in the data's units,

    p*(chunk | obs)  ∝  p(chunk | obs) · exp(−J(chunk) / λ)

which is the one that trades the expected cost for the distance from the demonstrations, KL(p* ‖ p), at the price λ
("Receding-Horizon Control via Drifting Models", Foffano, Russo, Proutiere 2026). There a one-step generator is trained
towards p*, for one cost; here the policy stays as it is and its samples are moved, for any cost. Each round, for every
observation's n chunks,

    re-weighted   w_i ∝ exp(−J_i / λ),   chunks drawn again in proportion (systematic resampling)
    drifted       x_i ← x_i − s_r · ∇J / rms(∇J),   s_r = step · (1 − r / rounds)
    made again    x_i ← the policy's denoising of x_i, made noisy again at b_r        (`Restart`)

with λ = temperature · (the standard deviation of J among the n), so that no one has to know the scale of the cost. The
drift leaves the demonstrations' support, and the denoising brings the chunk back to it: what the cost asks for that was
never demonstrated does not survive. b_r falls from `noise` in the first round to half of it in the last: wide moves
first. The result is denoised; of all rounds' chunks the one that costs least, among those that are
allowed, is the plan.

Done once more at every chunk, it is a receding-horizon controller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.diffusion.sampler import draw_noise
from action_diffusion.policy.planning.restart import Restart
from action_diffusion.policy.policy import DiffusionPolicy

Cost = Callable[[Tensor], Tensor]
"""Chunks [N, H, A] in the data's units → their costs [N], differentiable."""
Allowed = Callable[[Tensor], Tensor]
"""Chunks [N, H, A] in the data's units → whether each may be the plan, bool [N]."""


@dataclass(frozen=True)
class Drifted:
    """action: the plan of each observation, [B, H, A], data's units; cost: its cost [B]. costs: those of the n chunks
    after each round, [rounds + 1, B, n]; the first are the policy's own. allowed: bool [B], False where none was."""

    action: Tensor
    cost: Tensor
    costs: Tensor
    allowed: Tensor


def drift(
    policy: DiffusionPolicy,
    obs: Mapping[str, Tensor],
    cost: Cost,
    *,
    n_samples: int = 32,
    rounds: int = 8,
    temperature: float = 0.3,
    step: float = 0.1,
    noise: float = 0.5,
    allowed: Allowed | None = None,
    generator: torch.Generator | None = None,
) -> Drifted:
    """Plans for observations (key → [B, To, …], data's units), see the file.

    n_samples: n. temperature > 0: the smaller, the sooner a few chunks are all that is left. step >= 0: how far the
    first round moves a chunk, root mean square, normalised units; 0: re-weighting alone. noise: b of the first round,
    in (0, 1); the more, the nearer to the demonstrations. allowed: what the plan must keep to, such as a distance from
    demonstrated states; None: nothing. generator: all that is drawn.
    Raises `InputError` for values that cannot be, and for a cost that is no finite number for each chunk.
    """
    if n_samples < 2 or rounds < 1 or not temperature > 0 or not step >= 0:
        raise InputError(
            f"n_samples={n_samples}, rounds={rounds}, temperature={temperature:g}, step={step:g}: expected at least 2, "
            "at least 1, above 0, and 0 or more"
        )
    with torch.no_grad():
        seen = policy.see(obs).obs
        shape = (n_samples * len(next(iter(obs.values()))), *policy.spec.noise_shape)
        restart: list[Restart] = []
        chunks, costs = [], []
        for turn in range(rounds + 1):
            z = draw_noise(shape, generator, policy.device, torch.float32)
            sample = policy.sample(obs, noise=z, n_samples=n_samples, generator=generator, hooks=restart)
            x = sample.normalized.flatten(0, 1)
            found, gradient = _costs(policy, cost, x, seen)
            chunks.append(sample.action)
            costs.append(found.unflatten(0, (-1, n_samples)))
            left = 1.0 - turn / rounds
            rms = gradient.square().mean(dim=(1, 2), keepdim=True).sqrt()
            x = x - step * left * gradient / rms.clamp_min(torch.finfo(rms.dtype).tiny)
            kept = resampled(weights(costs[-1], temperature), generator)
            restart = [Restart(x[kept], noise * (1.0 + left) / 2.0)]
    every, made = torch.cat(costs, dim=1), torch.cat(chunks, dim=1)
    may = torch.ones_like(every, dtype=torch.bool) if allowed is None else allowed(made.flatten(0, 1)).view_as(every)
    any_may = may.any(dim=1)
    which = every.masked_fill(any_may.unsqueeze(1) & ~may, torch.inf).argmin(dim=1)
    row = torch.arange(len(which), device=which.device)
    return Drifted(made[row, which], every[row, which], torch.stack(costs), any_may)


def weights(costs: Tensor, temperature: float) -> Tensor:
    """exp(−J / λ) of each observation's chunks, [B, n], sum 1; λ = temperature · their standard deviation."""
    scale = temperature * costs.std(dim=1, keepdim=True)
    lower = costs - costs.min(dim=1, keepdim=True).values
    return torch.softmax(-lower / scale.clamp_min(torch.finfo(scale.dtype).tiny), dim=1)


def resampled(weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """Rows [B · n] to go on with, of [B, n] weights: each ⌊n · w⌋ or ⌈n · w⌉ times (systematic resampling)."""
    n = weight.shape[1]
    offset = torch.rand(len(weight), 1, generator=generator).to(weight)
    at = (torch.arange(n, device=weight.device) + offset) / n
    row = torch.searchsorted(weight.cumsum(dim=1).contiguous(), at.contiguous()).clamp_max(n - 1)
    return (row + n * torch.arange(len(weight), device=weight.device).unsqueeze(1)).flatten()


def _costs(policy: DiffusionPolicy, cost: Cost, x: Tensor, seen: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of normalised chunks [N, H, A] the costs [N] and their gradients [N, H, A]."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        costs = cost(policy.unnormalize_action(x, seen))
        if costs.shape != x.shape[:1] or not costs.isfinite().all() or not costs.requires_grad:
            raise InputError(
                f"the cost of {len(x)} chunks has shape {list(costs.shape)}: expected one finite number for each, "
                "differentiable with respect to the chunk"
            )
        (gradient,) = torch.autograd.grad(costs.sum(), x)
    return costs.detach(), gradient
