"""A noisy policy, in which the smallest difference shows as in `ChaoticEnv`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from action_diffusion.envs.rollout import Episode, rollout

TO, TA, HORIZON = 2, 4, 8


class NoisyPolicy:
    """Its rows meet in matrix products, and use both of their generators."""

    spec = SimpleNamespace(n_obs_steps=TO, n_action_steps=TA)

    def __init__(self, *, scale: float = 1.0, offset: float = 0.0) -> None:
        random = torch.Generator().manual_seed(0)
        self.inner = torch.randn(TO * 2, 64, generator=random)
        self.outer = torch.randn(64, HORIZON * 2, generator=random) * scale
        self.offset = offset
        self.batches: list[int] = []

    def predict(
        self,
        obs: Mapping[str, np.ndarray],
        *,
        noise_generator: list[torch.Generator],
        generator: list[torch.Generator],
    ) -> dict[str, np.ndarray]:
        (state,) = obs.values()
        self.batches.append(len(state))
        x = torch.as_tensor(state).flatten(1) @ self.inner
        for one in (noise_generator, generator):
            x = torch.tanh(x + torch.stack([torch.randn(64, generator=row) for row in one]))
        chunk = (x @ self.outer).reshape(-1, HORIZON, 2)
        return {"action_pred": (chunk + self.offset).numpy()}


def run(policy: Any, make_env: Callable[[], Any], seeds: Sequence[int], **settings: Any) -> list[Episode]:
    return rollout(policy=policy, make_env=make_env, seeds=seeds, keys=["state"], **settings)


def assert_same(a: Sequence[Episode], b: Sequence[Episode]) -> None:
    for one, other in zip(a, b, strict=True):
        assert one.seed == other.seed
        assert one.score == other.score
        assert np.array_equal(one.rewards, other.rewards)
        assert np.array_equal(one.actions, other.actions)
