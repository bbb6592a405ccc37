"""What a training run says while it runs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from action_diffusion.training import progress
from action_diffusion.training.progress import TrainingBar, spoken


@pytest.mark.parametrize(
    ("seconds", "words"), [(4.2, "4 s"), (89, "89 s"), (420, "7 min"), (7500, "2 h 05 min"), (23957, "6 h 39 min")]
)
def test_durations_are_said_as_people_do(seconds, words):
    assert spoken(seconds) == words


def run(monkeypatch, *, terminal: bool, enabled: bool = True) -> str:
    """What is shown of a run of 100 steps, of which each takes 4 s."""
    out, now = io.StringIO(), 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
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


def test_a_terminal_has_a_bar_instead_of_lines(monkeypatch):
    shown = run(monkeypatch, terminal=True)
    assert "4 s a step" in shown
    assert "of about 100, loss" not in shown


def test_another_process_says_nothing(monkeypatch):
    assert run(monkeypatch, terminal=False, enabled=False) == ""
