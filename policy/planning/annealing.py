"""A chunk made better by a cost with many valleys, which is smoothed first widely and then less and less (DIDA).

    J_σ(x) = E J(x + σ z),  z ~ N(0, I)           ∇J_σ(x) = E [(J(x + σ z) − J(x − σ z)) / 2 · z] / σ

What is narrower than σ is averaged away, so that a descent of J_σ goes over it; as σ falls, it ends in one of the
valleys that the wide view led to. Only values of J are asked for: it may be a simulator, with contacts. The gradient is
estimated from pairs x ± σ z, and a step is as long as σ says,

    x ← x − step · σ · ∇J_σ / rms(∇J_σ)

Of all places that were gone through, the one that costs least is what comes out, the first one included. Decided here:
the schedule (geometric) and the length of steps; how DIDA sets them is not in what is public of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.diffusion.sampler import draw_noise

Cost = Callable[[Tensor], Tensor]
"""Chunks [N, H, A] → what each costs, [N]; needs no gradient."""


def anneal(
    cost: Cost,
    chunk: Tensor,
    *,
    widest: float = 0.5,
    narrowest: float = 0.01,
    rounds: int = 80,
    pairs: int = 32,
    step: float = 0.2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Chunks [B, H, A] that cost no more than those that are given, in whatever unit they and the cost are.

    widest, narrowest: σ of the first and the last round. pairs: of places in each round, so that it asks for
    rounds · (2 · pairs + 1) costs. step: share of σ, root mean square. Raises `InputError` for values that cannot be,
    and for a cost that is not one finite number for each chunk.
    """
    if not 0 < narrowest <= widest or rounds < 1 or pairs < 1 or not step > 0:
        raise InputError(
            f"widest={widest:g}, narrowest={narrowest:g}, rounds={rounds}, pairs={pairs}, step={step:g}: expected 0 < "
            "narrowest <= widest, at least one round and pair, and a step above 0"
        )
    x = best = chunk
    least = _asked(cost, chunk)
    for index in range(rounds):
        sigma = widest * (narrowest / widest) ** (index / max(1, rounds - 1))
        x = x - step * sigma * _unit(smoothed_gradient(cost, x, sigma, pairs, generator))
        found = _asked(cost, x)
        better = (found < least).view(-1, 1, 1)
        best, least = torch.where(better, x, best), torch.minimum(found, least)
    return best


def smoothed_gradient(
    cost: Cost, x: Tensor, sigma: float, pairs: int, generator: torch.Generator | None = None
) -> Tensor:
    """An estimate of ∇J_σ at chunks [B, H, A], without a bias."""
    z = draw_noise((pairs, *x.shape), generator, x.device, x.dtype)
    places = torch.stack([x + sigma * z, x - sigma * z])
    costs = _asked(cost, places.flatten(0, 2)).view(2, pairs, len(x), 1, 1)
    return ((costs[0] - costs[1]) * z).mean(dim=0) / (2 * sigma)


def _unit(gradient: Tensor) -> Tensor:
    rms = gradient.square().mean(dim=(1, 2), keepdim=True).sqrt()
    return gradient / rms.clamp_min(torch.finfo(rms.dtype).tiny)


def _asked(cost: Cost, chunks: Tensor) -> Tensor:
    with torch.no_grad():
        found = cost(chunks)
    if found.shape != chunks.shape[:1] or not found.isfinite().all():
        raise InputError(
            f"the cost of {len(chunks)} chunks has shape {list(found.shape)}: expected a finite number each"
        )
    return found


__all__ = ["Cost", "anneal", "smoothed_gradient"]
