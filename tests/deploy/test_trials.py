"""Trials of bundles on one robot: in a fair order, blinded, no run lost or counted twice, and what they say."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployments import Deployment, save_bundle, until
from processes import Forked
from web_pages import Page
from websockets.sync.client import connect

from action_diffusion import cli
from action_diffusion.deploy.arm.travel import PACE, STEP, way
from action_diffusion.deploy.hardware.command import CommandLayout
from action_diffusion.deploy.hardware.limits import RATES, Limits
from action_diffusion.deploy.hardware.protocols import Group
from action_diffusion.deploy.ipc.channels import Phase
from action_diffusion.deploy.ipc.rings import RingReader
from action_diffusion.deploy.loop.clock import VirtualClock
from action_diffusion.deploy.loop.operator import Mode, Order, Orders
from action_diffusion.deploy.loop.trial_operator import TrialOperator
from action_diffusion.deploy.trials import session
from action_diffusion.deploy.trials.ledger import Ledger, TrialRun
from action_diffusion.deploy.trials.plan import fingerprint, planned, read_plan, shuffled, write_plan
from action_diffusion.deploy.trials.report import difference
from action_diffusion.deploy.trials.session import run, together
from action_diffusion.errors import InputError
from action_diffusion.options import Evaluate, configuration
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.model.normalizer import fit
from action_diffusion.policy.spec import ActionSpec, ObservationSpec

CORNERS = np.array([[200.0, 200.0, 200.0, 200.0, -3.0], [300.0, 300.0, 300.0, 300.0, 3.0]])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Bundles that differ: the second one sees the finger beside the state, and moves in another range."""
    folder = tmp_path_factory.mktemp("trials")
    seen = {
        "state": ObservationSpec(shape=(5,), source="state"),
        "agent_pos": ObservationSpec(shape=(2,), source="agent_pos"),
    }
    far = {"state": fit(CORNERS), "agent_pos": fit(CORNERS[:, :2]), "action": fit(CORNERS[:, :2] - 150)}
    first = save_bundle(folder / "first")
    return first, save_bundle(folder / "second", observations=seen, normalizer=far, horizon=12, n_action_steps=3)


def asked(paths: Any, folder: Path, *words: str) -> Evaluate:
    """What `action-diffusion evaluate robot=sim_pusht …` asks for."""
    listed = f"bundles=[{','.join(str(path) for path in paths)}]"
    given = ["robot=sim_pusht", listed, "trials=3", "page=false", "device=cpu", f"output_dir={folder}", *words]
    settings: Evaluate = configuration.settings("evaluate", given)
    return settings


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


# The plan.


@pytest.mark.parametrize(("bundles", "trials"), [(1, 3), (2, 1), (2, 20), (2, 7), (3, 20), (5, 4)])
def test_every_bundle_runs_once_from_each_start_and_as_often_first(bundles: int, trials: int) -> None:
    orders = shuffled(bundles, trials, 3)
    assert [sorted(order) for order in orders] == [list(range(bundles))] * trials
    places = np.array([np.bincount(place, minlength=bundles) for place in np.array(orders).T])
    assert places.max() - places.min() <= 1
    assert orders == shuffled(bundles, trials, 3)


def test_the_order_is_random() -> None:
    orders = [shuffled(2, 20, seed) for seed in range(40)]
    assert len({str(order) for order in orders}) == 40
    alike = np.mean([one[i] == one[i + 1] for one in orders for i in range(19)])
    assert alike == pytest.approx(9 / 19, abs=0.06)  # a trial says nothing of the next one
    assert np.mean([one[0] == [0, 1] for one in orders]) == pytest.approx(0.5, abs=0.25)


