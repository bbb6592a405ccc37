"""The commands that measure the arm's process, each in a small form."""

from __future__ import annotations

import json

import pytest

from action_diffusion.options.configuration import settings
from action_diffusion.policy import bundle as bundles
from benchmarks.robustness import faults, fuzz, kills
from benchmarks.scores import parity
from benchmarks.speed import period


@pytest.mark.slow
@pytest.mark.alone
def test_the_period_is_measured_under_load():
    measured = period.measure(seconds=2.0, load=1, rate=200.0)
    assert len(measured.periods) > 200
    assert measured.events == []
    assert measured.off < 0.02  # the bound of 2 ms is for the command, on a machine whose load is known


@pytest.mark.slow
@pytest.mark.parametrize(("who", "what"), [("loop", "kill"), ("camera", "halt")])
@pytest.mark.alone
def test_a_kill_is_measured(who, what):
    trial = kills.trial(who, what, wait=0.3)
    assert trial.good, trial
    assert "died" in trial.why or "halted" in trial.why


@pytest.mark.parametrize("benchmark", [fuzz, kills, period])
def test_a_misspelt_option_is_refused(benchmark, capsys):
    assert benchmark.main(["sed=3"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown option 'sed'")


def test_what_the_faults_are_tried_on_is_a_command_that_starts(tmp_path):
    assert settings("deploy", faults.words(tmp_path, tmp_path)).record is False


def test_the_fuzz_command_says_what_happened(capsys):
    assert fuzz.main(["n=300", "seed=5"]) == 0
    out = capsys.readouterr().out
    assert "300 messages" in out
    assert "no setpoint left the limits" in out


def test_the_loop_scores_what_the_evaluation_does(make_policy, tiny_config, tmp_path, capsys):
    policy = make_policy()
    policy.spec.env["max_steps"] = 24
    bundles.save(tmp_path / "bundle", policy, {"policy": tiny_config})
    words = [f"bundle={tmp_path / 'bundle'}", "n_episodes=2", f"output={tmp_path / 'parity.json'}"]
    assert parity.main(words) == 0
    rows = json.loads((tmp_path / "parity.json").read_text())["rows"]
    assert [row["evaluated"] for row in rows if not row["refused"]] == [
        row["deployed"] for row in rows if not row["refused"]
    ]
    assert "starts to the last bit" in capsys.readouterr().out
    assert parity.main(["n_episodes=2"]) == 2
