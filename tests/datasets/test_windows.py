"""Windows against a naive loop, at every end of every episode, and orders that are pure functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from action_diffusion.datasets.batches.windows import (
    Windows,
    batch_indices,
    epoch_order,
    make_windows,
    split_episodes,
    steps_per_epoch,
)
from action_diffusion.errors import InputError


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    n_obs_steps, n_action_steps = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    horizon = n_obs_steps - 1 + n_action_steps + draw(st.integers(0, 5))
    return {"horizon": horizon, "n_obs_steps": n_obs_steps, "n_action_steps": n_action_steps}


lengths = st.lists(st.integers(1, 14), min_size=1, max_size=6)


def naive(episode_lengths: list[int], *, horizon: int, n_obs_steps: int, n_action_steps: int):
    """One window at a time: rows and mask."""
    first = 0
    for length in episode_lengths:
        start = -(n_obs_steps - 1)
        while True:
            steps = range(start, start + horizon)
            yield (
                [first + min(max(step, 0), length - 1) for step in steps],
                [0 <= step < length for step in steps],
            )
            start += 1
            if start > length - horizon + n_action_steps - 1:
                break
        first += length


def all_of(windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    indices = np.arange(len(windows))
    return windows.rows(indices), windows.mask(indices)


@given(lengths, shapes())
def test_windows_are_those_of_a_naive_loop(episode_lengths: list[int], shape: dict[str, Any]) -> None:
    windows = make_windows(np.cumsum(episode_lengths), **shape)
    rows, mask = all_of(windows)
    expected = list(naive(episode_lengths, **shape))
    assert rows.tolist() == [row for row, _ in expected]
    assert mask.tolist() == [inside for _, inside in expected]


@given(lengths, shapes())
def test_now_is_a_real_row_and_padding_repeats_the_ends(episode_lengths: list[int], shape: dict[str, Any]) -> None:
    ends = np.cumsum(episode_lengths)
    windows = make_windows(ends, **shape)
    indices = np.arange(len(windows))
    rows, mask = all_of(windows)
    now = shape["n_obs_steps"] - 1
    assert mask[:, now].all()
    assert (rows[:, now] == windows.now(indices)).all()
    assert (np.searchsorted(ends, rows, side="right") == np.searchsorted(ends, rows[:, :1], side="right")).all()
    assert (np.diff(rows, axis=1)[mask[:, 1:] & mask[:, :-1]] == 1).all()
    # every first row of an episode is "now" once, so that a policy has seen how episodes begin
    assert set(np.concatenate([[0], ends[:-1]])) <= set(rows[:, now])


@given(lengths, shapes(), st.randoms(use_true_random=False))
def test_chosen_episodes_give_the_windows_they_have_among_all(
    episode_lengths: list[int], shape: dict[str, Any], random
) -> None:
    ends = np.cumsum(episode_lengths)
    chosen = sorted(random.sample(range(len(ends)), random.randint(1, len(ends))))
    every, some = make_windows(ends, **shape), make_windows(ends, episodes=np.array(chosen), **shape)
    belongs = np.isin(every.end, ends[chosen])
    assert some.start.tolist() == every.start[belongs].tolist()
    assert some.end.tolist() == every.end[belongs].tolist()


def test_the_picture_in_the_documentation() -> None:
    rows, mask = all_of(make_windows(np.array([9]), horizon=8, n_obs_steps=2, n_action_steps=4))
    assert rows[0].tolist() == [0, 0, 1, 2, 3, 4, 5, 6]
    assert mask[0].tolist() == [False] + [True] * 7
    assert rows[-1].tolist() == [4, 5, 6, 7, 8, 8, 8, 8]
    assert mask[-1].tolist() == [True] * 5 + [False] * 3
    assert len(rows) == 6


def test_no_episodes_give_no_windows() -> None:
    windows = make_windows(np.array([4]), horizon=4, n_obs_steps=1, n_action_steps=2, episodes=np.zeros(0, int))
    assert len(windows) == 0


@pytest.mark.parametrize(("horizon", "n_obs_steps", "n_action_steps"), [(8, 2, 8), (8, 0, 4), (8, 2, 0)])
def test_steps_that_do_not_fit_are_refused(horizon: int, n_obs_steps: int, n_action_steps: int) -> None:
    with pytest.raises(InputError, match=f"horizon {horizon}"):
        make_windows(np.array([9]), horizon=horizon, n_obs_steps=n_obs_steps, n_action_steps=n_action_steps)


@given(st.integers(2, 300), st.floats(0, 0.99), st.integers(0, 5))
def test_a_split_is_a_partition_and_repeats(n: int, fraction: float, seed: int) -> None:
    train, validation = split_episodes(n, fraction, seed)
    assert sorted([*train, *validation]) == list(range(n))
    assert len(train) >= 1
    assert (len(validation) >= 1) == (fraction > 0)
    again = split_episodes(n, fraction, seed)
    assert (train.tolist(), validation.tolist()) == (again[0].tolist(), again[1].tolist())


def test_a_split_depends_on_its_seed_and_refuses_what_makes_no_sense() -> None:
    assert split_episodes(100, 0.1, 0)[1].tolist() != split_episodes(100, 0.1, 1)[1].tolist()
    assert len(split_episodes(206, 0.05, 0)[1]) == 10
    with pytest.raises(InputError, match="fraction 1"):
        split_episodes(10, 1.0, 0)
    with pytest.raises(InputError, match="one episode"):
        split_episodes(1, 0.1, 0)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 3), st.integers(0, 3), st.integers(0, 4))
def test_an_epoch_draws_no_sample_twice_whatever_the_processes(
    n: int, batch_size: int, world: int, seed: int, epoch: int
) -> None:
    if batch_size * world > n:
        with pytest.raises(InputError, match=f"at most {n // world}"):
            steps_per_epoch(n, batch_size, world)
        return
    per_epoch = steps_per_epoch(n, batch_size, world)
    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    drawn = np.concatenate(
        [batch_indices(n, batch_size, seed, step, rank, world) for step in steps for rank in range(world)]
    )
    assert drawn.tolist() == epoch_order(n, seed, epoch)[: per_epoch * batch_size * world].tolist()
    assert len(set(drawn.tolist())) == len(drawn)
    # as one process with a larger batch
    large = [batch_indices(n, batch_size * world, seed, step) for step in steps]
    assert np.concatenate(large).tolist() == drawn.tolist()


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