def test_a_bundle_is_known_by_all_that_is_in_it(tmp_path) -> None:
    """Also one that is a single file, as ONNX is."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        (folder / "inside").mkdir(parents=True)
        (folder / "inside" / "weights").write_bytes(b"1")
    assert fingerprint(first) == fingerprint(second)
    (second / "inside" / "weights").rename(second / "weights")
    assert fingerprint(first) != fingerprint(second)
    (tmp_path / "one.onnx").write_bytes(b"1")
    (tmp_path / "two.onnx").write_bytes(b"2")
    assert fingerprint(tmp_path / "one.onnx") != fingerprint(tmp_path / "two.onnx")


# Sessions, on a clock that stands still while a policy thinks.


def test_trials_from_the_plan_to_the_report(two, tmp_path, capsys) -> None:
    folder = tmp_path / "out"
    assert run(asked(two, folder), clock=VirtualClock()) == 0
    plan, made = read_plan(folder / "plan.json"), lines(folder)
    assert [(one["trial"], one["place"]) for one in made] == [(t, p) for t in range(3) for p in range(2)]
    assert [one["bundle"] for one in made] == [bundle for order in plan.orders for bundle in order]
    results = json.loads((folder / "results.json").read_text())
    for number, path in enumerate(two):
        own = [one["score"] for one in sorted(made, key=lambda one: one["trial"]) if one["bundle"] == number]
        assert results["bundles"][number]["bundle"] == str(path)
        assert results["bundles"][number]["scores"] == own
    (found,) = results["differences"]
    assert (found["bundle"], found["minus"]) == (str(two[1]), str(two[0]))
    text = Page(folder / "report.html").text
    assert found["verdict"] in text
    assert found["needed"] in text
    said = capsys.readouterr().out
    before, _, after = said.partition("3 trials on sim_pusht")
    assert "first" not in before
    assert "second" not in before
    assert found["verdict"] in after


def test_a_start_is_the_same_for_all(two, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    copy = tmp_path / "copy[red]"
    shutil.copytree(two[0], copy)
    config = asked(two, tmp_path / "out")
    run(replace(config, bundles=[str(two[0]), str(copy)]), clock=VirtualClock())
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["bundles"][0]["scores"] == results["bundles"][1]["scores"]
    assert results["differences"][0]["p"] == 1
    assert results["differences"][0]["mean_interval"] is None
    assert capsys.readouterr().out.count("[red]") == 2  # in the table, and in the verdict


class Interrupting(VirtualClock):
    """Somebody presses Ctrl-C at the tick number `at`."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._left = at

    def sleep_until(self, moment: float) -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt
        super().sleep_until(moment)


def test_an_interrupted_session_goes_on(two, tmp_path, capsys) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "out"
    run(asked(two, whole), clock=VirtualClock())
    assert run(asked(two, folder), clock=Interrupting(30)) == 130  # in the third run of 12 steps
    assert len(lines(folder)) == 2
    assert not (folder / "results.json").exists()
    assert f"2 of 6 runs are kept. To go on: the same command, with output_dir={folder}" in capsys.readouterr().err
    assert run(asked(two, folder), clock=VirtualClock()) == 0
    where = [(one["session"], one["episode"]) for one in lines(folder)]
    assert where == [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (2, 3)]
    same = ("bundles", "differences", "orders")
    first, second = (json.loads((one / "results.json").read_text()) for one in (whole, folder))
    assert {name: first[name] for name in same} == {name: second[name] for name in same}
    assert run(asked(two, folder), clock=Interrupting(1)) == 0  # nothing is due: it reports once more
    assert len(lines(folder)) == 6


def test_trials_may_end_early(two, tmp_path) -> None:
    folder = tmp_path / "out"
    assert run(asked(two, folder), clock=Interrupting(52)) == 130  # in the fifth run of 12 steps
    early = asked(two, folder, "trials=2")
    assert run(early, clock=Interrupting(1)) == 0
    results = json.loads((folder / "results.json").read_text())
    assert (results["trials"], results["planned"]) == (2, 3)
    assert [one["n"] for one in results["bundles"]] == [2, 2]
    assert "2 of 3 planned trials on sim_pusht" in Page(folder / "report.html").text
    assert run(asked(two, folder), clock=VirtualClock()) == 0  # all, after all
    results = json.loads((folder / "results.json").read_text())
    assert (results["trials"], results["planned"]) == (3, 3)
    assert run(early, clock=Interrupting(1)) == 0  # runs of the third are there, and are not counted
    assert [one["n"] for one in json.loads((folder / "results.json").read_text())["bundles"]] == [2, 2]


