"""The noise that a chunk begins with, by its frequencies, and an actor that chooses the first of them.

    noise [B, H, A] ──cosine transform over time──▶ coefficients [B, F, A] of the first F, and the rest

The transform is orthonormal, so coefficients of standard normal noise are standard normal as well. A denoiser makes a
smooth chunk of noise that is not, so what noise does to a chunk is nearly all in its first frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from action_diffusion.policy.value.networks import EnsembleMlp, waves

LEAST_LOG_STD, MOST_LOG_STD = -5.0, 1.0


def cosine_basis(horizon: int) -> Tensor:
    """The orthonormal DCT-II: c = basis @ x over time, x = basisᵀ @ c. [H, H], a row a frequency."""
    step = torch.arange(horizon, dtype=torch.float64)
    basis = torch.cos(math.pi / horizon * (step + 0.5) * step.unsqueeze(1)) * math.sqrt(2 / horizon)
    basis[0] /= math.sqrt(2)
    return basis.float()


class Frequencies:
    """The first F of H frequencies of noise [B, H, A]."""

    def __init__(self, horizon: int, first: int) -> None:
        with torch.device("cpu"):
            self.basis = cosine_basis(horizon)[:first]

    def of(self, noise: Tensor) -> Tensor:
        """[B, H, A] → coefficients, flat: [B, F · A]."""
        return torch.einsum("fh,bha->bfa", self.basis.to(noise), noise).flatten(1)

    def put(self, noise: Tensor, coefficients: Tensor) -> Tensor:
        """The noise with other coefficients [B, F · A]; what is not in them stays."""
        change = (coefficients - self.of(noise)).unflatten(1, (len(self.basis), -1))
        return noise + torch.einsum("fh,bfa->bha", self.basis.to(noise), change)


class NoiseActor(nn.Module):
    """A Gaussian over coefficients of noise, squashed into ±bound: w = bound · tanh(u / bound), u ~ N(μ(s), σ(s)²).

    It begins with μ near 0 and σ near `deviation`: with 1 nearly as the policy is without it. dim: F · A.
    """

    def __init__(
        self,
        *,
        condition_dim: int,
        dim: int,
        bound: float,
        deviation: float = 1.0,
        octaves: int = 0,
        hidden: Sequence[int] = (256, 256),
    ) -> None:
        super().__init__()
        input_dim = condition_dim * (1 + 2 * octaves)
        self.net = EnsembleMlp(input_dim=input_dim, hidden=hidden, output_dim=2 * dim, members=1)
        with torch.no_grad():
            self.net.weights[-1].mul_(0.01)
            share = (math.log(deviation) - LEAST_LOG_STD) / (MOST_LOG_STD - LEAST_LOG_STD)
            self.net.biases[-1][..., dim:].fill_(math.log(share / (1 - share)))
        self.bound, self.octaves = bound, octaves

    def moments(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C] → μ and log σ of u, [B, D] each."""
        mean, raw = self.net(waves(condition, self.octaves))[0].chunk(2, dim=-1)
        span = MOST_LOG_STD - LEAST_LOG_STD
        return mean, LEAST_LOG_STD + span * torch.sigmoid(raw)

    def squashed(self, before: Tensor) -> Tensor:
        """u → w."""
        return self.bound * torch.tanh(before / self.bound)

    def draw(self, condition: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C], and standard normal numbers [B, D] → w [B, D], differentiable, and its log-density [B]."""
        mean, log_std = self.moments(condition)
        before = mean + log_std.exp() * eps
        log_density = -0.5 * eps.square() - log_std - 0.5 * math.log(2 * math.pi)
        # log(1 − tanh²) without its cancellation (Haarnoja et al. 2018, appendix C)
        scaled = before / self.bound
        log_density = log_density - 2 * (math.log(2) - scaled - nn.functional.softplus(-2 * scaled))
        return self.squashed(before), log_density.sum(dim=-1)
