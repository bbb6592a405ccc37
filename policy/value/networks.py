"""Plain networks on conditions and chunks, several of one shape computed at once.

    Q(s, a)     condition [B, C], executed chunk [B, Ta · A], normalised ─▶ [n, B], an ensemble of n
    V(s)        condition [B, C] ─▶ [n, B]
    δ(s, a)     condition [B, C], executed chunk [B, Ta · A] ─▶ how far it is moved, within ±bound: `Displacement`

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


def waves(condition: Tensor, octaves: int) -> Tensor:
    """[B, C] → [B, C · (1 + 2 octaves)]: beside each value, sin and cos of π, 2π, 4π … times it.

    A small network hardly sees differences of a hundredth of a range, and that is what decides whether a task is done
    (Tancik et al. 2020, "Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional Domains").
    """
    if octaves == 0:
        return condition
    angle = torch.cat([condition * (math.pi * 2**octave) for octave in range(octaves)], dim=-1)
    return torch.cat([condition, angle.sin(), angle.cos()], dim=-1)


class Value(nn.Module):
    """What a condition [B, C] is worth, or a condition and what is done in it (a chunk, a noise) [B, D] → [n, B].

    octaves: see `waves`, of the condition.
    """

    def __init__(
        self,
        *,
        condition_dim: int,
        action_dim: int = 0,
        octaves: int = 0,
        hidden: Sequence[int] = (256, 256),
        members: int = 2,
    ) -> None:
        super().__init__()
        self.octaves = octaves
        input_dim = condition_dim * (1 + 2 * octaves) + action_dim
        self.net = EnsembleMlp(input_dim=input_dim, hidden=hidden, members=members)

    def forward(self, condition: Tensor, *done: Tensor) -> Tensor:
        result: Tensor = self.net(torch.cat([waves(condition, self.octaves), *done], dim=-1)).squeeze(-1)
        return result


class Displacement(nn.Module):
    """δ(s, a) = bound · tanh(u(s, a)), which is 0 until it learns."""

    def __init__(
        self,
        *,
        condition_dim: int,
        action_dim: int,
        bound: float,
        octaves: int = 0,
        hidden: Sequence[int] = (256, 256),
    ) -> None:
        super().__init__()
        input_dim = condition_dim * (1 + 2 * octaves) + action_dim
        self.net = EnsembleMlp(input_dim=input_dim, hidden=hidden, output_dim=action_dim, members=1)
        self.bound, self.octaves = bound, octaves
        with torch.no_grad():
            self.net.weights[-1].zero_()

    def forward(self, condition: Tensor, action: Tensor) -> Tensor:
        """[B, C] and [B, D] → [B, D]."""
        u: Tensor = self.net(torch.cat([waves(condition, self.octaves), action], dim=-1))[0]
        return self.bound * torch.tanh(u)
