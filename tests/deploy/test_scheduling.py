"""Chunk scheduling: whatever arrives whenever, a command is meant for the step that executes it, or there is none.

Chunks here say what they are: row i of the chunk predicted at step o is (the instant it is meant for, number, i).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from action_diffusion.errors import InputError
from action_diffusion.policy.action_queue import (
    ENSEMBLE_DECAY,
    SCHEDULINGS,
    ActionQueue,
    DelayEstimator,
    Request,
    Swap,
    check_room,
)
from action_diffusion.policy.agent import Agent

TO = 2


def telling(origin: int, number: int, horizon: int) -> np.ndarray:
    now = np.arange(horizon) - (TO - 1)
    return np.stack([origin + now, np.full(horizon, number), now], axis=1).astype(float)


@dataclass
class Played:
    """What happened at every step."""

    steps: list[int] = field(default_factory=list)
    commands: list[np.ndarray | None] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    swaps: list[tuple[int, Swap | None]] = field(default_factory=list)
    arrived: dict[int, int] = field(default_factory=dict)
    waiting: list[bool] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)


def play(
    scheduling: str,
    *,
    delays: Any,
    steps: Any = range(60),
    s: int = 4,
    horizon: int = 16,
    refuse: Any = lambda number: False,
) -> Played:
    """Drive a queue through `steps`; chunk number n takes `delays(n)` of them."""
    queue = ActionQueue(scheduling, n_obs_steps=TO, execution_horizon=s)
    played, due = Played(), None

    def arrive(step: int) -> None:
        nonlocal due
        if due is None or step < due:
            return
        due = None
        number, origin = len(played.requests) - 1, played.requests[-1].step
        chunk = telling(origin, number, horizon)
        if refuse(number):
            chunk[-1] = np.nan
            with pytest.raises(InputError, match="NaN or infinity"):
                queue.receive(chunk)
            played.refused.append(number)
            return
        played.swaps.append((step, queue.receive(chunk)))
        played.arrived[number] = step

    for step in steps:
        queue.begin_step(step)
        arrive(step)
        if queue.wants_chunk:
            played.requests.append(queue.request())
            due = step + delays(len(played.requests) - 1)
            arrive(step)
        played.steps.append(step)
        played.commands.append(queue.command())
        played.waiting.append(due is not None)
    return played


# Whatever happens.


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_every_command_is_meant_for_its_step_by_a_chunk_that_was_there(data):
    scheduling = data.draw(st.sampled_from(SCHEDULINGS))
    s = data.draw(st.integers(1, 9))
    horizon = data.draw(st.integers(s + TO - 1, 20))
    drawn = data.draw(st.lists(st.integers(0, 25), min_size=1, max_size=20))
    refused = data.draw(st.sets(st.integers(0, 20)))
    passing = data.draw(st.lists(st.sampled_from([1, 1, 1, 1, 2, 7]), min_size=10, max_size=80))
    played = play(
        scheduling,
        delays=lambda number: drawn[number % len(drawn)],
        steps=np.cumsum(passing).tolist(),
        s=s,
        horizon=horizon,
        refuse=refused.__contains__,
    )
    length = horizon - TO + 1
    origins = [request.step for request in played.requests]
    for step, command, waiting in zip(played.steps, played.commands, played.waiting, strict=True):
        there = [
            number for number, at in played.arrived.items() if at <= step and origins[number] + length > step
        ]  # arrived, and not at their end
        if scheduling == "sync":
            assert command is None or not waiting
        elif there:
            assert command is not None
        if command is None:
            continue
        assert there
        assert command[0] == pytest.approx(step)
        assert 0 <= command[2] < length
        if scheduling == "ensemble":
            assert min(there) <= command[1] <= max(there)
        else:
            assert command[1] == max(there)
            assert command[2] == step - origins[int(command[1])]
    for (at, swap), (number, arrived) in zip(played.swaps, played.arrived.items(), strict=True):
        assert at == arrived
        if swap is None:
            assert at - origins[number] >= length
            continue
        assert swap.delay == at - origins[number]
        assert swap.new[0] == pytest.approx(at)
        assert swap.running is None or swap.running[0] == pytest.approx(at)
    for request in played.requests:
        if request.running is not None:
            assert scheduling == "rtc"
            assert request.running[:, 0].tolist() == list(
                range(request.step, request.step + len(request.running))
            )  # what is fixed begins now


@given(st.sampled_from(SCHEDULINGS), st.integers(0, 8), st.integers(1, 10))
def test_with_a_steady_delay_every_chunk_gives_as_many_commands(scheduling, d, s):
    horizon = TO - 1 + max(s, d) + d + s
    played = play(scheduling, delays=lambda number: d, s=s, horizon=horizon, steps=range(100))
    first = played.swaps[0][0]
    assert first == d
    swapped = [at for at, _ in played.swaps]
    gaps = set(np.diff(swapped).tolist())
    holds = [command is None for command in played.commands[first:]]
    if scheduling == "sync":
        assert gaps == {s + d}
        assert sum(holds[: (s + d) * 3]) == 3 * d
    else:
        assert gaps == {max(s, d, 1)}
        assert not any(holds)
    if scheduling in ("naive", "rtc"):
        used = [int(command[2]) for command in played.commands[first:] if command is not None]
        assert max(used) <= max(s, d) + d - 1


def test_without_delay_all_but_the_ensemble_execute_what_the_agent_does():
    chunks = [np.random.default_rng(number).normal(size=(16, 3)) for number in range(20)]
    agent = Agent(n_obs_steps=TO, n_action_steps=4)
    expected, number = [], 0
    for _ in range(40):
        if agent.needs_chunk:
            agent.accept(chunks[number])
            number += 1
        expected.append(agent.act())
    for scheduling in ("sync", "naive", "rtc"):
        queue = ActionQueue(scheduling, n_obs_steps=TO, execution_horizon=4)
        asked = 0
        for step in range(40):
            queue.begin_step(step)
            if queue.wants_chunk:
                queue.request()
                queue.receive(chunks[asked])
                asked += 1
            command = queue.command()
            assert command is not None
            assert np.array_equal(command, expected[step])


# What each does.


def test_the_picture():
    """As in the module's docstring: which chunk and which of its actions each step has, with s = 4 and d = 2."""

    def row(scheduling: str) -> str:
        played = play(scheduling, delays=lambda number: 2, steps=range(2, 16))
        return " ".join(
            "–" if command is None else f"{'abcd'[int(command[1])]}{int(command[2])}" for command in played.commands[2:]
        )

    assert row("sync") == "a2 a3 a4 a5 – – b2 b3 b4 b5 – –"
    assert row("naive") == row("rtc") == "a2 a3 a4 a5 b2 b3 b4 b5 c2 c3 c4 c5"


