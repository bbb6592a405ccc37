"""Learning from which of two chunks is better, without a reward (Wallace et al. 2024, "Diffusion Model Alignment Using
Direct Preference Optimization").

    chosen x⁺, rejected x⁻, made noisy at the same time by the same noise;  e(x) = mean ‖network(x_t, t) − target‖²
    margin    m = (e_ref(x⁺) − e(x⁺)) − (e_ref(x⁻) − e(x⁻))           e_ref of the frozen policy that it began as
    loss      −log sigmoid(β m)

so the policy gets better at making what was chosen than the reference is, and worse at what was rejected; β holds it to
the reference. With several scorers, a pair counts as most of them say (BalancedDPO, Tamboli et al. 2025: votes, and not
scores of different units, are added), and one that they are divided over does not count.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.policy import DiffusionPolicy


def majority(votes: Tensor) -> Tensor:
    """Votes [scorers, B], above 0 for the first chunk of a pair and below 0 for the second → +1, −1, or 0: [B]."""
    return votes.sign().sum(dim=0).sign()


def preference_loss(
    policy: DiffusionPolicy,
    reference: DiffusionPolicy,
    obs: Mapping[str, Tensor],
    first: Tensor,
    second: Tensor,
    preferred: Tensor,
    *,
    strength: float = 100.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The loss, a scalar, of pairs of chunks [B, H, A], in the data's units. preferred [B]: +1: the first, −1: the
    second, 0: neither, which does not count. strength: β.

    Raises `InputError` for a policy that is told two times, whose errors are of no one noise level.
    """
    if policy.objective.two_times:
        raise InputError("preferences: a policy that is told two times has no error of a noise level")
    seen, process = policy.see(obs), policy.process
    with torch.no_grad():
        was = reference.see(obs)
    pair = torch.stack([policy.normalize_action(chunk, seen.obs) for chunk in (first, second)])
    times = process.draw_times(len(first), generator=generator, device=pair.device)
    eps = torch.randn(first.shape, generator=generator, device=pair.device)

    def errors(of: DiffusionPolicy, condition: Tensor) -> Tensor:
        """[2, B]."""
        film = of.denoiser.prepare(condition, times)
        film_rows = film.steps + film.condition
        found = []
        for x0 in pair:
            x = process.add_noise(x0, eps, times)
            prefix = of._prefix(None, x, 1)
            output = of.denoiser(x if prefix is None else prefix.mark(x), film_rows)
            found.append((output - process.target(x0, eps, times)).square().mean(dim=(1, 2)))
        return torch.stack(found)

    with torch.no_grad():
        before = errors(reference, was.condition)
    better = before - errors(policy, seen.condition)
    margin = preferred * (better[0] - better[1])
    counted = preferred != 0
    return -(F.logsigmoid(strength * margin) * counted).sum() / counted.sum().clamp_min(1)


__all__ = ["majority", "preference_loss"]
