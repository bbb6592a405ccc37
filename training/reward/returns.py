"""A critic that knows how returns are spread: a flow from normal noise to returns (PCBF, Xu et al. 2026, "Path-Coupled
Bellman Flows for Distributional Reinforcement Learning").

    velocity v(t, z | s, a),   t from 0 (noise ε) to 1 (a return);   dz/dt = v

A return is a reward and a discounted return of what follows, Z(s, a) ~ r + γⁿ Z(s', a'). The same ε leads to both: X'
is where the target flow of (s', a') brings it to. Their paths are then coupled, and begin at the noise that a flow
needs,

    z'_t = (1 − t) ε + t X'                       of what follows
    z_t  = (1 − t) ε + t (r + γⁿ X')              of now, which is  t r + γⁿ z'_t + (1 − t)(1 − γⁿ) ε
    v(t, z_t | s, a)  ←  r + γⁿ X' − ε + λ γⁿ (v'(t, z'_t | s', a') − (X' − ε))

The last part is zero on average and cancels what one X' happens to be: λ = 0 is unbiased, λ = 1 leaves no X' and learns
from the target's velocity instead, with less variance and a small bias.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from action_diffusion.policy.value.networks import waves
from action_diffusion.training.reward.transitions import Rows


class ReturnFlow(nn.Module):
    """Returns of a condition [B, C], or of a condition and what is done in it [B, D].

    steps: Euler's, of a draw. scale: what returns are divided by in the network, about their standard deviation.
    octaves: see `waves`, of the condition.
    """

    def __init__(
        self,
        *,
        condition_dim: int,
        action_dim: int = 0,
        octaves: int = 0,
        hidden: Sequence[int] = (256, 256),
        steps: int = 10,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        sizes = [condition_dim * (1 + 2 * octaves) + action_dim + 2, *hidden]
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.GELU()]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))
        self.octaves, self.steps, self.scale = octaves, steps, scale

    def velocity(self, t: Tensor, z: Tensor, *seen: Tensor) -> Tensor:
        """dz/dt [B] at times [B] and places z [B], in units of `scale`. seen: the condition, and what is done."""
        condition, *done = seen
        known = [waves(condition, self.octaves), *done, z.unsqueeze(1), t.unsqueeze(1)]
        result: Tensor = self.net(torch.cat(known, dim=1)).squeeze(1)
        return result

    def brought(self, eps: Tensor, *seen: Tensor) -> Tensor:
        """Where noise [B] ends, in units of `scale`."""
        z = eps
        for index in range(self.steps):
            z = z + self.velocity(torch.full_like(z, index / self.steps), z, *seen) / self.steps
        return z

    def draw(self, eps: Tensor, *seen: Tensor) -> Tensor:
        """Returns of standard normal numbers, [B]."""
        return self.scale * self.brought(eps, *seen)

    def mean(self, n: int, *seen: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The expected return, [B], of n draws each: what other critics say."""
        eps = torch.randn(n * len(seen[0]), generator=generator).to(seen[0])
        return self.draw(eps, *(part.repeat(n, *[1] * (part.ndim - 1)) for part in seen)).view(n, -1).mean(0)


def path_coupled_loss(
    flow: ReturnFlow,
    target: ReturnFlow,
    rows: Rows,
    *,
    coupling: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The mean square error of the velocities, a scalar. rows: "condition", "reward", "discount", "next_condition",
    and of flows of actions "action" and "next_action". coupling: λ, from 0 to 1."""
    now, following = (
        [rows[name] for name in (f"{prefix}condition", f"{prefix}action") if name in rows] for prefix in ("", "next_")
    )
    reward, discount = rows["reward"] / flow.scale, rows["discount"]
    eps = torch.randn(len(reward), generator=generator).to(reward)
    t = torch.rand(len(reward), generator=generator).to(reward)
    with torch.no_grad():
        after = target.brought(eps, *following)
        aim = reward + discount * after - eps
        if coupling:
            said = target.velocity(t, (1 - t) * eps + t * after, *following)
            aim = aim + coupling * discount * (said - (after - eps))
        z = (1 - t) * eps + t * (reward + discount * after)
    return (flow.velocity(t, z, *now) - aim).square().mean()


def wasserstein(a: Tensor, b: Tensor) -> float:
    """The 1-Wasserstein distance of two samples of the same size, [N] each."""
    return float((a.sort().values - b.sort().values).abs().mean())


__all__ = ["ReturnFlow", "path_coupled_loss", "wasserstein"]