def test_the_ensemble_is_acts():
    queue = ActionQueue("ensemble", n_obs_steps=1, execution_horizon=2)
    values = [1.0, 5.0, 11.0]
    for number, step in enumerate([0, 2, 4]):
        queue.begin_step(step)
        queue.request()
        swap = queue.receive(np.full((8, 1), values[number]))
    weights = np.exp(-ENSEMBLE_DECAY * np.arange(3))
    mean = weights @ values / weights.sum()
    assert queue.command() == pytest.approx([mean])
    before = weights[:2] @ values[:2] / weights[:2].sum()
    assert swap is not None
    assert swap.jump == pytest.approx(mean - before)
    queue.begin_step(8)  # the first has ended
    assert queue.command() == pytest.approx([weights[:2] @ values[1:] / weights[:2].sum()])
    queue.begin_step(12)
    assert queue.command() is None


def test_real_time_chunking_asks_for_what_continues_the_running_chunk():
    played = play("rtc", delays=lambda number: 3, s=5, horizon=16)
    first, second = played.requests[:2]
    assert (first.step, first.running) == (0, None)
    assert second.step == 5
    assert second.delay == 3
    assert second.running is not None
    assert second.running[:, 2].tolist() == list(range(5, 15))
    for scheduling in ("sync", "naive", "ensemble"):
        assert all(request.running is None for request in play(scheduling, delays=lambda number: 3).requests)


def test_a_jump_is_between_commands_for_the_same_instant():
    queue = ActionQueue("naive", n_obs_steps=TO, execution_horizon=4)
    queue.begin_step(0)
    queue.request()
    first = queue.receive(np.arange(16.0)[:, None] * [3.0, 4.0])
    assert first is not None
    assert first.jump is None
    queue.begin_step(4)
    queue.request()
    queue.begin_step(6)
    swap = queue.receive(np.arange(16.0)[:, None] * [3.0, 4.0])
    assert swap is not None
    assert swap.delay == 2
    assert swap.new.tolist() == [9.0, 12.0]  # step 3 of it, 2 after its observation
    assert swap.running is not None
    assert swap.running.tolist() == [21.0, 28.0]
    assert swap.jump == pytest.approx(20.0)


