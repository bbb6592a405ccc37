"""Deployment: on time, never unsafe, and in a simulator bit for bit what evaluation measured."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from deployments import HORIZON, TA, TO, deploy, read_log, save_bundle
from hypothesis import given, settings
from hypothesis import strategies as st

from action_diffusion import cli, envs
from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.loop.clock import MonotonicClock, Pacer, VirtualClock
from action_diffusion.deploy.loop.episode import run_episode
from action_diffusion.deploy.loop.events import StepRecord
from action_diffusion.deploy.loop.gate import Gate, demonstrated
from action_diffusion.deploy.loop.inference_worker import InferenceWorker
from action_diffusion.deploy.records.run_log import RunLog
from action_diffusion.deploy.robot.robots import Observation, SimPushT
from action_diffusion.deploy.run import run
from action_diffusion.envs.rollout import rollout
from action_diffusion.errors import InputError
from action_diffusion.options import configuration
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.action_queue import SCHEDULINGS, ActionQueue
from action_diffusion.policy.history import History
from action_diffusion.policy.model.normalizer import fit
from action_diffusion.policy.spec import ActionSpec, ObservationSpec


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bundle(tmp_path_factory.mktemp("deploy") / "bundle")


# On a fake robot, with a clock that only moves when told to.


class FakeRobot:
    """Counts; its observation is the number of commands so far."""

    control_rate = 10.0
    limits: Limits | None = None
    lookahead = 0
    processes = None

    def __init__(self, *, max_steps: int = 12) -> None:
        self.max_steps = max_steps
        self.commands: list[np.ndarray] = []
        self.observed: list[int] = []
        self.plans: list[tuple[float, list[np.ndarray]]] = []
        self.age = 0.0
        self.steps = self.holds = self.stops = 0

    def begin(self, seed: int) -> None:
        self.steps = 0

    def observe(self, keys: Sequence[str], t: float) -> Observation:
        self.observed.append(self.steps)
        return Observation(t - self.age, {key: np.array([self.steps], np.float32) for key in keys})

    def command(self, actions: Sequence[np.ndarray], t: float) -> tuple[float | None, bool]:
        self.commands.append(actions[0])
        self.plans.append((t, list(actions)))
        return self._pass()

    def events(self) -> list[str]:
        return []

    def hold(self) -> tuple[float | None, bool]:
        self.holds += 1
        return self._pass()

    def _pass(self) -> tuple[float | None, bool]:
        self.steps += 1
        return None, False

    def stop(self) -> None:
        self.stops += 1

    def close(self) -> None:
        pass


class FakePolicy:
    """Its chunk number n is `chunks(n)`, [H, 2]; a prediction takes `seconds(n)` of the clock."""

    spec = SimpleNamespace(n_obs_steps=TO, n_action_steps=TA)

    def __init__(self, chunks: Any, *, clock: VirtualClock, seconds: Any = lambda n: 0.0) -> None:
        self.chunks, self.clock, self.seconds = chunks, clock, seconds
        self.calls = 0

    def predict(
        self,
        obs: Mapping[str, np.ndarray],
        *,
        noise_generator: list[torch.Generator],
        generator: list[torch.Generator],
    ) -> dict[str, np.ndarray]:
        chunk = self.chunks(self.calls)
        self.clock.advance(self.seconds(self.calls))
        self.calls += 1
        return {"action_pred": chunk[None]}


def still(n: int) -> np.ndarray:
    return np.full((HORIZON, 2), 5.0)


def drive(
    robot: FakeRobot, policy: FakePolicy, *, limits: Limits | None = None, scheduling: str = "sync", **options: Any
) -> list[StepRecord]:
    records: list[StepRecord] = []
    run_episode(
        policy=policy,
        robot=robot,
        history=History(TO),
        queue=ActionQueue(scheduling, n_obs_steps=TO, execution_horizon=TA),
        gate=Gate(limits=limits or Limits(low=np.zeros(2), high=np.full(2, 10.0))),
        clock=policy.clock,
        log=records.append,
        seed=0,
        keys=["count"],
        **options,
    )
    return records


def test_a_command_at_every_tick_and_a_chunk_every_few():
    robot, policy = FakeRobot(), FakePolicy(still, clock=VirtualClock())
    records = drive(robot, policy)
    assert [record.t for record in records] == pytest.approx(np.arange(12) / 10)
    assert [record.inference_ms is not None for record in records] == [True, False, False, False] * 3
    assert all(record.lateness_ms == 0 and not record.missed_ticks for record in records)
    assert len(robot.commands) == 12
    assert robot.stops == 1


def test_only_what_the_policy_looks_at_is_observed():
    robot = FakeRobot()
    drive(robot, FakePolicy(still, clock=VirtualClock()))
    assert robot.observed == [0, 3, 4, 7, 8, 11]


def test_ticks_that_pass_during_inference_are_counted_and_not_made_up_for():
    policy = FakePolicy(still, clock=VirtualClock(), seconds=lambda n: 0.25 if n == 1 else 0.01)
    records = drive(FakeRobot(), policy)
    ticks = [round(record.t - record.lateness_ms / 1e3, 6) for record in records]
    assert ticks == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3])
    assert [record.missed_ticks for record in records] == [0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0]
    assert records[4].lateness_ms == pytest.approx(250)
    assert records[4].inference_ms == pytest.approx(250)


def test_an_arm_that_moves_smoothly_is_told_what_comes_next_and_when():
    """Of the running chunk, as far as it would be executed and the gate lets it pass."""
    robot = FakeRobot()
    robot.lookahead, robot.age = 2, 0.03
    limits = Limits(low=np.full(2, -1.0), high=np.full(2, 7.5))
    records = drive(robot, TellingPolicy(clock=VirtualClock()), limits=limits)
    assert [t for t, _ in robot.plans[:5]] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    told = [[action[0] for action in actions] for _, actions in robot.plans]
    assert told[:6] == [[0, 1, 2], [1, 2, 3], [2, 3], [3], [4, 5, 6], [5, 6, 7]]
    assert told[6:8] == [[6, 7], [7]]
    ages = [record.observation_age_ms for record in records]
    assert [age for age in ages if age is not None] == pytest.approx([30.0] * len([age for age in ages if age]))
    assert ages[1] is None


def test_what_the_robots_own_guards_did_is_in_the_log():
    class Guarded(FakeRobot):
        def events(self) -> list[str]:
            return ["stop: camera front is silent"] if self.steps == 3 else []

    records = drive(Guarded(), FakePolicy(still, clock=VirtualClock()))
    assert [record.interventions for record in records[:4]] == [[], [], ["stop: camera front is silent"], []]


# Chunk scheduling in the loop. The policy's clock may be real: then it sleeps.


class TellingPolicy(FakePolicy):
    """Its chunks say for which control step each action is meant, from the last observation on: (step, chunk)."""

    def __init__(self, *, clock: Any, seconds: Any = lambda n: 0.0) -> None:
        super().__init__(None, clock=clock, seconds=seconds)

    def predict(self, obs: Mapping[str, np.ndarray], **_: Any) -> dict[str, np.ndarray]:
        now = float(obs["count"][0, -1, 0])
        self.clock.sleep_until(self.clock.now() + self.seconds(self.calls))
        steps = now + np.arange(16) - (TO - 1)
        self.calls += 1
        return {"action_pred": np.stack([steps, np.full(16, self.calls - 1)], axis=1)[None]}


def held(records: list[StepRecord]) -> str:
    return "".join("-" if record.held else "x" for record in records)


WIDE = Limits(low=np.full(2, -100.0), high=np.full(2, 1000.0))


def test_an_injected_delay_holds_a_synchronous_robot_and_no_other():
    expected = {"sync": "--xxxx--xxxx--xxxx--", "naive": "--" + 18 * "x", "ensemble": "--" + 18 * "x"}
    for scheduling, pattern in expected.items():
        robot = FakeRobot(max_steps=20)
        policy = TellingPolicy(clock=VirtualClock())
        records = drive(robot, policy, limits=WIDE, scheduling=scheduling, delay=2)
        assert held(records) == pattern
        sent = [record.action[0] for record in records if record.action is not None and not record.held]
        steps = [record.step for record in records if not record.held]
        assert sent == pytest.approx(steps)  # every command was meant for its step
        assert {record.delay for record in records if record.delay is not None} == {2}
        assert not any(record.interventions for record in records)
        first = next(record.step for record in records if record.jump is not None)
        assert first == (8 if scheduling == "sync" else 6)


def test_actions_that_became_late_while_the_loop_was_thinking_are_dropped():
    policy = TellingPolicy(clock=VirtualClock(), seconds=lambda n: 0.25 if n == 1 else 0.01)
    records = drive(FakeRobot(), policy, limits=WIDE)
    assert [record.delay for record in records if record.delay is not None] == [0, 2, 0]
    # The robot counts commands, 4 before that observation; the ticks of 5 and 6 pass while the policy thinks.
    assert [record.action[0] for record in records[:8]] == [0, 1, 2, 3, 6, 7, 8, 9]
    assert records[4].lateness_ms == pytest.approx(250)
    assert [record.missed_ticks for record in records[4:6]] == [0, 2]


def test_a_chunk_that_comes_after_its_end_is_said_and_not_executed():
    policy = TellingPolicy(clock=VirtualClock(), seconds=lambda n: 2.0 if n == 0 else 0.0)
    records = drive(FakeRobot(), policy, limits=WIDE)
    assert records[0].held
    assert records[0].interventions == ["the chunk arrived after all of its actions were due"]
    assert held(records[1:]) == 11 * "x"


@pytest.mark.slow
@pytest.mark.parametrize("scheduling", ["naive", "ensemble"])
@pytest.mark.alone
def test_beside_the_loop_a_slow_policy_delays_no_command(scheduling):
    """At 50 Hz a chunk takes 70 ms: four control steps, during which the running chunk goes on."""
    robot = FakeRobot(max_steps=40)
    robot.control_rate = 50.0
    policy = TellingPolicy(clock=MonotonicClock(), seconds=lambda n: 0.07)
    began = time.monotonic()
    records = drive(robot, policy, limits=WIDE, scheduling=scheduling, beside=True)
    assert time.monotonic() - began < 4
    first = next(record.step for record in records if not record.held)
    assert first >= 3
    assert all(record.lateness_ms < 60 for record in records)
    delays = [record.delay for record in records if record.delay is not None]
    assert len(delays) >= 3
    assert min(delays) >= 3
    assert all(record.inference_ms >= 69 for record in records if record.inference_ms is not None)
    if not any(record.missed_ticks for record in records):  # on a machine that keeps up, what is sent is for now
        assert held(records[first:]) == "x" * (40 - first)
        assert [record.action[0] for record in records[first:]] == pytest.approx([r.step for r in records[first:]])


def test_a_policy_that_fails_beside_the_loop_stops_the_robot():
    class Broken(TellingPolicy):
        def predict(self, obs: Mapping[str, np.ndarray], **_: Any) -> dict[str, np.ndarray]:
            raise ZeroDivisionError

    robot = FakeRobot()
    robot.control_rate = 100.0
    with pytest.raises(InputError, match="the policy failed: ZeroDivisionError"):
        drive(robot, Broken(clock=MonotonicClock()), scheduling="naive", beside=True)
    assert robot.stops == 1


# A guard says how unusual each chunk is.


class GuardedPolicy(TellingPolicy):
    """Its chunk number n has the level `levels[n]`; the last one stays."""

    def __init__(self, levels: Sequence[float], **options: Any) -> None:
        super().__init__(**options)
        self.levels = levels

    def predict(self, obs: Mapping[str, np.ndarray], **_: Any) -> dict[str, np.ndarray]:
        level = self.levels[min(self.calls, len(self.levels) - 1)]
        return {**super().predict(obs), "guard.level": np.array([level], np.float32), "other": np.zeros((1, 3))}


STRANGE = (-0.2, 0.4, 0.4, 0.4, 0.4, 0.4, -0.2)
"""An alarm from the sum of the third on, which is of chunk 3, at step 12."""


def guarded(action: str, levels: Sequence[float] = STRANGE, **options: Any) -> tuple[FakeRobot, list[StepRecord]]:
    robot = FakeRobot(max_steps=options.pop("max_steps", 24))
    policy = GuardedPolicy(levels, clock=VirtualClock(), **{"seconds": options.pop("seconds", lambda n: 0.0)})
    return robot, drive(robot, policy, limits=WIDE, guard=action, **options)


def test_a_guard_that_warns_is_heard_and_changes_nothing():
    robot, records = guarded("warn")
    assert [command[0] for command in robot.commands] == list(range(24))
    assert [record.guard_level for record in records if record.guard_level is not None] == pytest.approx(
        [0.0, 0.4, 0.8, 1.2, 1.6, 2.0]
    )
    assert [record.step for record in records if record.guard_alarm] == list(range(12, 24))
    assert [record.interventions for record in records if record.interventions] == [
        ["guard: unusual, level 1.20: warn"]
    ]


def test_a_guard_that_slows_down_lets_every_second_step_rest():
    """No action is left out; what the policy looks at is as far apart as what it commands."""
    robot, records = guarded("slow", (-0.2, 0.4, 0.4, 0.4, 0.4, -0.2), max_steps=32)
    assert held(records) == "x" * 12 + "x-x-x-x-" * 2 + "x" * 4
    assert [command[0] for command in robot.commands[:12]] == list(range(12))
    assert [command[0] for command in robot.commands[12:]] == [12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31]
    assert [t for t, _ in robot.plans[12:16]] == pytest.approx([1.2, 1.4, 1.6, 1.8])
    assert robot.observed[-5:] == [18, 20, 26, 28, 31]


def test_a_slow_arm_is_told_of_nothing_beyond_the_present_command():
    class Smooth(FakeRobot):
        lookahead = 2

    robot = Smooth(max_steps=20)
    policy = GuardedPolicy((0.4,), clock=VirtualClock())
    drive(robot, policy, limits=WIDE, guard="slow")
    told = [len(actions) for _, actions in robot.plans]
    assert told == [3, 3, 2, 1] * 2 + [1] * 6


@pytest.mark.parametrize("scheduling", ["sync", "naive"])
def test_a_guard_that_holds_asks_until_a_chunk_is_usual_again(scheduling):
    robot, records = guarded("hold", scheduling=scheduling)
    assert held(records) == "x" * 12 + "---" + "x" * 9
    assert [command[0] for command in robot.commands] == [*range(12), *range(15, 24)]
    assert all(record.interventions for record in records if record.held)


class Person:
    """Presses Start once the loop has asked for them."""

    def __init__(self) -> None:
        self.commands, self.mark, self.asked, self._fresh = False, None, 0, False

    def begin(self) -> None:
        pass

    def wait(self, hold: Any) -> bool:
        return True

    def begin_step(self) -> bool:
        fresh, self._fresh = self._fresh, False
        return fresh

    def ask_take_over(self) -> None:
        self.asked, self._fresh = self.asked + 1, True

    def command(self, t: float) -> np.ndarray | None:
        return None

    def end(self) -> None:
        pass


def test_a_guard_that_asks_for_a_person_begins_anew_with_them():
    person = Person()
    _, records = guarded("takeover", (0.4,), operator=person)
    assert held(records) == ("x" * 8 + "-") * 2 + "x" * 6
    assert person.asked == 2
    assert [record.guard_alarm for record in records] == [record.held for record in records]


def test_a_level_that_is_no_number_is_unusual(tmp_path):
    _, records = guarded("hold", (float("nan"),))
    assert held(records) == "-" * 24
    with RunLog(tmp_path, control_rate=10.0) as log:
        for record in records:
            log.write(record)
    assert {row["guard_level"] for row in read_log(tmp_path)} == {None}


def test_to_hold_needs_a_guard(bundle, tmp_path):
    with pytest.raises(InputError, match=r"guard\.action=hold needs a guard: give deploy extensions=\[guard\]"):
        run(deploy(bundle, tmp_path, "guard.action=hold"), clock=VirtualClock())


def test_real_time_chunking_needs_the_network():
    with pytest.raises(InputError, match="scheduling=rtc differentiates through the policy's network"):
        drive(FakeRobot(), TellingPolicy(clock=VirtualClock()), limits=WIDE, scheduling="rtc")


@pytest.mark.slow
@given(st.lists(st.floats(0.0, 0.5), min_size=1, max_size=30))
def test_ticks_lie_on_the_grid_and_never_in_the_past(work):
    clock = VirtualClock()
    clock.advance(3.0)
    pacer = Pacer(clock=clock, rate=10.0)
    start, missed_in_all = pacer.wait()[0], 0
    previous = start
    for number, seconds in enumerate(work, start=1):
        clock.advance(seconds)
        before = clock.now()
        tick, missed = pacer.wait()
        missed_in_all += missed
        assert tick == clock.now() >= before - 1e-9
        assert tick - previous >= 0.1 - 1e-9
        assert (tick - start) * 10 == pytest.approx(number + missed_in_all)
        previous = tick


def test_the_monotonic_clock_waits():
    clock = MonotonicClock()
    began = time.monotonic()
    pacer = Pacer(clock=clock, rate=100.0)
    for _ in range(4):
        pacer.wait()
    assert 0.029 <= time.monotonic() - began < 1.0


# The gate.


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (np.array([[5.0, 11.0]]), r"command\[1\] = 11 is outside \[0, 10\]"),
        (np.array([[np.nan, 5.0]]), "NaN or infinity"),
        (np.array([[5.0, -np.inf]]), "NaN or infinity"),
        (np.array([[5.0, 5.0, 5.0]]), r"shape \[3\], expected \[2\]"),
        (np.array([5.0]), "the chunk has shape"),
        (np.array([[9.0, 5.0]]), r"command\[0\] is 4 away from the last one, at most 3"),
    ],
)
def test_a_violation_never_reaches_the_robot(bad, reason):
    """Chunk 1 is bad, the others are good: the robot holds meanwhile, and the log says why."""

    def chunks(n: int) -> np.ndarray:
        return np.repeat(bad, HORIZON, axis=0) if n == 1 else still(n)

    limits = Limits(low=np.zeros(2), high=np.full(2, 10.0), max_step=np.full(2, 3.0))
    robot = FakeRobot(max_steps=20)
    records = drive(robot, FakePolicy(chunks, clock=VirtualClock()), limits=limits)
    assert all(np.array_equal(command, [5.0, 5.0]) for command in robot.commands)
    held = [record for record in records if record.interventions]
    assert robot.holds == len(held) >= 1
    assert held[0].step == 4
    assert all(record.action == [5.0, 5.0] for record in records)
    assert all(re.search(reason, record.interventions[0]) for record in held)
    assert not records[-1].interventions


def test_without_a_last_command_the_robot_stays_where_it_is():
    robot = FakeRobot()
    records = drive(robot, FakePolicy(lambda n: np.full((HORIZON, 2), np.nan), clock=VirtualClock()))
    assert (len(robot.commands), robot.holds) == (0, 12)
    assert all(record.action is None and record.inference_ms is not None for record in records)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_whatever_the_policy_says_commands_stay_inside(seed):
    random = np.random.default_rng(seed)

    def chunks(n: int) -> np.ndarray:
        chunk = random.normal(5.0, 10.0 ** random.integers(-2, 4), size=(random.choice([HORIZON, 3]), 2))
        chunk[random.random(chunk.shape) < 0.05] = random.choice([np.nan, np.inf, -np.inf])
        return chunk.astype(np.float32 if random.random() < 0.5 else np.float64)

    limits = Limits(low=np.zeros(2), high=np.full(2, 10.0), max_step=np.full(2, 4.0))
    robot = FakeRobot(max_steps=30)
    records = drive(robot, FakePolicy(chunks, clock=VirtualClock()), limits=limits)
    sent = np.array(robot.commands).reshape(-1, 2)
    assert np.isfinite(sent).all()
    assert ((sent >= 0) & (sent <= 10)).all()
    assert (np.abs(np.diff(sent, axis=0)) <= 4).all()
    assert len(sent) + sum(len(record.interventions) for record in records) == 30


def test_limits_come_from_the_demonstrations_and_from_the_robot():
    actions = np.array([[0.0, -1.0, 3.0], [100.0, 1.0, 3.0]])
    limits = demonstrated(fit(actions), 0.1)
    assert limits.low == pytest.approx([-10.0, -1.2, 2.9])
    assert limits.high == pytest.approx([110.0, 1.2, 3.1])
    robot = Limits(low=np.zeros(3), high=np.full(3, 105.0), max_step=np.full(3, 7.0))
    both = limits.within(robot)
    assert both.low == pytest.approx([0.0, 0.0, 2.9])
    assert both.high == pytest.approx([105.0, 1.2, 3.1])
    assert both.max_step == pytest.approx([7.0] * 3)
    assert limits.within(None) is limits


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Limits(low=np.zeros(2), high=np.zeros(3)), "one length"),
        (lambda: Limits(low=np.array([np.nan]), high=np.ones(1)), "no room"),
        (lambda: Limits(low=np.ones(1), high=np.zeros(1)), "no room"),
        (lambda: Limits(low=np.zeros(1), high=np.ones(1), max_step=np.zeros(1)), "max_step"),
        (
            lambda: Limits(low=np.zeros(1), high=np.ones(1)).within(Limits(low=np.ones(1), high=np.full(1, 2))),
            "no room",
        ),
        (lambda: Limits(low=np.zeros(1), high=np.ones(1)).within(Limits(low=np.zeros(2), high=np.ones(2))), "combine"),
        (lambda: demonstrated(fit(np.eye(2)), -0.1), r"safety\.margin=-0\.1"),
        (lambda: demonstrated({"kind": "minmax"}, 0.1), "does not say in which range"),
    ],
)
def test_impossible_limits_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


# Stopping.


def test_the_robot_is_stopped_and_the_log_is_kept_on_ctrl_c(bundle, tmp_path, monkeypatch, capsys):
    stopped = []
    monkeypatch.setattr(SimPushT, "stop", lambda self: stopped.append(True))
    monkeypatch.setattr(SimPushT, "command", _interrupting(after=6))
    assert run(deploy(bundle, tmp_path), clock=VirtualClock()) == 130
    assert stopped == [True]
    assert [row["step"] for row in read_log(tmp_path)] == list(range(6))
    assert json.loads((tmp_path / "latency.json").read_text())["steps"] == 6
    assert capsys.readouterr().err == "interrupted: the robot is stopped, the log is kept\n"


def test_the_robot_is_stopped_when_the_policy_fails():
    def chunks(n: int) -> np.ndarray:
        raise ZeroDivisionError

    robot = FakeRobot()
    with pytest.raises(InputError, match="the policy failed: ZeroDivisionError"):
        drive(robot, FakePolicy(chunks, clock=VirtualClock()))
    assert robot.stops == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "the policy answered NoneType"),
        ("a chunk", "the policy answered str"),
        ({"action": np.zeros((1, HORIZON, 2))}, "the policy answered dict"),
        ({"action_pred": None}, r"action_pred is object \[\]"),
        ({"action_pred": np.full((1, HORIZON, 2), "left")}, "action_pred is <U4"),
        ({"action_pred": np.full((1, HORIZON, 2), object())}, "action_pred is object"),
        ({"action_pred": np.full((1, HORIZON, 2), 1j)}, "action_pred is complex128"),
        ({"action_pred": [[[0.0, 1.0], [2.0]]]}, "the policy answered dict"),
        ({"action_pred": np.zeros((2, HORIZON, 2))}, r"not numbers \[1, H, A\]"),
        ({"action_pred": np.zeros(())}, r"not numbers \[1, H, A\]"),
    ],
)
@pytest.mark.parametrize("scheduling", ["sync", "naive"])
def test_a_policy_that_answers_no_numbers_stops_the_robot_in_one_line(answer, message, scheduling):
    class Odd(TellingPolicy):
        def predict(self, obs: Mapping[str, np.ndarray], **_: Any) -> Any:
            return answer

    robot = FakeRobot()
    with pytest.raises(InputError, match=message):
        drive(robot, Odd(clock=VirtualClock()), scheduling=scheduling)
    assert (robot.stops, robot.commands) == (1, [])


@pytest.mark.parametrize("huge", [1e300, -1.7e308, 1e30])
@pytest.mark.parametrize("scheduling", ["sync", "naive", "ensemble"])
def test_a_chunk_beyond_all_bounds_is_held_and_logged(huge, scheduling, tmp_path):
    """Every other one; the log is JSON, and says of the jump that nobody knows it."""
    robot, dtype = FakeRobot(), np.float32 if huge == 1e30 else np.float64
    policy = FakePolicy(lambda n: np.full((HORIZON, 2), huge if n % 2 else 5.0, dtype), clock=VirtualClock())
    with RunLog(tmp_path, control_rate=10.0) as log:
        for record in drive(robot, policy, scheduling=scheduling):
            log.write(record)
    assert all((command == 5).all() for command in robot.commands)
    refused = [row for row in read_log(tmp_path) if any("is outside" in why for why in row["interventions"])]
    assert refused
    assert all(row["held"] for row in refused)
    for text in ((tmp_path / "log.jsonl").read_text(), (tmp_path / "latency.json").read_text()):
        assert "Infinity" not in text
        assert "NaN" not in text


def test_a_full_disk_keeps_whole_lines_and_is_one_error(tmp_path):
    """As a file that may not grow on: half a line fits, and is taken back."""
    records = drive(FakeRobot(), FakePolicy(lambda _: np.full((HORIZON, 2), 5.0), clock=VirtualClock()))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def run_out() -> None:
        with RunLog(tmp_path, control_rate=10.0) as log:
            for record in records[:3]:
                log.write(record)
            resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 10, hard))
            log.write(records[3])

    try:
        with pytest.raises(InputError, match=r"cannot write .*log\.jsonl: File too large"):
            run_out()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [row["step"] for row in read_log(tmp_path)] == [0, 1, 2]


@pytest.mark.slow
def test_ctrl_c_at_any_instruction_leaves_no_thread_that_waits():
    """Once it did, where it came while the loop asked whether a chunk was there."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for number in range(100):
            worker: InferenceWorker[int] = InferenceWorker(clock=MonotonicClock(), beside=True)
            worker.ask(0, lambda: time.sleep(0.02) or 0)
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 0.001 + 1e-5 * number)
                while True:
                    worker.answer(0)
            closing = threading.Thread(target=worker.close, daemon=True)
            closing.start()
            closing.join(10)
            assert not closing.is_alive()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _interrupting(*, after: int) -> Any:
    original = SimPushT.command
    calls = []

    def command(self: SimPushT, actions: Sequence[np.ndarray], t: float) -> tuple[float | None, bool]:
        calls.append(actions)
        if len(calls) > after:
            raise KeyboardInterrupt
        return original(self, actions, t)

    return command


