"""Windows drawn by weights: the share is the weights' in every stretch of a run, and all is a function of the step."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from action_diffusion.datasets import ReplayBuffer
from action_diffusion.datasets.batches.joining import joined
from action_diffusion.datasets.batches.mixing import NONE, Draws, parts_of, table
from action_diffusion.errors import InputError
from action_diffusion.policy.model.normalizer import fit
from action_diffusion.policy.spec import IN_FRAME, ActionSpec, ObservationSpec, PolicySpec
from action_diffusion.training.data import StepBatches, TrainingData, prepare

WEIGHTS = {"weights": [0.7, 0.3]}


def buffer(values: list[float], length: int, attrs: dict[str, Any] | None = None, **columns: Any) -> ReplayBuffer:
    """An episode for each of `values`, which is its state; the action counts its rows."""
    state = np.repeat(np.array(values, np.float32), length)[:, None]
    action = np.tile(np.arange(length, dtype=np.float32), len(values))[:, None]
    ends = np.arange(1, len(values) + 1) * length
    arrays = {"state": state, "action": action, **columns}
    return ReplayBuffer.from_arrays(arrays, ends, {"control_rate": 10, **(attrs or {})})


def pair() -> ReplayBuffer:
    """Ten episodes of state 0, and two of state 1, twenty rows each."""
    return joined([buffer([0.0] * 10, 20), buffer([1.0] * 2, 20)], ["state", "action"])


SPEC = PolicySpec(
    observations={"state": ObservationSpec(shape=(1,), source="state")},
    action=ActionSpec(shape=(1,), source="action"),
    n_obs_steps=2,
    horizon=8,
    n_action_steps=4,
    control_rate=10.0,
)


def prepared(whole: ReplayBuffer, dataset: dict[str, Any], names: list[str], **options: Any) -> TrainingData:
    given: dict[str, Any] = {"val_fraction": 0.0, "seed": 0, "device": torch.device("cpu")} | options
    return prepare(whole, SPEC, parts=parts_of(whole, dataset, names), **given)


def batches(data: TrainingData, rank: int = 0, world: int = 1) -> StepBatches:
    return StepBatches(data.train, seed=0, rank=rank, world=world, draws=data.draws(0))


shares = (
    st.lists(st.integers(0, 20), min_size=1, max_size=5)
    .filter(any)
    .map(lambda numbers: [Fraction(number, sum(numbers)) for number in numbers])
)


@given(shares, st.integers(1, 40), st.integers(0, 10**9), st.integers(1, 3))
def test_every_stretch_of_a_run_has_the_share(parts: list[Fraction], batch_size: int, step: int, world: int) -> None:
    of_window = np.repeat(np.arange(len(parts)), 7)
    draws = Draws(of_window, parts, seed=0)
    batch = np.concatenate([draws.batch(batch_size, step, rank, world) for rank in range(world)])
    found = np.bincount(of_window[batch], minlength=len(parts))
    assert len(batch) == batch_size * world
    assert all(abs(count - share * len(batch)) <= len(parts) for count, share in zip(found, parts, strict=True))
    assert all(count == 0 for count, share in zip(found, parts, strict=True) if share == 0)


def test_the_share_of_windows_is_the_weights_within_a_percent() -> None:
    data = prepared(pair(), WEIGHTS, ["a.zarr", "b.zarr"])
    source = batches(data)
    states = torch.cat([source.batch(step, 16, torch.Generator()).obs["state"][:, 0, 0] for step in range(50)])
    assert float(states.mean()) == pytest.approx(0.3, abs=0.002)
    early = torch.cat([source.batch(step, 16, torch.Generator()).obs["state"][:, 0, 0] for step in range(3)])
    assert float(early.mean()) == pytest.approx(0.3, abs=0.02)  # 14 or 15 of 48


def test_a_part_is_gone_through_in_turns() -> None:
    of_window = np.array([0, 1, 0, 1, 1])
    draws = Draws(of_window, [Fraction(1, 2), Fraction(1, 2)], seed=3)
    drawn = np.concatenate([draws.batch(6, step) for step in range(8)])
    for part, n in ((0, 2), (1, 3)):
        of_part = drawn[of_window[drawn] == part]
        assert len(of_part) == 24
        assert (np.bincount(of_part, minlength=5)[of_window == part] == 24 // n).all()


def test_a_batch_is_a_function_of_seed_and_step_and_processes_share_it() -> None:
    of_window = np.repeat([0, 1, 2], [50, 400, 7])
    parts = [Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)]
    steps = [4, 90, 4, 0, 1]
    one = [Draws(of_window, parts, 0).batch(32, step) for step in steps]
    again = Draws(of_window, parts, 0)
    for step, batch in zip(steps, one, strict=True):  # in another order of steps, on the way
        assert again.batch(32, step).tolist() == batch.tolist()
    assert sorted(one[0]) != sorted(Draws(of_window, parts, 1).batch(32, 4))
    halves = [Draws(of_window, parts, 0).batch(16, 4, rank, 2) for rank in (0, 1)]
    assert sorted(np.concatenate(halves)) == sorted(one[0])


def test_processes_draw_disjoint_windows() -> None:
    draws = Draws(np.repeat([0, 1], [60, 60]), [Fraction(7, 10), Fraction(3, 10)], 0)
    first_turn = [draws.batch(8, step, rank, 2) for step in range(5) for rank in (0, 1)]
    drawn = np.concatenate(first_turn)
    assert len(set(drawn.tolist())) == len(drawn) == 80


def test_parts_are_mixed_within_a_batch() -> None:
    """Objectives take the first rows of a batch for something else."""
    of_window = np.repeat([0, 1], 100)
    batch = of_window[Draws(of_window, [Fraction(1, 2)] * 2, 0).batch(64, 0)]
    assert 8 < batch[:32].sum() < 24


def test_each_data_set_holds_out_episodes_of_its_own() -> None:
    data = prepared(pair(), WEIGHTS, ["a.zarr", "b.zarr"], val_fraction=0.1)
    assert data.held_out is not None
    held_out = np.unique(data.part_of_windows(data.held_out), return_counts=True)
    assert held_out[0].tolist() == [0, 1]
    assert held_out[1][0] == held_out[1][1]  # an episode of each
    lines = data.table()
    assert [line.split() for line in lines] == [
        ["trained", "on", "episodes", "held", "out", "windows", "weight", "share"],
        ["a.zarr", "9", "1", "153", "0.7", "70.0", "%"],
        ["b.zarr", "1", "1", "17", "0.3", "30.0", "%"],
    ]
    assert len(set(map(len, lines))) == 1


def test_without_weights_the_table_says_what_there_is() -> None:
    data = prepared(pair(), {}, ["a/demos.zarr", "b/demos.zarr"])
    assert data.draws(0) is None
    assert [line.split() for line in data.table()[1:]] == [
        ["a/demos.zarr", "10", "0", "170", "83.3", "%"],
        ["b/demos.zarr", "2", "0", "34", "16.7", "%"],
    ]
    alone = buffer([0.0], 20)
    assert prepared(alone, {}, ["a.zarr"]).table() == []


def test_a_weight_of_zero_leaves_a_data_set_out() -> None:
    data = prepared(pair(), {"weights": [0, 2]}, ["a.zarr", "b.zarr"], val_fraction=0.5)
    assert data.held_out is not None
    assert set(data.part_of_windows(data.train)) == set(data.part_of_windows(data.held_out)) == {1}
    assert data.table()[1].split() == ["a.zarr", "0", "0", "0", "0", "0.0", "%"]


@pytest.mark.parametrize("kind", ["minmax", "gaussian"])
def test_statistics_are_those_of_what_is_drawn(kind: str) -> None:
    """With the share w of state 1, the mean is w, the deviation (w (1 - w))^½; the smallest and largest are of all."""
    data = prepared(pair(), WEIGHTS, ["a.zarr", "b.zarr"])
    found = fit(data.statistics_rows("state"), kind, data.statistics_weights("state"))
    assert (found["min"], found["max"]) == ([0.0], [1.0])
    if kind == "gaussian":
        assert found["scale"] == pytest.approx([(0.7 * 0.3) ** -0.5], rel=1e-6)
        assert found["offset"] == pytest.approx([-0.3 * (0.7 * 0.3) ** -0.5], rel=1e-6)
    else:
        assert (found["scale"], found["offset"]) == ([2.0], [-1.0])


def test_chunks_count_as_they_are_drawn() -> None:
    data = prepared(pair(), WEIGHTS, ["a.zarr", "b.zarr"])
    weights, states = data.statistics_weights(IN_FRAME), data.chunks("state")[0][:, 0]
    assert weights is not None
    assert np.average(states, weights=weights) == pytest.approx(0.3)


def test_rotations_that_are_written_twice_keep_their_weights() -> None:
    from action_diffusion.rotations import RotationColumns

    data = prepared(pair(), WEIGHTS, ["a.zarr", "b.zarr"])
    data.train._rotations["state"] = (RotationColumns(0, "angle", (3.0,)),)  # 0 may be 0 or 2 pi beside it
    assert len(data.statistics_rows("state")) == len(data.statistics_weights("state"))


def tasks() -> ReplayBuffer:
    index = np.repeat([0, 1, 1, 0, 2], 20)
    words = ["lift the cube", "open it", "push"]
    return buffer([0.0, 1.0, 1.0, 0.0, 2.0], 20, {"tasks": words}, task_index=index)


def test_weights_of_tasks() -> None:
    dataset = {"task_weights": {"open it": 3, "lift the cube": 1, "push": 0}}
    parts = parts_of(tasks(), dataset, ["a.zarr"])
    assert parts.names == ("open it", "lift the cube", "push")
    assert parts.of_episode.tolist() == [1, 0, 0, 1, NONE]
    data = prepared(tasks(), dataset, ["a.zarr"])
    states = batches(data).batch(0, 64, torch.Generator()).obs["state"][:, 0, 0]
    assert float(states.mean()) == 0.75


def subsets(**members: list[int]) -> ReplayBuffer:
    attrs = {
        "demos": [f"demo_{i}" for i in range(4)],
        "subsets": {name: [f"demo_{i}" for i in which] for name, which in members.items()},
    }
    return buffer([0.0, 1.0, 2.0, 3.0], 20, attrs, demo=np.repeat(np.arange(4, dtype=np.int32), 20))


def test_weights_of_subsets_leave_other_episodes_out() -> None:
    parts = parts_of(subsets(better=[0, 1], worse=[3]), {"subset_weights": {"worse": 1, "better": 3}}, ["a.zarr"])
    assert parts.of_episode.tolist() == [1, 1, NONE, 0]


@pytest.mark.parametrize(
    ("whole", "dataset", "message"),
    [
        (tasks, {"task_weights": {"open": 1}}, r"unknown task 'open' in dataset.task_weights of .*open it"),
        (tasks, {"task_weights": {"open it": 1, "push": 1}}, "no weight for the task 'lift the cube'"),
        (
            lambda: subsets(better=[0, 1], worse=[1]),
            {"subset_weights": {"better": 1, "worse": 1}},
            "episode 1 of .* is in both better and worse",
        ),
        (lambda: subsets(better=[0]), {"subset_weights": {"worse": 1}}, "unknown subset 'worse'"),
        (lambda: subsets(better=[]), {"subset_weights": {"better": 1}}, "better has the weight 1, and no episode"),
        (pair, {"weights": [1, 1, 1]}, "dataset.weights has 3 values, and data= names 2 data sets"),
    ],
)
def test_what_has_no_weight_or_no_episode_is_named(whole: Any, dataset: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parts_of(whole(), dataset, ["a.zarr", "b.zarr"])


def test_a_part_that_is_not_left_by_other_options_is_named() -> None:
    with pytest.raises(InputError, match=r"b.zarr has the weight 0.3, and no episode .* dataset.max_episodes=4"):
        prepared(pair(), WEIGHTS, ["a.zarr", "b.zarr"], max_episodes=4)


def test_a_long_name_does_not_widen_the_table() -> None:
    parts = parts_of(tasks(), {"task_weights": {"open it": 3, "lift the cube": 1, "push": 0}}, ["a.zarr"])
    long = type(parts)(("x" * 500, *parts.names[1:]), parts.weights, parts.of_episode)
    counts = np.array([2, 2, 0])
    assert max(map(len, table(long, counts, counts, counts))) < 120
