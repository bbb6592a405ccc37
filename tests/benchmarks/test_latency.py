"""Robots on the virtual clock, and the latency benchmark: paired, independent of neighbours, nothing hidden."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import processes
import pytest

from action_diffusion import envs
from action_diffusion.deploy.loop.prediction import Guidance
from action_diffusion.deploy.loop.virtual import VirtualEpisode, run_episodes
from action_diffusion.deploy.robot.robots import Observation, SimPushT
from action_diffusion.envs.rollout import rollout
from action_diffusion.errors import InputError
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.action_queue import SCHEDULINGS

ROOT = Path(__file__).resolve().parents[2]
latency = import_module("benchmarks.scores.latency")
latency_report = import_module("benchmarks.scores.latency_report")

STEPS = 14


def run(policy, seeds: list[int], scheduling: str = "rtc", delay: int = 2, **changes: Any) -> list[VirtualEpisode]:
    options: dict[str, Any] = {"execution_horizon": 4, "policy_batch": 4, "guidance": Guidance(beta=20.0)} | changes
    return run_episodes(
        policy=policy,
        make_robot=lambda: SimPushT(env=envs.make("pusht", max_steps=STEPS)),
        seeds=seeds,
        keys=["state"],
        scheduling=scheduling,
        delay=delay,
        **options,
    )


# The virtual clock.


@pytest.mark.parametrize("scheduling", ["sync", "naive"])
def test_without_a_delay_an_episode_is_the_evaluated_one(policy, scheduling):
    seeds = [7, 8, 11, 13]  # two of one row
    evaluated = rollout(
        policy=policy,
        make_env=lambda: envs.make("pusht", max_steps=STEPS),
        seeds=seeds,
        keys=["state"],
        policy_batch=4,
    )
    mine = run(policy, seeds, scheduling, 0)
    for one, other in zip(mine, evaluated, strict=True):
        assert one.seed == other.seed
        assert np.array_equal(one.commands.astype(np.float32), other.actions.astype(np.float32))
        assert one.score == other.score


@pytest.mark.parametrize("scheduling", SCHEDULINGS)
def test_an_episode_does_not_depend_on_its_neighbours(policy, scheduling):
    together = run(policy, [3, 4, 5, 7], scheduling)
    alone = run(policy, [5], scheduling)
    assert np.array_equal(together[2].commands, alone[0].commands, equal_nan=True)
    assert together[2].jumps == alone[0].jumps


def test_a_delay_is_so_many_steps_without_a_command_and_then_what_is_due():
    class Telling:
        """Chunks of the instants that they are meant for, counted in control steps."""

        spec = SimpleNamespace(n_obs_steps=2, n_action_steps=4)

        def predict(self, obs, **_):
            now = obs["state"][:, -1, :1]
            return {"action_pred": np.stack([np.broadcast_to(now + np.arange(16) - 1, (len(now), 16))] * 2, axis=2)}

    class Counting(SimPushT):
        def observe(self, keys, t):
            env: Any = self._env
            return Observation(t, {"state": np.array([env._steps], np.float32)})

    told: list[Any] = []
    (episode,) = run_episodes(
        policy=Telling(),
        make_robot=lambda: Counting(env=envs.make("pusht", max_steps=STEPS)),
        seeds=[0],
        keys=["state"],
        scheduling="naive",
        delay=3,
        execution_horizon=4,
        guidance=Guidance(),
        progress=told.append,
    )
    assert np.isnan(episode.commands[:3]).all()
    assert episode.commands[3:, 0].tolist() == list(range(3, STEPS))
    assert episode.jumps == [0.0, 0.0]
    assert sum(told) == STEPS


def test_the_same_noise_whatever_the_scheduling(policy):
    first = [run(policy, [2], scheduling, 2)[0].commands[:4] for scheduling in SCHEDULINGS]
    for other in first[1:]:
        np.testing.assert_allclose(other, first[0], atol=1e-4)


@pytest.mark.parametrize(
    ("seeds", "changes", "message"),
    [
        ([], {}, "n_episodes=0"),
        ([1], {"delay": -1}, "delay=-1"),
        ([1], {"policy_batch": 0}, "policy_batch=0"),
        ([1], {"execution_horizon": 9}, r"seed 1, control step 2: the chunk has shape \[8, 2\]"),
    ],
)
def test_what_cannot_run_is_refused(policy, seeds, changes, message):
    with pytest.raises(InputError, match=message):
        run(policy, seeds, **changes)


# The benchmark.


@pytest.fixture
def bundle(policy, tiny_config, tmp_path) -> Path:
    policy.spec.env["max_steps"] = STEPS
    bundles.save(tmp_path / "bundle", policy, {"policy": tiny_config})
    return tmp_path / "bundle"


@pytest.mark.slow
def test_the_command_writes_rows_a_picture_and_what_is_reached(bundle, tmp_path, capsys):
    output = tmp_path / "out" / "latency.json"
    words = [f"bundle={bundle}", f"output={output}", "n_episodes=3", "delay=0,2", "execution_horizon=4"]
    assert latency.main([*words, "processes=1", "sampler.num_inference_steps=2"]) == 0
    content = json.loads(output.read_text())
    rows = content["rows"]
    assert [(row["scheduling"], row["delay"]) for row in rows] == [(s, d) for s in SCHEDULINGS for d in (0, 2)]
    for row in rows:
        assert set(row) >= {"scheduling", "delay", "score", "jump", "n_episodes"}
        assert row["n_episodes"] == len(row["scores"]) == 3
        low, high = row["score_interval"]
        assert low - 1e-12 <= row["score"] <= high + 1e-12
        # A chunk of horizon 8 has ended when a synchronous robot, which asks late, swaps it for one 2 steps late.
        swaps = {0: 3, 2: 0 if row["scheduling"] == "sync" else 2}[row["delay"]]
        assert row["n_swaps"] == 3 * swaps
        assert (row["jump"] is None) == (swaps == 0)
    assert content["settings"]["sampler"] == {"num_inference_steps": 2}
    by_cell = {(row["scheduling"], row["delay"]): row for row in rows}
    assert by_cell["sync", 0]["jump"] == by_cell["naive", 0]["jump"]
    assert by_cell["sync", 0]["held"] == 0
    assert by_cell["sync", 2]["held"] == pytest.approx(6 / STEPS)
    assert by_cell["rtc", 2]["held"] == pytest.approx(2 / STEPS)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr()
    assert "rtc's jumps at delay 2 are" in said.out
    assert "rtc, delay 2: score" in said.err


@pytest.mark.slow
def test_a_process_a_core_gives_the_same(bundle, tmp_path):
    words = [f"bundle={bundle}", "n_episodes=2", "delay=2", "scheduling=naive,rtc", "execution_horizon=4"]
    found = []
    for n in (1, 2):
        output = tmp_path / f"{n}.json"
        command = ["-m", "benchmarks.scores.latency", *words, f"output={output}", f"processes={n}"]
        done = processes.run(*command, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        rows = json.loads(output.read_text())["rows"]
        found.append([{key: value for key, value in row.items() if key != "seconds"} for row in rows])
    assert found[0] == found[1]


def test_what_is_done_is_kept_when_it_is_stopped(bundle, tmp_path, monkeypatch):
    run_cell = latency.Bench.run

    def interrupted(self, cell, advance):
        if cell.scheduling == "naive":
            raise KeyboardInterrupt
        return run_cell(self, cell, advance)

    monkeypatch.setattr(latency.Bench, "run", interrupted)
    output = tmp_path / "latency.json"
    words = [f"bundle={bundle}", f"output={output}", "n_episodes=1", "delay=1", "execution_horizon=4", "processes=1"]
    assert latency.main([*words, "scheduling=[naive,rtc]"]) == 130
    assert [row["scheduling"] for row in json.loads(output.read_text())["rows"]] == ["rtc"]


def test_bounds_are_judged_on_the_cells_that_are_there():
    def result(scheduling: str, delay: int, scores: list[float], jumps: list[float]) -> Any:
        cell = latency_report.Cell(scheduling, delay)
        return latency_report.CellResult(cell=cell, scores=scores, jumps=jumps, held=0.0, seconds=1.0)

    results = [
        result("rtc", 0, [0.9, 1.0], [1.0]),
        result("rtc", 4, [0.7, 0.86], [2.0, 3.0]),
        result("naive", 4, [0.5, 0.5], [9.5] * 3),
    ]
    lines = latency_report.bounds({one.cell: one for one in results})
    assert [line.rpartition(" ")[2] for line in lines] == ["MISSED", "MISSED", "kept"]
    assert "scores 0.780" in lines[0]
    assert "loses 0.170" in lines[1]
    assert "are 0.31 of naive's" in lines[2]
    assert results[2].jump == pytest.approx(9.5)
    assert result("sync", 8, [0.0], []).jump is None
    assert latency_report.bounds({}) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scheduling=rct"], "unknown scheduling 'rct': did you mean rtc"),
        (["delay=two"], "delay=two must be a whole number of at least 0"),
        (["delay=1.5"], "delay=1.5 must be a whole number of at least 0"),
        (["n_episodes=0"], "n_episodes=0"),
        (["delay=8"], "delay=8 uses"),
        (["n_episode=3"], "unknown option 'n_episode': did you mean n_episodes"),
        (["rtc"], "'rtc' is not of the form name=value"),
        (["output=there"], r"output=there must be a file named \*\.json"),
        (["bundle="], "bundle is required"),
        (["rtc.beta=-1"], "rtc.beta=-1.0 must be above 0"),
        (["sampler.num_inference_steps=7"], "does not divide"),
    ],
)
def test_bad_input_is_one_line_and_code_2(bundle, tmp_path, capsys, words, message):
    base = [f"bundle={bundle}", f"output={tmp_path / 'latency.json'}", "execution_horizon=4", "delay=1", "processes=1"]
    assert latency.main([*base, *words]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{message}.*\n", error), error
