"""Imagined futures: what is learnt of them, and which chunk is chosen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gaussian import gaussian_policy

from action_diffusion.errors import InputError
from action_diffusion.policy.planning.imagination import Imagination, choose


def data(n: int = 512) -> tuple[np.ndarray, ...]:
    """Chunks [n, 8, 2] of which the first number alone tells the future: e_t = e_0 + t · c / 10, value −|e_2|."""
    rng = np.random.default_rng(0)
    embedding, chunk = rng.uniform(-0.5, 0.5, (n, 5)), rng.normal(0, 3, (n, 8, 2))
    future = np.stack([embedding + step * chunk[:, :1, 0] / 10 for step in (1, 2)], axis=1)
    return embedding, chunk, future, np.repeat(-np.abs(future[:, 1, :1]), 2, axis=1)


pytestmark = pytest.mark.slow  # a model is trained first


@pytest.fixture(scope="module")
def imagination() -> Imagination:
    network = {"denoiser": {"name": "unet1d", "channels": [32], "n_groups": 4}}
    return Imagination.fit(*data(), steps=400, batch_size=128, network=network)


def test_what_is_imagined_is_what_the_chunk_leads_to(imagination):
    embedding, chunk, future, value = (torch.as_tensor(part[:64], dtype=torch.float32) for part in data())
    noise = torch.randn(64, 2, 6, generator=torch.Generator().manual_seed(0))
    told, worth = imagination.imagine(embedding, chunk, noise=noise)
    assert (told - future).square().mean() < 0.05 * future.var()
    assert torch.corrcoef(torch.stack([worth[:, 1], value[:, 1]]))[0, 1] > 0.9
    other, _ = imagination.imagine(embedding, chunk.flip(0), noise=noise)
    assert (other - future).square().mean() > 0.3 * future.var()


def test_the_chosen_chunk_is_the_one_whose_imagined_future_scores_most(imagination):
    policy, obs = gaussian_policy(), {"state": torch.full((4, 1, 5), 0.3)}
    found = choose(policy, obs, imagination, n_samples=16, generator=torch.Generator().manual_seed(0))
    best = found.scores.argmax(dim=1)
    torch.testing.assert_close(found.action, found.candidates[torch.arange(4), best])
    real = (0.3 + 2 * found.candidates[:, :, 0, 0] / 10).abs()  # |e_2|: least is best
    assert real[torch.arange(4), best].mean() < 0.3 * real.mean()


def test_any_score_of_the_imagined_embeddings_can_choose(imagination):
    policy, obs = gaussian_policy(), {"state": torch.zeros(2, 1, 5)}
    most = choose(policy, obs, imagination, score=lambda e, v: e[:, 1, 0], generator=torch.Generator().manual_seed(0))
    first = most.candidates[:, :, 0, 0]
    rank = (first > most.action[:, None, 0, 0]).sum(dim=1)
    assert int(rank.max()) <= 3


def test_what_cannot_be_is_refused(imagination):
    embedding, chunk, future, value = data(16)
    with pytest.raises(InputError, match=r"value \[16\].*expected \[N, C\]"):
        Imagination.fit(embedding, chunk, future, value[:, 0], steps=1)
    with pytest.raises(InputError, match="future holds NaN"):
        Imagination.fit(embedding, chunk, future * np.nan, value, steps=1)
    obs = {"state": torch.zeros(1, 1, 5)}
    with pytest.raises(InputError, match="n_samples=1"):
        choose(gaussian_policy(), obs, imagination, n_samples=1)
    with pytest.raises(InputError, match="5 and 16 numbers, the policy has 5 and 32"):
        choose(gaussian_policy(horizon=16), obs, imagination)