# PushT.


def test_a_deployed_episode_is_the_evaluated_one(bundle, tmp_path, capsys):
    policy = bundles.load(bundle, precision="fp32")  # as `deploy` does
    env = policy.spec.env
    assert env is not None
    evaluated = rollout(
        policy=policy, make_env=lambda: envs.make(**env), seeds=[7, 8], keys=["state"], n_envs=1, policy_batch=1
    )
    assert run(deploy(bundle, tmp_path, "seed=7", "n_episodes=2"), clock=VirtualClock()) == 0
    rows = read_log(tmp_path)
    for episode in evaluated:
        mine = [row for row in rows if row["seed"] == episode.seed]
        assert [row["step"] for row in mine] == list(range(episode.n_steps))
        assert np.array_equal(np.array([row["action"] for row in mine], np.float32), episode.actions)
        # The simulator sums areas in the order of a set: its rewards may differ in the last bit.
        assert [row["reward"] for row in mine] == pytest.approx(episode.rewards.tolist(), abs=1e-12)
        assert not any(row["interventions"] for row in mine)
    assert f"seed 8: 12 steps, score {evaluated[1].score:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("scheduling", SCHEDULINGS)
def test_a_run_on_the_virtual_clock_repeats_itself(bundle, tmp_path, scheduling):
    """And says how chunks met."""
    logs = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        config = deploy(bundle, folder, f"scheduling={scheduling}", "delay=1", "rtc.beta=20", "seed=3")
        assert run(config, clock=VirtualClock()) == 0
        logs.append(read_log(folder))
    assert logs[0] == logs[1]
    assert [row["delay"] for row in logs[0] if row["delay"] is not None][:2] == [1, 1]
    latency = json.loads((tmp_path / "a" / "latency.json").read_text())
    assert latency["delay_steps"]["max"] == 1
    assert latency["holds"] == sum(row["held"] for row in logs[0]) >= 1
    assert latency["jump"]["max"] == max(row["jump"] for row in logs[0] if row["jump"] is not None)


