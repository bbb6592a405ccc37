"""Plain networks on conditions and chunks, several of one shape computed at once.

    Q(s, a)     condition [B, C], executed chunk [B, Ta · A], normalised ─▶ [n, B], an ensemble of n
    V(s)        condition [B, C] ─▶ [n, B]
    π(w | s)    condition [B, C] ─▶ noise [B, H · A] within ±bound: `NoiseActor`

Layers are followed by layer norms, which keep values of what was never seen from growing without a limit (RLPD, Ball
et al. 2023, "Efficient Online Reinforcement Learning with Offline Data").
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_LOG_STD, MOST_LOG_STD = -5.0, 1.0


class EnsembleMlp(nn.Module):
    """n networks input_dim → hidden … → output_dim, with a layer norm and ReLU after each hidden layer."""

    def __init__(self, *, input_dim: int, hidden: Sequence[int], output_dim: int = 1, members: int = 2) -> None:
        super().__init__()
        sizes = [input_dim, *hidden, output_dim]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise(sizes):
            bound = 1 / math.sqrt(fan_in)
            self.weights.append(torch.empty(members, fan_in, fan_out).uniform_(-bound, bound))
            self.biases.append(torch.zeros(members, 1, fan_out))
        self.members = members

    def forward(self, x: Tensor) -> Tensor:
        """x [B, D] → [n, B, output_dim]."""
        x = x.expand(self.members, *x.shape)
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if index < len(self.weights) - 1:
                x = F.relu(F.layer_norm(x, x.shape[-1:]))
        return x


class Value(nn.Module):
    """What a condition, or a condition and what is done (a chunk, a noise), is worth: inputs joined → [n, B]."""

    def __init__(self, *, input_dim: int, hidden: Sequence[int] = (256, 256), members: int = 2) -> None:
        super().__init__()
        self.net = EnsembleMlp(input_dim=input_dim, hidden=hidden, members=members)

    def forward(self, *inputs: Tensor) -> Tensor:
        result: Tensor = self.net(torch.cat(inputs, dim=-1)).squeeze(-1)
        return result


class NoiseActor(nn.Module):
    """A Gaussian over initial noise, squashed into ±bound: w = bound · tanh(u), u ~ N(μ(s), σ(s)²)."""

    def __init__(self, *, condition_dim: int, noise_dim: int, bound: float, hidden: Sequence[int] = (256, 256)) -> None:
        super().__init__()
        self.net = EnsembleMlp(input_dim=condition_dim, hidden=hidden, output_dim=2 * noise_dim, members=1)
        self.bound = bound

    def best(self, condition: Tensor) -> Tensor:
        """[B, C] → the noise of the mean, [B, D]."""
        mean, _ = self._moments(condition)
        return self.bound * torch.tanh(mean)

    def draw(self, condition: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """[B, C] → a noise [B, D], differentiable, and its log-density [B]."""
        mean, log_std = self._moments(condition)
        eps = torch.randn(mean.shape, generator=generator, device=mean.device)
        before = mean + log_std.exp() * eps
        log_density = -0.5 * eps.square() - log_std - 0.5 * math.log(2 * math.pi)
        # log(1 − tanh²) without its cancellation (Haarnoja et al. 2018, appendix C)
        log_density = log_density - 2 * (math.log(2) - before - F.softplus(-2 * before)) - math.log(self.bound)
        return self.bound * torch.tanh(before), log_density.sum(dim=-1)

    def _moments(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.net(condition)[0].chunk(2, dim=-1)
        span = MOST_LOG_STD - LEAST_LOG_STD
        return mean, LEAST_LOG_STD + 0.5 * span * (torch.tanh(log_std) + 1)
