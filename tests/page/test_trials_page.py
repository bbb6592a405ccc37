"""Trials at the page, in a real browser: who marks them sees what to do, and never which bundle acts."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deployments import Deployment, until

from benchmarks.robustness.faults import untrained


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny policy that sees pictures, for long episodes, and the same once more."""
    first = untrained(tmp_path_factory.mktemp("trials") / "alpha")
    return f"[{first},{shutil.copytree(first, first.parent / 'beta')}]"


@pytest.fixture
def trials(both, tmp_path) -> Iterator[Any]:
    started: list[Deployment] = []

    def start() -> Deployment:
        options = ("robot=sim_pusht", "trials=2", "scheduling=naive")
        started.append(Deployment(both, tmp_path / "out", *options, command="evaluate"))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


@pytest.mark.slow
def test_a_person_at_the_page(trials, browser, tmp_path):
    """Marks, a partial score, a run once more, a mark that is taken back, a second session; and nobody is told."""
    run, heard = trials(), list[str]()
    page = browser.new_page(viewport={"width": 400, "height": 800})
    page.on("websocket", lambda socket: socket.on("framereceived", lambda data: heard.append(str(data))))
    page.goto(run.url)
    shows(page, "Trial 1 of 2, run 1 of 2", "set it up")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert page.is_hidden("#take_over")
    assert page.is_hidden("#timing")
    assert page.is_hidden("#overlay")
    assert page.is_hidden("#undo")
    assert page.is_disabled("#success")
    made = begin(run, page)
    page.click("#redo")
    until(lambda: len(lines(tmp_path)) == 1)
    shows(page, "Trial 1 of 2, run 1 of 2", "set it up")  # it does not count
    begin(run, page)
    page.click("#success")
    shows(page, "Trial 1 of 2, run 2 of 2", "set it up")
    until(lambda: page.is_visible("#overlay"))
    until(lambda: page.evaluate("document.querySelector('#cameras img').naturalWidth") == 96)
    assert page.is_visible("#cameras img")
    page.evaluate("const s = document.getElementById('strength'); s.value = 80; s.dispatchEvent(new Event('input'))")
    assert page.evaluate("getComputedStyle(document.querySelector('#cameras img')).opacity") == "0.8"
    page.screenshot(path=str(tmp_path / "trials.png"), full_page=True)
    page.click("#undo")
    page.click("#once_more")
    shows(page, "Trial 1 of 2, run 1 of 2", "set it up")
    begin(run, page)
    page.click("#failure")
    shows(page, "Trial 1 of 2, run 2 of 2", "set it up")
    begin(run, page)
    page.evaluate("const v = document.getElementById('value'); v.value = 0.35; v.dispatchEvent(new Event('input'))")
    page.click("#score")
    shows(page, "Trial 2 of 2, run 1 of 2", "set it up")
    assert run.steps.count > made
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(30) == 130
    marks = [("redo", None), ("success", 1.0), ("undone", None), ("failure", 0.0), ("partial", 0.35)]
    assert [(one["mark"], one["score"]) for one in lines(tmp_path)] == marks
    assert "3 of 4 runs" not in "".join(run.lines)
    assert "2 of 4 runs are kept" in "".join(run.lines)
    nobody_knows(heard, run.lines)
    run = trials()
    page.goto(run.url)
    for place in (1, 2):
        shows(page, f"Trial 2 of 2, run {place} of 2", "set it up")
        begin(run, page)
        page.click("#success")
    assert run.process.wait(30) == 0
    said = "".join(run.lines).partition("2 trials on sim_pusht")
    nobody_knows(heard, [said[0]])
    assert "cannot be told apart" in said[2]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert sorted(score for one in results["bundles"] for score in one["scores"]) == [0.0, 0.35, 1.0, 1.0]
    assert sum(one["repeated"] for one in results["bundles"]) == 2
    page.close()


@pytest.mark.slow
def test_a_run_that_the_arm_ends_is_asked_about(trials, browser, tmp_path):
    """By an emergency stop, which is cleared before the next run."""
    run = trials()
    page = browser.new_page()
    page.goto(run.url)
    shows(page, "Trial 1 of 2, run 1 of 2", "set it up")
    begin(run, page)
    page.click("#emergency")
    until(lambda: page.inner_text("#mode") == "how was it?", 20)
    assert "The robot ended the run (stop: emergency stop)." in page.inner_text("#words")
    assert page.is_disabled("#start")
    page.click("#redo")
    until(lambda: lines(tmp_path))
    page.click("#clear")
    page.click("#confirm")
    shows(page, "Trial 1 of 2, run 1 of 2", "set it up")
    begin(run, page)
    page.click("#success")
    until(lambda: len(lines(tmp_path)) == 2)
    assert [(one["mark"], one["reason"]) for one in lines(tmp_path)] == [
        ("redo", "stop: emergency stop"),
        ("success", ""),
    ]
    page.close()


def begin(run: Deployment, page: Any) -> int:
    """Press Start, and wait until the robot moves."""
    before = run.steps.count
    until(lambda: page.is_enabled("#start"))
    page.click("#start")
    until(lambda: run.steps.count > before + 3)
    until(lambda: page.is_enabled("#success"))
    return run.steps.count


def shows(page: Any, number: str, mode: str) -> None:
    until(lambda: page.inner_text("#number") == number and page.inner_text("#mode") == mode, 20)


def nobody_knows(heard: list[str], said: list[str]) -> None:
    for name in ("alpha", "beta", "bundle"):
        assert not any(name in text for text in (*heard, *said))


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "out" / "trials.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
