"""The commands that measure the arm's process, each in a small form."""

from __future__ import annotations

import pytest

from benchmarks import fuzz, kills, period


def test_the_period_is_measured_under_load():
    measured = period.measure(seconds=2.0, load=1, rate=200.0)
    assert len(measured.periods) > 200
    assert measured.events == []
    assert measured.off < 0.02  # the bound of 2 ms is for the command, on a machine whose load is known


@pytest.mark.parametrize(("who", "what"), [("loop", "kill"), ("camera", "halt")])
def test_a_kill_is_measured(who, what):
    trial = kills.trial(who, what, wait=0.3)
    assert trial.good, trial
    assert "died" in trial.why or "halted" in trial.why


@pytest.mark.parametrize("benchmark", [fuzz, kills, period])
def test_a_misspelt_option_is_refused(benchmark, capsys):
    assert benchmark.main(["sed=3"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown option 'sed'")


def test_the_fuzz_command_says_what_happened(capsys):
    assert fuzz.main(["n=300", "seed=5"]) == 0
    out = capsys.readouterr().out
    assert "300 messages" in out
    assert "no setpoint left the limits" in out