def test_what_will_be_seen_is_known_before_it_is_looked_at():
    for scheduling in SCHEDULINGS:
        queue = ActionQueue(scheduling, n_obs_steps=TO, execution_horizon=4)
        seen, asked = [], []
        for step in range(20):
            queue.begin_step(step)
            if queue.will_be_seen:
                seen.append(step)
            if queue.wants_chunk:
                queue.request()
                asked.append(step)
                queue.receive(telling(step, 0, 16))
        assert seen == [0, 3, 4, 7, 8, 11, 12, 15, 16, 19]
        assert asked == [0, 4, 8, 12, 16]


# The forecast of the delay.


def test_a_spike_inflates_no_forecast_for_ever():
    delays = DelayEstimator(window=20, quantile=0.9, first=3)
    assert delays.forecast() == 3
    delays.add(2)
    delays.add(40)
    assert delays.forecast() == 40  # two measurements: it may be usual
    for _ in range(18):
        delays.add(2)
    assert delays.forecast() == 2
    for _ in range(3):
        delays.add(9)
    assert delays.forecast() == 9  # three in twenty are not rare
    for _ in range(20):
        delays.add(2)
    assert delays.forecast() == 2


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=60),
    st.integers(1, 30),
    st.floats(0.01, 1.0),
)
def test_a_forecast_is_the_smallest_that_covers_its_share_of_the_window(measured, window, quantile):
    delays = DelayEstimator(window=window, quantile=quantile)
    for value in measured:
        delays.add(value)
    last, found = np.array(measured[-window:]), delays.forecast()
    assert found in last
    assert (last <= found).mean() >= quantile - 1e-9
    assert (last < found).mean() < quantile + 1e-9


def test_the_measured_delay_reaches_the_next_request_and_the_next_episode():
    queue = ActionQueue("rtc", n_obs_steps=TO, execution_horizon=4)
    queue.begin_step(0)
    queue.request()
    queue.begin_step(5)
    queue.receive(telling(0, 0, 16))
    assert queue.request().delay == 5
    queue.reset()
    queue.begin_step(0)
    assert queue.request().delay == 5
    assert queue.command() is None


# What is refused.


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (np.zeros((4, 2)), r"shape \[4, 2\].*need \[H >= 5, A\]"),
        (np.zeros(16), r"shape \[16\]"),
        (np.full((16, 2), np.inf), "NaN or infinity at step 1"),
    ],
)
def test_bad_chunks_are_refused_and_asked_for_again(chunk, message):
    queue = ActionQueue("naive", n_obs_steps=TO, execution_horizon=4)
    queue.begin_step(0)
    queue.request()
    with pytest.raises(InputError, match=message):
        queue.receive(chunk)
    assert queue.wants_chunk
    assert queue.command() is None
    queue.request()
    queue.drop()
    assert queue.wants_chunk


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ActionQueue("rct", n_obs_steps=2, execution_horizon=4),
            "unknown scheduling 'rct': did you mean rtc",
        ),
        (lambda: ActionQueue("rtc", n_obs_steps=0, execution_horizon=4), "n_obs_steps is 0"),
        (lambda: ActionQueue("rtc", n_obs_steps=2, execution_horizon=0), "execution_horizon is 0"),
        (lambda: DelayEstimator(window=0), "window=0"),
        (lambda: DelayEstimator(quantile=0.0), "quantile=0.0"),
        (
            lambda: check_room("rtc", horizon=16, n_obs_steps=2, execution_horizon=4, delay=8),
            "delay=8 uses 16 steps of a chunk, 8 of them while .* horizon=16 leaves 15",
        ),
        (
            lambda: check_room("sync", horizon=16, n_obs_steps=2, execution_horizon=8, delay=8),
            "scheduling=sync with delay=8 uses 16 steps",
        ),
    ],
)
def test_impossible_values_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
    check_room("rtc", horizon=32, n_obs_steps=2, execution_horizon=8, delay=8)
    check_room("sync", horizon=16, n_obs_steps=2, execution_horizon=4, delay=8)


def test_misuse_is_an_error():
    queue = ActionQueue("naive", n_obs_steps=TO, execution_horizon=4)
    queue.begin_step(3)
    with pytest.raises(ValueError, match="control step 2 after 3"):
        queue.begin_step(2)
    with pytest.raises(RuntimeError, match="without a request"):
        queue.receive(telling(0, 0, 16))
    queue.request()
    assert not queue.wants_chunk
    with pytest.raises(RuntimeError, match="under way"):
        queue.request()
