"""Simulators in processes of their own: the same scores, and an evaluation that outlives a crash."""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rollouts import NoisyPolicy, assert_same, run
from trouble import ChaoticEnv, Deadly, SlowEnv, Trouble

from action_diffusion import envs
from action_diffusion.envs.rollout import rollout
from action_diffusion.envs.workers import (
    Begin,
    Execute,
    Executed,
    Lost,
    Processes,
    Simulators,
    Start,
    each,
    open_simulators,
)
from action_diffusion.errors import InputError
from benchmarks.robustness.workers import killing

PLAN = [(np.zeros(2), True)] * 3


def trouble(folder: Path, what: str, times: int) -> functools.partial[Trouble]:
    return functools.partial(Trouble, what=what, seed=105, times=times, folder=folder)


@pytest.mark.slow
def test_scores_are_the_same_as_in_this_process() -> None:
    policy = NoisyPolicy(scale=15.0, offset=256.0)
    settings: dict[str, Any] = {
        "policy": policy,
        "make_env": functools.partial(envs.make, "pusht", max_steps=30),
        "seeds": range(100_000, 100_004),
        "keys": ["agent_pos"],
        "n_envs": 2,
    }
    assert_same(rollout(**settings, workers=2), rollout(**settings))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [("crash", "process ended with exit code 11"), ("raise", "FloatingPointError: the contact solver gave up")],
)
def test_an_episode_whose_simulator_is_lost_is_begun_again(tmp_path: Path, what: str, said: str) -> None:
    lost: list[tuple[int, str]] = []
    found = run(
        NoisyPolicy(),
        trouble(tmp_path, what, 1),
        range(104, 107),
        n_envs=2,
        workers=2,
        on_lost=lambda seed, reason: lost.append((seed, reason)),
    )
    assert_same(found, run(NoisyPolicy(), ChaoticEnv, range(104, 107)))
    assert [seed for seed, _ in lost] == [105]
    assert said in lost[0][1]


@pytest.mark.slow
def test_an_episode_that_is_lost_every_time_scores_zero_and_the_others_go_on(tmp_path: Path) -> None:
    lost: list[int] = []
    found = run(
        NoisyPolicy(),
        trouble(tmp_path, "raise", 9),
        range(104, 107),
        n_envs=2,
        workers=2,
        on_lost=lambda seed, _: lost.append(seed),
    )
    expected = run(NoisyPolicy(), ChaoticEnv, range(104, 107))
    assert_same([found[0], found[2]], [expected[0], expected[2]])
    assert (found[1].score, found[1].n_steps) == (0.0, 0)
    assert lost == [105, 105, 105]


@pytest.mark.slow
def test_workers_that_something_kills_change_no_score() -> None:
    with killing(every=1.2) as killed:
        found = run(NoisyPolicy(), functools.partial(SlowEnv, seconds=0.03), range(100, 124), n_envs=8, workers=3)
    assert len(killed) >= 2
    assert_same(found, run(NoisyPolicy(), ChaoticEnv, range(100, 124)))


@pytest.mark.slow
def test_neighbours_of_a_start_that_kills_its_worker_are_not_given_up(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="seed 105: its simulator was lost 3 times at step 4"):
        found = run(NoisyPolicy(), trouble(tmp_path, "crash", 99), range(103, 108), n_envs=5, workers=1)
    expected = run(NoisyPolicy(), ChaoticEnv, range(103, 108))
    assert (found[2].score, found[2].n_steps) == (0.0, 0)
    assert_same([*found[:2], *found[3:]], [*expected[:2], *expected[3:]])


@pytest.mark.slow
def test_nobody_waits_for_the_slowest() -> None:
    """The others are over before its first observation is there."""
    over: dict[int, float] = {}

    def progress(_: float, scores: Sequence[float]) -> None:
        over.setdefault(len(scores), time.monotonic())

    make_env = functools.partial(SlowEnv, seconds=0.0, straggler=103, late=1.5)
    found = run(NoisyPolicy(), make_env, range(103, 109), n_envs=2, workers=2, progress=progress)
    assert over[6] - over[5] > 0.5
    assert_same(found, run(NoisyPolicy(), ChaoticEnv, range(103, 109)))


@pytest.mark.slow
def test_an_order_that_a_worker_dies_of_each_time_is_lost_and_the_others_are_done() -> None:
    simulators = open_simulators(ChaoticEnv, 2, 2)
    try:
        found = dict(each(simulators, {start: Deadly(start) for start in (3, 7, 4)}))
    finally:
        simulators.close()
    assert (found[3], found[4]) == (3, 4)
    assert found[7] == Lost("the simulator's process ended with exit code 11", 1.0)


@pytest.mark.slow
def test_a_hung_simulator_is_ended_and_another_one_started(tmp_path: Path) -> None:
    crew = Processes(trouble(tmp_path, "hang", 1), 1)
    simulators = Simulators(crew, 1)

    def answer(order: Begin | Execute) -> Start | Executed | Lost:
        simulators.wait()
        simulators.give(0, order)
        while True:
            for _, answer in simulators.answers():
                return answer

    try:
        answer(Begin(105, ["state"]))
        for _ in range(2):
            answer(Execute(PLAN, ["state"], 40))
        hung = crew._processes[0]
        lost = answer(Execute(PLAN, ["state"], 40, seconds=0.5))
        assert isinstance(lost, Lost)
        assert "no answer for 0.5 s" in lost.reason
        assert lost.fault == 1
        assert not hung.is_alive()
        begun = answer(Begin(105, ["state"]))
        assert isinstance(begun, Start)
        assert begun.max_steps == 40
        process = crew._processes[0]
    finally:
        simulators.close()
    assert not process.is_alive()


UNGUARDED = """
import functools
from action_diffusion.envs import make
from action_diffusion.envs.workers import open_simulators
open_simulators(functools.partial(make, "pusht"), 1, 1).answers()
"""


def test_a_script_that_starts_processes_while_it_is_imported_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(UNGUARDED)
    ended = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=60)
    assert ended.stderr.rstrip().splitlines()[-1].endswith('under `if __name__ == "__main__":`')


@pytest.mark.slow
def test_bad_input_is_not_a_crash(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="an action of Chaos is two numbers"):
        run(NoisyPolicy(), trouble(tmp_path, "refuse", 1), [105], n_envs=1, workers=2)