def test_what_a_power_cut_left_is_made_once_more(two, tmp_path, capsys) -> None:
    folder = tmp_path / "out"
    run(asked(two, folder), clock=Interrupting(20))
    with (folder / "trials.jsonl").open("a") as file:
        file.write('{"trial": 0, "pla')
    run(asked(two, folder), clock=VirtualClock())
    assert "ends with half a line, which is removed" in capsys.readouterr().err
    assert [(one["trial"], one["place"]) for one in lines(folder)] == [(t, p) for t in range(3) for p in range(2)]


@pytest.mark.slow
def test_a_killed_session_loses_no_run(two, tmp_path, capsys) -> None:
    """In real time, on the simulator in processes of its own."""
    folder, listed = tmp_path / "out", f"bundles=[{two[0]},{two[1]}]"
    words = ["robot=sim_pusht", listed, "trials=3", "page=false", "device=cpu", f"output_dir={folder}"]
    command = ("-m", "action_diffusion", "evaluate", *words)
    process = Forked(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until(lambda: (folder / "trials.jsonl").exists() or process.poll(), 60)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    kept = lines(folder)
    assert cli.main(["evaluate", *words]) == 0
    made = lines(folder)
    assert made[: len(kept)] == kept
    assert [(one["trial"], one["place"]) for one in made] == [(t, p) for t in range(3) for p in range(2)]
    assert {one["mark"] for one in made} == {"measured"}
    assert cli.main(["deploy", f"replay={folder / 'sessions' / '002'}"]) == 2
    assert "is of trials, in which several policies ran: it cannot be replayed" in capsys.readouterr().err


# Whoever marks.


def operator(folder: Path, *said: Callable[[Orders], None]) -> tuple[TrialOperator, Orders]:
    """One whose person says these things one after the other, whenever they are waited for."""
    page, left = Orders(folder), list(said)

    def idle() -> bool:
        if left:
            left.pop(0)(page)
        return True

    return TrialOperator(folder, idle=idle, say=lambda line: None), page


def order(which: Order) -> Callable[[Orders], None]:
    return lambda page: page.give(which)


def test_only_start_and_undo_end_the_wait_before_a_run(tmp_path) -> None:
    others = [Order.SUCCESS, Order.FAILURE, Order.REDO, Order.PAUSE, Order.TAKE_OVER]
    one, page = operator(tmp_path, *(order(which) for which in others), order(Order.START))
    page.give(Order.UNDO)  # pressed before it was asked for
    assert one.before() is Order.START
    assert one.mode is Mode.OVER
    one.begin()
    assert (one.mode, one.mark) == (Mode.POLICY, None)  # it has been started: it does not wait once more


@pytest.mark.parametrize("which", [Order.UNDO, Order.HOME])
def test_what_else_may_be_wanted_before_a_run(tmp_path, which) -> None:
    assert operator(tmp_path, order(which))[0].before() is which


@pytest.mark.parametrize(
    ("said", "mark", "score"),
    [
        (order(Order.SUCCESS), "success", 1.0),
        (order(Order.FAILURE), "failure", 0.0),
        (lambda page: page.give(Order.SCORE, score=0.35), "partial", 0.35),
        (order(Order.REDO), "redo", None),
    ],
)
def test_marks_while_it_runs_and_afterwards(tmp_path, said, mark, score) -> None:
    one, page = operator(tmp_path, order(Order.START), order(Order.PAUSE), said)
    one.begin()
    assert one.wait(lambda: (None, False))
    said(page)
    assert not one.wait(lambda: (None, False))
    assert (one.mark, one.score) == (mark, score)
    one.end()
    one.begin()
    assert (one.mark, one.score) == (None, None)
    one.end()
    one.ask()  # neither Start nor Pause answers it
    assert (one.mark, one.score, one.mode) == (mark, score, Mode.OVER)


def test_nobody_takes_over(tmp_path) -> None:
    one, page = operator(tmp_path)
    one.begin()
    page.give(Order.TAKE_OVER)
    assert one.wait(lambda: (None, False))
    assert one.mode is Mode.POLICY


def test_a_page_that_is_gone_ends_the_wait(tmp_path) -> None:
    Orders(tmp_path)
    with pytest.raises(InputError, match="the page is gone"):
        TrialOperator(tmp_path, idle=lambda: False, say=print).before()
    assert RingReader(tmp_path / "modes").count == 2


# A real arm, as far as anybody can tell: nothing measures how well it does.

ARM = """\
arm: {n_joints: 2}
limits:
  low: [-1.0, -1.0, 0.0]
  high: [1.0, 1.0, 1.0]
  velocity: [2.0, 2.0, .inf]
  acceleration: [20.0, 20.0, .inf]
  jerk: [400.0, 400.0, .inf]
  max_step: [.inf, .inf, 1.0]
observations: {state: [joints, gripper]}
seconds: 600
"""


def test_the_way_back_is_slow_and_ends_at_rest() -> None:
    layout = CommandLayout((Group(name="joints", size=2, kind="linear"), Group(name="gripper", size=1, kind="hold")))
    rates = {name: np.full(3, value) for name, value in zip(RATES, (2.0, 20.0, 400.0), strict=True)}
    limits = Limits(low=np.full(3, -1.0), high=np.full(3, 1.0), max_step=np.full(3, 0.3), **rates)
    start, goal = np.array([0.8, -0.1, 1.0]), np.array([-0.2, 0.0, 0.0])
    times, commands = way(layout, limits, start, goal)
    assert commands[0] == pytest.approx(start)
    assert commands[-1] == pytest.approx(goal)
    assert times[-1] == pytest.approx(np.pi / 2 / (PACE[0] * 2.0), abs=STEP)  # 1 rad on half a cosine
    assert np.abs(np.diff(commands[:, :2], axis=0)).max() <= PACE[0] * 2.0 * STEP * 1.001
    assert commands[:5, 2] == pytest.approx([1.0, 0.7, 0.4, 0.1, 0.0])
    assert way(layout, limits, goal, goal)[1] == pytest.approx(np.tile(goal, (2, 1)))


@pytest.mark.slow
def test_a_real_arm_is_reset_and_marked_by_a_person(tmp_path) -> None:
    """By whoever is at the page: here a socket. The arm is brought back to where it stood, and the gripper opens."""
    (tmp_path / "cell.yaml").write_text(ARM)
    corners = np.array([[0.3, 0.3, 0.9], [0.8, 0.8, 1.0]])
    made = {"state": fit(corners), "action": fit(corners)}
    values: dict[str, Any] = {"normalizer": made, "env": None, "task": "arm", "action": ActionSpec(shape=(3,))}
    seen = {"state": ObservationSpec(shape=(3,), source="state")}
    paths = [
        save_bundle(tmp_path / name, observations=seen, horizon=8 + 4 * (name == "beta"), **values)
        for name in ("alpha", "beta")
    ]
    options = ("robot=ideal", f"hardware={tmp_path / 'cell.yaml'}", "trials=1", "safety.margin=5")
    listed = f"[{paths[0]},{paths[1]}]"
    one = Deployment(listed, tmp_path / "out", *options, command="evaluate")
    try:
        with connect(f"{one.url.replace('http', 'ws')}/live") as page:

            def say(order: str, **more: object) -> None:
                page.send(json.dumps({"order": order, **more}))

            def asks(reset: str) -> bool:
                said = json.loads(page.recv())
                return said["mode"] == "RESET" and said["trial"]["home"] and said["trial"]["reset"] == reset

            until(lambda: asks(session.NEW_START))
            say("start")
            until(lambda: one.steps.count > 5)
            say("score", value=0.5)
            until(lambda: asks(session.SAME_START))
            assert np.abs(one.setpoints.latest().values["command"]).max() > 0.2
            say("home")
            until(lambda: np.abs(one.setpoints.latest().values["command"]).max() < 1e-6)
            until(lambda: json.loads(page.recv())["mode"] == "OVER")
            until(lambda: asks(session.SAME_START))
            assert one.phase is Phase.STILL
            say("start")
            until(lambda: one.steps.count > 15)
            say("failure")
        assert one.process.wait(30) == 0
    finally:
        one.process.kill()
        one.process.wait()
    assert [(run["mark"], run["score"]) for run in lines(tmp_path / "out")] == [("partial", 0.5), ("failure", 0.0)]


@pytest.mark.slow
def test_nobody_can_mark_a_real_robot_s_runs_without_a_page(tmp_path) -> None:
    """As where its extra is not installed."""
    (tmp_path / "cell.yaml").write_text(ARM)
    corners = np.array([[0.3, 0.3, 0.9], [0.8, 0.8, 1.0]])
    values: dict[str, Any] = {"normalizer": {"state": fit(corners), "action": fit(corners)}, "env": None}
    seen = {"state": ObservationSpec(shape=(3,), source="state")}
    path = save_bundle(tmp_path / "alpha", observations=seen, action=ActionSpec(shape=(3,)), **values)
    words = ["robot=ideal", f"hardware={tmp_path / 'cell.yaml'}", "trials=1"]
    with pytest.raises(InputError, match="nobody can mark the runs of a real robot"):
        run(asked([path], tmp_path / "out", *words))


# The ledger.


def ledger(folder: Path, two: tuple[Path, Path]) -> Ledger:
    plan = planned(asked(two, folder), folder)
    write_plan(plan, folder)
    return Ledger(folder, plan)


def test_a_run_counts_as_its_last_line_says(two, tmp_path) -> None:
    made = ledger(tmp_path, two)
    first, second = made._plan.orders[0]
    assert made.due == (0, 0)
    made.append(TrialRun(trial=0, place=0, bundle=first, mark="redo", score=None))
    assert (made.due, made.can_undo) == ((0, 0), False)
    made.append(TrialRun(trial=0, place=0, bundle=first, mark="partial", score=0.5))
    made.append(TrialRun(trial=0, place=1, bundle=second, mark="success", score=1.0))
    assert (made.due, made.can_undo) == ((1, 0), True)
    made.undo()
    assert (made.due, made.can_undo) == ((0, 1), False)
    made.append(TrialRun(trial=0, place=1, bundle=second, mark="failure", score=0.0))
    again = ledger(tmp_path, two)
    assert again.lines == made.lines
    assert again.due == (1, 0)
    assert again.scores()[first] == [0.5, None, None]
    assert again.scores()[second] == [0.0, None, None]
    assert again.repeated() == {first: 1, second: 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 1 is no run: Expecting value"),
        ("[" * 10_000, "line 1 is no run"),
        ('{"trial": 0}', "line 1 is no run: place is missing"),
        ('{"trial": 9, "place": 0, "bundle": 0, "mark": "success", "score": 1}', "no run of this plan: run.trial=9"),
        ('{"trial": 0, "place": 0, "bundle": 7, "mark": "success", "score": 1}', "no run of this plan"),
        ('{"trial": 0, "place": 0, "bundle": 0, "mark": "success", "score": 7}', "score=7 must be at most 1"),
        ('{"trial": 0, "place": 0, "bundle": 0, "mark": "great", "score": 1}', "mark=great: choose from success,"),
    ],
)
def test_a_line_that_is_no_run_is_refused(two, tmp_path, line, message) -> None:
    ledger(tmp_path, two)
    (tmp_path / "trials.jsonl").write_text(f"{line}\n")
    with pytest.raises(InputError, match="line 1") as caught:
        ledger(tmp_path, two)
    assert message in str(caught.value)