@pytest.mark.slow
def test_real_time_chunking_beside_the_loop(bundle, tmp_path):
    assert run(deploy(bundle, tmp_path, "scheduling=rtc")) == 0
    rows = read_log(tmp_path)
    assert len(rows) == 12
    assert any(row["jump"] is not None for row in rows)
    assert sum(row["held"] for row in rows) <= 4


@pytest.mark.slow
@pytest.mark.alone
def test_real_time_and_what_it_leaves_behind(bundle, tmp_path, capsys):
    began = time.monotonic()
    assert run(deploy(bundle, tmp_path)) == 0
    seconds = time.monotonic() - began
    rows = read_log(tmp_path)
    assert 1.09 <= rows[-1]["t"] <= seconds
    latency = json.loads((tmp_path / "latency.json").read_text())
    assert latency["steps"] == len(rows) == 12
    assert latency["period_ms"] == 100
    assert latency["deadline_misses"] == sum(row["missed_ticks"] for row in rows)
    assert 0 < latency["inference_ms"]["median"] <= latency["inference_ms"]["p95"] <= latency["inference_ms"]["max"]
    assert latency["lateness_ms"]["max"] == max(row["lateness_ms"] for row in rows)
    assert set(rows[0]) >= {"step", "t", "action", "reward", "inference_ms", "lateness_ms", "interventions"}
    out = capsys.readouterr().out
    for words in ("seed 100000: 12 steps, score ", "inference", "lateness", "deadline misses", f"{tmp_path}/log.jsonl"):
        assert words in out


