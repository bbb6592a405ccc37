"""Noise without torch: the numbers of torch.randn, and states that travel between both kinds of generators."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from action_diffusion.errors import InputError
from action_diffusion.policy.noise import NumpyGenerator, draw, generator, set_state, state_of

SEEDS = (0, 5, 2**31 + 7, 2**64 - 1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 32, 250, 2000])
def test_numbers_are_those_of_torch(seed: int, n: int) -> None:
    ours, torchs = NumpyGenerator(seed), torch.Generator().manual_seed(seed)
    for size in (n, 3, n, 700):
        np.testing.assert_allclose(ours.normal(size), torch.randn(size, generator=torchs), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("before", [0, 1, 3, 16, 40, 624, 625, 1300])
def test_states_travel_both_ways(before: int) -> None:
    torchs = torch.Generator().manual_seed(11)
    torch.randn(before, generator=torchs)
    ours = NumpyGenerator()
    ours.set_state(torchs.get_state().numpy())
    assert ours.initial_seed() == torchs.initial_seed() == 11
    there = torch.Generator()
    set_state(there, state_of(ours))
    expected = torch.randn(37, generator=torchs)
    assert torch.equal(torch.randn(37, generator=there), expected)
    np.testing.assert_allclose(ours.normal(37), expected, rtol=1e-5, atol=2e-6)
    assert np.array_equal(state_of(ours), state_of(torchs))


def test_rows_depend_on_their_own_generator_alone() -> None:
    both = draw((2, 3, 4), [NumpyGenerator(1), NumpyGenerator(2)])
    np.testing.assert_array_equal(both[1:], draw((1, 3, 4), [NumpyGenerator(2)]))
    np.testing.assert_allclose(both, draw((2, 3, 4), [generator(1), generator(2)]), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("n", [3, 24, 40])
def test_by_numpy_both_kinds_draw_the_same_bits_and_go_on_alike(n: int) -> None:
    torchs, ours = torch.Generator().manual_seed(4), NumpyGenerator(4)
    for _ in range(2):
        drawn = draw((2, n), torchs, by_numpy=True)
        np.testing.assert_array_equal(drawn, draw((2, n), ours))
    assert np.array_equal(state_of(torchs), state_of(ours))


@pytest.mark.parametrize(
    "state",
    [np.zeros(5056, np.uint8), np.zeros(10, np.uint8), np.zeros(5056, np.float32), np.full(5056, 255, np.uint8)],
)
@pytest.mark.parametrize("kind", [NumpyGenerator, torch.Generator])
def test_bytes_that_are_no_state_are_refused(state: np.ndarray, kind) -> None:
    with pytest.raises(InputError, match="state"):
        set_state(kind(), state)


def test_other_numbers_of_generators_than_rows_are_refused() -> None:
    with pytest.raises(InputError, match="3 generators for 2 rows"):
        draw((2, 4), [NumpyGenerator(seed) for seed in range(3)])
