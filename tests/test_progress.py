"""What a training run says while it runs."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from action_diffusion import progress as meters
from action_diffusion.training.progress import TrainingBar, spoken


@pytest.mark.parametrize(
    ("seconds", "words"), [(4.2, "4 s"), (89, "89 s"), (420, "7 min"), (7500, "2 h 05 min"), (23957, "6 h 39 min")]
)
def test_durations_are_said_as_people_do(seconds, words):
    assert spoken(seconds) == words


def run(monkeypatch, *, terminal: bool, enabled: bool = True) -> str:
    """What is shown of a run of 100 steps, of which each takes 4 s."""
    out, now = io.StringIO(), 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    console = Console(file=out, force_terminal=terminal, width=200)
    with TrainingBar(enabled=enabled, console=console) as bar:
        for step in range(10, 101, 10):
            now = 4.0 * step
            bar.update(share=step / 100, step=step, loss=0.5, rate=64, step_seconds=4.0)
    return out.getvalue()


def test_the_pace_is_said_early_and_lines_follow_without_a_terminal(monkeypatch):
    lines = run(monkeypatch, terminal=False).splitlines()
    assert "4 s a step: about 100 steps in all, 5 min left" in lines
    assert "step 30 of about 100, loss 0.5000, 5 min left" in lines
    assert "step 100 of about 100, loss 0.5000, 0 s left" in lines


def test_what_takes_very_long_is_said_with_what_takes_less():
    out = io.StringIO()
    with TrainingBar(console=Console(file=out, width=300)) as bar:
        for step in (10, 20):
            bar.update(share=step / 20000, step=step, loss=0.5, rate=3, step_seconds=20.0)
    assert "20 s a step: about 20,000 steps in all, 111 h 00 min left; for less," in out.getvalue()
    assert "encoder=resnet18_small" in out.getvalue()


def test_a_terminal_has_a_bar_instead_of_lines(monkeypatch):
    shown = run(monkeypatch, terminal=True)
    assert "4 s a step" in shown
    assert "of about 100, loss" not in shown


def test_another_process_says_nothing(monkeypatch):
    assert run(monkeypatch, terminal=False, enabled=False) == ""


def test_a_budget_that_is_overrun_leaves_no_time_below_none(monkeypatch):
    out, now = io.StringIO(), 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with TrainingBar(console=Console(file=out, width=200)) as bar:
        for step, share in ((10, 0.5), (20, 1.0), (31, 1.54)):
            now += 40
            bar.update(share=share, step=step, loss=0.5, rate=64, step_seconds=4.0)
    assert "step 31 of about 31, loss 0.5000, 0 s left" in out.getvalue()


def test_more_than_was_expected_is_all_of_it(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with meters.progress("reading", 100) as advance:
        for amount in (20, 60, 74):
            now += 20
            advance(amount)
    assert capsys.readouterr().err == "reading: 20%\nreading: 80%, 7 s left\nreading: 100%, 0 s left\n"


def test_who_waited_before_the_first_step_is_not_told_to_wait_as_long_again(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with meters.progress("deploying", 100) as advance:
        for seconds in (600, 11, 11):
            now += seconds
            advance(10)
    assert capsys.readouterr().err.splitlines()[-1] == "deploying: 30%, 77 s left"


def test_one_slow_while_does_not_change_the_time_left(monkeypatch):
    out, now = io.StringIO(), 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with TrainingBar(console=Console(file=out, width=200)) as bar:
        for step in range(10, 81, 10):
            now += 40
            bar.update(share=step / 100, step=step, loss=0.5, rate=64, step_seconds=30.0 if step == 70 else 4.0)
    assert "step 70 of about 100, loss 0.5000, 2 min left" in out.getvalue()