# What they say.


def test_a_difference_in_words() -> None:
    better, worse = np.array([1.0] * 9 + [0.0]), np.array([1.0] * 2 + [0.0] * 7 + [1.0])
    found = difference(("B", "A"), better, worse)
    assert found["mean_difference"] == found["success_difference"] == pytest.approx(0.6)
    assert found["p"] == pytest.approx(2 * 9 / 2**8)  # McNemar's: of 8 that differ, 7 for B
    assert "the two cannot be told apart" in found["verdict"]  # though the bootstrap's interval does not hold 0
    assert found["mean_interval"][0] > 0
    assert found["needed_trials"] == 13
    assert "about 13 trials are needed to find it (95 %, power 80 %); these were 10" in found["needed"]
    assert "B scores higher" in difference(("B", "A"), np.tile(better, 3), np.tile(worse, 3))["verdict"]
    assert "B scores lower" in difference(("B", "A"), np.tile(worse, 3), np.tile(better, 3))["verdict"]


@pytest.mark.parametrize(
    ("first", "second", "verdict", "needed"),
    [
        ([1.0], [0.0], "+1.000 in mean score; one of the trials alone does not say", "One trial does not say"),
        ([0.5] * 4, [0.5] * 4, "the same in each trial, p = 1. On these trials the two cannot", "No difference was"),
        ([1.0] * 3, [0.0] * 3, "the same in each trial, p = 0.25. On these trials the two cannot", "All trials gave"),
        ([1.0] * 6, [0.0] * 6, "the same in each trial, p = 0.031. On these trials B scores higher", "All trials gave"),
        ([1.0, 0.0], [0.0, 1.0], "+0.000 in mean score, 95 % interval -1.000 to +1.000, p = 1", "No difference was"),
    ],
)
def test_few_and_equal_trials_in_words(first, second, verdict, needed) -> None:
    found = difference(("B", "A"), np.array(first), np.array(second))
    assert verdict in found["verdict"]
    assert found["needed"].startswith(needed)
    assert found["needed_trials"] is None