def test_the_default_folder_is_beside_the_bundle(tmp_path):
    save_bundle(tmp_path / "bundle", env={"name": "pusht", "max_steps": 2})
    config = configuration.settings("deploy", [f"bundle={tmp_path / 'bundle'}", "device=cpu"])
    assert run(config, clock=VirtualClock()) == 0
    assert len(read_log(next(tmp_path.glob("deployment-*")))) == 2


def test_holding_in_the_simulator_keeps_the_target():
    env = envs.make("pusht")
    robot = SimPushT(env=env)
    robot.begin(3)
    start = env.observe(["agent_pos"])["agent_pos"]
    robot.hold()
    assert env.observe(["agent_pos"])["agent_pos"] == pytest.approx(start, abs=1e-3)
    robot.command([start + np.float32(40.0)], 0.1)
    for _ in range(10):
        robot.hold()
    assert env.observe(["agent_pos"])["agent_pos"] == pytest.approx(start + 40.0, abs=1.0)
    robot.stop()
    place = env.observe(["agent_pos"])["agent_pos"]
    robot.hold()
    assert env.observe(["agent_pos"])["agent_pos"] == pytest.approx(place, abs=1.0)
    robot.close()


def test_limits_pass_what_people_demonstrated():
    folder = os.environ.get("ACTION_DIFFUSION_DATA")
    if not folder:
        pytest.skip("set ACTION_DIFFUSION_DATA to the folder with pusht_cchi_v7_replay.zarr.zip")
    from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer

    actions = np.asarray(ReplayBuffer.open(Path(folder) / "pusht_cchi_v7_replay.zarr.zip")["action"][:])
    gate = Gate(limits=demonstrated(fit(actions), 0.1).within(SimPushT(env=envs.make("pusht")).limits))
    assert not any(gate.refuse(action) for action in actions)


