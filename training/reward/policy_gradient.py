"""What policy gradients share: chunks since the last update, their advantages, and the clipped loss of PPO."""

from __future__ import annotations

import torch
from torch import Tensor

from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.training.reward.method import Method
from action_diffusion.training.reward.transitions import Rows


class OnPolicy(Method):
    """A method that learns from the chunks since its last update, and from none before. chunks: how many these are."""

    def __init__(self, policy: DiffusionPolicy, *, seed: int, chunks: int) -> None:
        super().__init__(policy, seed=seed, capacity=1)
        self.chunks = chunks
        self._since: list[Rows] = []

    def learn(self, rows: Rows) -> dict[str, float]:
        if rows:
            self._since.append(rows)
        if sum(len(part["reward"]) for part in self._since) < self.chunks:
            return {}
        found = {name: torch.cat([part[name] for part in self._since]).to(self.device) for name in self._since[0]}
        self._since = []
        return self.update(found)

    def update(self, rows: Rows) -> dict[str, float]:
        """Learn from rows [N]; numbers for the curves."""
        raise NotImplementedError


def surrogate(ratio: Tensor, advantage: Tensor, weights: Tensor, clips: Tensor) -> Tensor:
    """PPO's clipped loss (Schulman et al. 2017, equation 7), a scalar. ratio [n, K], advantage [n], weights and clips
    [K]: of each of K decisions that a chunk is made of."""
    wanted = advantage.unsqueeze(1) * weights
    clipped = torch.minimum(torch.maximum(ratio, 1 - clips), 1 + clips)
    return -torch.minimum(ratio * wanted, clipped * wanted).mean()


def advantages(error: Tensor, decay: Tensor, simulator: Tensor, time: Tensor) -> Tensor:
    """Σ_i (γλ)^i δ_{t+i} over the rows that follow in the same episode, [N] (Schulman et al. 2016, equation 16).

    error: δ. decay: γⁿλ of each row, 0 at an end. simulator, time: where a row is from, in the order they came in.
    """
    found, host = torch.zeros_like(error), [part.tolist() for part in (simulator, time, decay, error)]
    after: dict[float, tuple[float, float]] = {}
    for row in reversed(range(len(error))):
        place, at, share, own = (part[row] for part in host)
        value, later = after.get(place, (0.0, float("-inf")))
        value = own + (share * value if at < later else 0.0)
        found[row], after[place] = value, (value, at)
    return found


def standardised(advantage: Tensor) -> Tensor:
    """Mean 0, standard deviation 1."""
    return (advantage - advantage.mean()) / (advantage.std() + 1e-6)