def test_several_bundles_are_compared_with_the_first(two, tmp_path) -> None:
    third = shutil.copytree(two[0], tmp_path / "third")
    run(asked([*two, third], tmp_path / "out", "trials=2"), clock=VirtualClock())
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [one["minus"] for one in results["differences"]] == [str(two[0])] * 2
    assert [one["bundle"] for one in results["differences"]] == [str(two[1]), str(third)]


def test_one_bundle_has_a_rate_and_nothing_to_compare(two, tmp_path) -> None:
    run(asked(two[:1], tmp_path / "out"), clock=VirtualClock())
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["differences"] == []
    assert results["bundles"][0]["n"] == 3


# What cannot be.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("robot=sim_pusht bundles=[first,first]", "bundles= names first twice"),
        ("robot=sim_pusht bundles=[first,./first]", "bundles= names first twice"),
        ("robot=sim_pusht bundles=[first,second] trials=0", "trials=0 must be at least 1"),
        ("robot=sim_pusht bundles=[first,nowhere]", "no bundle at nowhere"),
        ("robot=sim_pusht bundles=[]", "names no bundle"),
        ("robot=sim_pusht bundles=[first,three]", "first has an action of shape [2], three [3]: they cannot"),
        ("robot=sim_pusht bundles=[first,metres]", "first has an action in px, metres m: they cannot"),
        ("robot=sim_pusht bundles=[first,faster]", "first has control_rate 10.0, faster 20.0: they cannot"),
        ("robot=sim_pusht bundles=[first,wider]", "first has observation state, state [5], wider state [6]: they"),
        ("robot=sim_pusht bundles=[first,longer]", "the simulator pusht of 12 steps, longer pusht of 300 steps"),
        ("robot=sim_pusht bundles=[first,second] output_dir=began", "began holds trials of [first], not of [first,sec"),
        ("robot=sim_pusht bundles=first output_dir=began trials=5", "began holds trials with trials=2, not 5: give an"),
        ("robot=sim_pusht bundles=first trials=2 output_dir=began scheduling=rtc", 'scheduling="sync", not "rtc"'),
        ("robot=sim_pusht bundles=first trials=2 output_dir=began sampler.eta=1", "sampler.eta=null, not 1"),
        ("robot=sim_pusht bundles=second trials=2 output_dir=began", "began holds trials of [first], not of [second]"),
        (
            "robot=sim_pusht bundles=changed trials=2 output_dir=before",
            "changed has changed since the trials in before",
        ),
        ("robot=sim_pusht bundles=first output_dir=broken", "broken/plan.json cannot be read"),
        ("robot=sim_pusht bundles=first output_dir=unfair", "trial 1 of the plan is [0, 0]: every bundle runs once"),
        ("robot=sim_pusht bundles=first output_dir=other", "other holds results.json and no plan.json: give another"),
        ("robot=sim_pusht bundles=first compare=second", "compare= means nothing with robot=…"),
        ("robot=sim_pusht bundles=first n_episodes=20", "n_episodes= means nothing with robot=…"),
        ("bundle=first trials=5", "trials= is for a robot: give robot=…"),
        ("bundle=first hardware=cell.yaml", "hardware= is for a robot: give robot=…"),
        ("bundle=first bundles=second", "bundle= and bundles= are the same: give one of them"),
        ("robot=sim_push bundles=first", "unknown robot 'sim_push': did you mean sim_pusht?"),
        ("robot=sim_pusht bundles=first scheduling=fast", "unknown scheduling 'fast'"),
        ("robot=sim_pusht bundles=first page_host=0.0.0.0", "page_host=0.0.0.0 lets other machines in"),
        ("robot=ur hardware=ur.yaml page=false bundles=first", "page=false: somebody has to mark the runs of a real"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(words, message, spoilt, capsys) -> None:
    assert cli.main(["evaluate", *words.split()]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.fixture
def spoilt(mistaken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bundles and folders lie that do not go together."""
    monkeypatch.chdir(mistaken)


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistaken")
    one = ActionSpec(shape=(2,), unit="px")
    save_bundle(folder / "first", action=one)
    shutil.copytree(folder / "first", folder / "second")
    (folder / "second" / "more.json").write_text("{}")
    three = np.hstack([CORNERS[:, :2], CORNERS[:, 4:]])
    save_bundle(
        folder / "three", action=ActionSpec(shape=(3,)), normalizer={"state": fit(CORNERS), "action": fit(three)}
    )
    save_bundle(folder / "metres", action=ActionSpec(shape=(2,), unit="m"))
    save_bundle(folder / "faster", control_rate=20.0)
    save_bundle(folder / "longer", env={"name": "pusht", "max_steps": 300})
    wide = np.hstack([CORNERS, CORNERS[:, :1]])
    save_bundle(
        folder / "wider",
        observations={"state": ObservationSpec(shape=(6,), source="state")},
        normalizer={"state": fit(wide), "action": fit(CORNERS[:, :2])},
    )
    shutil.copytree(folder / "first", folder / "changed")
    (folder / "ur.yaml").write_text("arm: {host: 127.0.0.1}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for bundle, place in (("first", "began"), ("changed", "before")):
            run(asked([bundle], Path(place), "trials=2"), clock=Interrupting(1))
    (folder / "changed" / "more.json").write_text("{}")
    for place in ("broken", "unfair", "other"):
        (folder / place).mkdir()
    (folder / "broken" / "plan.json").write_text("{")
    plan = json.loads((folder / "began" / "plan.json").read_text())
    (folder / "unfair" / "plan.json").write_text(json.dumps(plan | {"orders": [[0, 0]]}))
    (folder / "other" / "results.json").write_text("{}")
    return folder


def test_two_sessions_at_once_are_refused(two, tmp_path) -> None:
    from action_diffusion.files import writer_lock

    with writer_lock(tmp_path / "plan.json"), pytest.raises(InputError, match="is being written by process"):
        run(asked(two, tmp_path), clock=VirtualClock())


def test_what_several_policies_observe_and_plan_together(two) -> None:
    spec = together([bundles.read_spec(path) for path in two])
    assert list(spec.observations) == ["state", "agent_pos"]
    assert spec.horizon == 12