# What is refused.


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"control_rate": 20.0}, [], "meant for 20 Hz, the robot takes commands at 10 Hz"),
        (
            {"action": ActionSpec(shape=(3,)), "normalizer": {"state": fit(np.eye(5)), "action": fit(np.eye(3))}},
            [],
            "actions have 3 values, the robot takes 2",
        ),
        (
            {
                "observations": {"arm": ObservationSpec(shape=(2,))},
                "normalizer": {"arm": fit(np.eye(2)), "action": fit(np.eye(2))},
            },
            [],
            "unknown PushT observation 'arm'",
        ),
        ({}, ["robot=sim_push"], "unknown robot 'sim_push': did you mean sim_pusht"),
        ({}, ["n_episodes=0"], "n_episodes=0 must be at least 1"),
        ({}, ["seed=-1"], "seed=-1 must not be negative"),
        ({}, ["limits=5"], "limits=5: expected a section"),
        ({}, ["limits=[1, 2]"], r"limits=\[1, 2\]: expected a section"),
        ({}, ["limits={low: [0, 0]}"], "limits.high has no value"),
        ({}, ["limits={low: [nan, 0], high: [512, 512]}"], r"limits.low=\[nan, 0\]: expected numbers"),
        ({}, ["limits={low: [512, 0], high: [0, 512]}"], "limits leave no room"),
        ({}, ["limits={low: [256, 0], high: [256, 512]}"], "limits leave no room"),
        ({}, ["limits={low: low, high: high}"], "limits.low=low: expected numbers"),
        ({}, ["limits={low: [0, 0], high: [512, 512], velocity: [nan, 1]}"], "limits.velocity=.* expected numbers"),
        ({}, ["limits={low: [0, 0], high: [512, 512], jerk: 7}"], "limits.jerk=7: expected numbers"),
        ({}, ["limits={low: [0, 0], high: [512, 512], height: [1, 1]}"], "unknown limit 'height'"),
        ({}, ["obstacles=5"], "obstacles=5: expected a section"),
        ({}, ["obstacles={table: high}"], r"obstacles.table=\['high'\]: expected numbers"),
        ({}, ["obstacles={spheres: [[1, 2]]}"], "obstacles.spheres has shape"),
        ({}, ["server=ws://[::1"], r"server=ws://\[::1: write ws://HOST:PORT"),
        ({}, ["server=ws://127.0.0.1:99999"], "99999: write ws://HOST:PORT, with a port from 1 to 65535"),
        ({}, ["server=http://127.0.0.1:80"], "http://127.0.0.1:80: write ws://HOST:PORT"),
        ({}, ["server='ws://127.0.0.1:1/ a'"], "write ws://HOST:PORT"),
        ({}, ["server=ws://127.0.0.1:1", "server_timeout=1e300"], "server_timeout=1e[+]300: expected a number"),
        ({}, ["rtc.beta=inf"], "rtc.beta=inf: expected a number"),
        ({}, ["safety.margin=inf"], "safety.margin=inf: expected a number"),
        ({}, ["safety.margin=-1"], "safety.margin=-1 must not be negative"),
        ({}, ["sampler.scheduler=flow"], "flow"),
        ({}, ["scheduling=rct"], "unknown scheduling 'rct': did you mean rtc"),
        ({}, ["delay=-1"], "delay=-1 must not be negative"),
        ({}, ["delay=0.5"], "delay=0.5: expected a whole number"),
        ({}, ["scheduling=naive", "delay=4"], "delay=4 uses 8 steps of a chunk.* leaves 7"),
        ({}, ["execution_horizon=0"], "execution_horizon=0 must be at least 1"),
        ({}, ["rtc.beta=0.0"], "rtc.beta=0.0 must be above 0"),
        ({}, ["rtc.mask=one"], "unknown rtc.mask 'one': did you mean ones"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, options, message):
    save_bundle(tmp_path / "bundle", **changes)
    with pytest.raises(InputError, match=message):
        run(deploy(tmp_path / "bundle", tmp_path / "run", *options), clock=VirtualClock())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_driver_of_ones_own_is_named_on_the_command_line(tmp_path, capsys):
    changes: dict[str, Any] = {
        "observations": {"state": ObservationSpec(shape=(2,), source="state")},
        "normalizer": {"state": fit(np.eye(2)), "action": fit(np.array([[-1.0, 0.0], [1.0, 1.0]]))},
        "env": None,
    }
    save_bundle(tmp_path / "bundle", **changes)
    limits = {"low": [-2.0] * 2, "high": [2.0] * 2, "max_step": [1.0] * 2}
    limits |= {"velocity": [2.0] * 2, "acceleration": [10.0] * 2, "jerk": [200.0] * 2}
    cell = {"arm": {"n_joints": 1}, "limits": limits, "seconds": 1.0, "observations": {"state": ["joints", "gripper"]}}
    (tmp_path / "cell.yaml").write_text(json.dumps(cell))
    words = [f"bundle={tmp_path}/bundle", "device=cpu", f"hardware={tmp_path}/cell.yaml", "page=false", "record=false"]
    robot = "robot=action_diffusion.deploy.sim.pusht:IdealArm"
    assert cli.main(["deploy", *words, robot, f"output_dir={tmp_path}/run"]) == 0
    assert len(read_log(tmp_path / "run")) == 10
    for name, message in (("nowhere:Arm", "No module named 'nowhere'"), ("json:Arm", "has no attribute 'Arm'")):
        assert cli.main(["deploy", *words, f"robot={name}", f"output_dir={tmp_path}/other"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("latency", "message"),
    [
        ("inf", "inf: expected a number, such as 0"),
        ("-1.0", "-1.0 must not be negative"),
        ("1e300", r"1e\+300: expected a number, such as 0"),
    ],
)
def test_a_simulator_that_cannot_be_is_refused(bundle, tmp_path, latency, message):
    with pytest.raises(InputError, match=rf"simulated\.latency={message}"):
        run(deploy(bundle, tmp_path / "run", f"simulated.latency={latency}"))


def test_a_log_is_never_overwritten(bundle, tmp_path):
    (tmp_path / "log.jsonl").write_text("mine\n")
    with pytest.raises(InputError, match="already holds a log"):
        run(deploy(bundle, tmp_path), clock=VirtualClock())
    assert (tmp_path / "log.jsonl").read_text() == "mine\n"


def test_several_bundles_are_refused(bundle, tmp_path):
    with pytest.raises(InputError, match=r"bundle=.*: expected a path"):
        deploy(bundle, tmp_path, f"bundle=[{bundle},{bundle}]")
