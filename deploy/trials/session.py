"""`action-diffusion evaluate robot=…`: a session of trials, until all runs are made or somebody goes home.

    plan.json ─▶ due run ─▶ person: reset, Start ─▶ episode ─▶ mark ─▶ trials.jsonl ─▶ next ─▶ … ─▶ report
                   ▲                                   └ does not count ─┐
                   └─────────────────────────────────────────────────────┘

The robot, the policies, the page and the record are made once a session. Nobody is told which bundle acts before the
last run is marked.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.deploy.acting import EpisodeRunner, ways
from action_diffusion.deploy.arm.link import ArmSetup
from action_diffusion.deploy.arm.travel import travel, way
from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.ipc.rings import RingReader
from action_diffusion.deploy.loop.clock import Clock
from action_diffusion.deploy.loop.events import Outcome, StepRecord, endings
from action_diffusion.deploy.loop.operator import Order
from action_diffusion.deploy.loop.trial_operator import TrialOperator
from action_diffusion.deploy.page import trial as page
from action_diffusion.deploy.page.view import jpeg
from action_diffusion.deploy.records.run_log import RunLog
from action_diffusion.deploy.robot import robots
from action_diffusion.deploy.robot.robots import Robot, RobotTask
from action_diffusion.deploy.subscribers import Subscribers
from action_diffusion.deploy.trials.ledger import Ledger, TrialRun
from action_diffusion.deploy.trials.plan import NAME, Plan, planned, write_plan
from action_diffusion.deploy.trials.report import finish
from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path, writer_lock
from action_diffusion.options import Evaluate
from action_diffusion.policy.spec import PolicySpec

NEW_START = "Set up a new start. A picture of it is kept for the other runs of this trial. Then press Start."
SAME_START = "Set the scene up as it was at the beginning of this trial. Then press Start."
OVERLAID = "The start’s picture lies over the live camera. "
ONLY_START = "Set the scene up, then press Start."
SIMULATED = "The simulator sets the scene up. Press Start."
ASKED = "The run is over. How did it go?"
ENDED = "The robot ended the run ({}). Failure if that was the policy’s doing, Redo if it was not."
NOBODY = "the robot ended the run by itself ({}), and without the page nobody is there to mark it"
QUALITY = 90
"""Of the pictures of starts, as JPEG."""


def run(config: Evaluate, *, clock: Clock | None = None) -> int:
    """Trials of `config.paths` on `config.robot`; returns the exit code: 0 when all are made and reported, or 130.

    `clock`: real time where none is given; on another the loop thinks by itself, without a page. Raises `InputError`
    for bundles that do not fit the robot or each other, another plan in the folder, and where nobody can mark runs.
    """
    stamp = f"trials-{datetime.now():%Y%m%d-%H%M%S}"
    folder = Path(config.output_dir) if config.output_dir else Path(config.paths[0]).parent / stamp
    plan = planned(config, folder)
    with writer_lock(folder / NAME):
        if not (folder / NAME).exists():
            write_plan(plan, folder)
        ledger = Ledger(folder, plan)
        code = 0 if ledger.due is None else _session(config, plan, ledger, folder, clock)
        if ledger.due is None:
            finish(plan, ledger, folder)
    return code


def _session(config: Evaluate, plan: Plan, ledger: Ledger, folder: Path, clock: Clock | None) -> int:
    """Make the runs that are due. Returns the exit code: 0, or 130 after Ctrl-C."""
    options = config.deployment(config.paths[0])
    ArmSetup(driver=options.robot, limits=options.limits, obstacles=options.obstacles).check()
    actings = [EpisodeRunner(config.deployment(path)) for path in config.paths]
    spec = together([acting.policy.spec for acting in actings])
    threads: dict[str, Any] = {"threads": [acting.threads for acting in actings]}
    number = len(list(folder.glob("sessions/*"))) + 1
    records = folder / "sessions" / f"{number:03d}"
    with ExitStack() as stack:
        robot = robots.make(options.robot, RobotTask.of(spec), options if clock is None else None)
        stack.callback(robot.close)
        for acting in actings:
            acting.meet(robot)
        log = stack.enter_context(RunLog(records, control_rate=spec.control_rate))
        limits = _widest([acting.limits for acting in actings])
        people = Subscribers(
            options,
            robot,
            spec,
            limits=limits,
            output_dir=records,
            computing=lambda: threads | ways(actings[0].policy),
            trials=True,
        )
        stack.callback(people.close)
        session = Session(
            plan=plan,
            ledger=ledger,
            folder=folder,
            robot=robot,
            actings=actings,
            log=log,
            people=people,
            number=number,
            keys=list(spec.observations),
            clock=clock,
        )
        try:
            session.go_on()
            return 0
        except KeyboardInterrupt:
            print("interrupted: the robot is stopped", file=sys.stderr)
            return 130
        finally:
            if ledger.due is not None:
                kept = f"{len(ledger.counted)} of {plan.trials * len(actings)} runs are kept"
                print(f"{kept}. To go on: the same command, with output_dir={folder}", file=sys.stderr)


@dataclass(kw_only=True)
class Session:
    """The runs of a session, one after the other. number: of the session, from 1. keys: what is observed, for all."""

    plan: Plan
    ledger: Ledger
    folder: Path
    robot: Robot
    actings: Sequence[EpisodeRunner]
    log: RunLog
    people: Subscribers
    number: int
    keys: Sequence[str]
    clock: Clock | None

    def __post_init__(self) -> None:
        operator, processes = self.people.operator, self.robot.processes
        self._operator = operator if isinstance(operator, TrialOperator) else None
        self._simulated = processes is None or processes.scene is not None
        if self._operator is None and not self._simulated:
            raise InputError("nobody can mark the runs of a real robot without the page: page=true")
        self._cameras: dict[str, RingReader] = {}
        if processes is not None:
            self._cameras = {name: RingReader(processes.folder / f"camera {name}") for name in processes.cameras}
        self._home: np.ndarray | None = None
        if processes is not None and not self._simulated:
            self._home = processes.arm.last_setpoint().values["command"].copy()
        self._episodes, self._note = 0, ""

    def go_on(self) -> None:
        """Until no run is due."""
        while (due := self.ledger.due) is not None:
            self.people.between()
            if self._operator is None or self._start(*due):
                self._run(*due)

    def _start(self, trial: int, place: int) -> bool:
        """Wait for the person. False: there is something to do before, or another run is due now."""
        assert self._operator is not None
        begun = self.ledger.has_begun(trial)
        reset = ONLY_START if len(self.actings) == 1 else SAME_START if begun else NEW_START
        seen = [name for name in self._cameras if begun and page.picture(self._starts(trial), name).is_file()]
        words = SIMULATED if self._simulated else reset
        words = OVERLAID + words if seen else words
        self._show(trial, place, reset=self._note + words, starts=seen)
        wanted = self._operator.before()
        self._note = ""
        if wanted is Order.UNDO and self.ledger.can_undo:
            self.ledger.undo()
            print("the last mark is taken back: that run is made once more")
        elif wanted is Order.HOME and not self.people.stopped:
            self._bring_back()
        return wanted is Order.START and not self.people.stopped

    def _bring_back(self) -> None:
        """The arm goes to where it stood when the session began."""
        processes = self.robot.processes
        if processes is None or self._home is None or processes.arm.limits is None:
            return
        now = processes.arm.last_setpoint().values["command"]
        times, commands = way(processes.layout, processes.arm.limits, now, self._home)
        why = "; ".join(travel(processes.arm, times, commands))
        self._note = f"The arm did not get back ({why}). " if why else ""

    def _show(self, trial: int, place: int, *, reset: str = "", mark: str = "", starts: Sequence[str] = ()) -> None:
        """What the page says of this run."""
        assert self.robot.processes is not None
        shown: page.TrialShown = {
            "trial": trial + 1,
            "trials": self.plan.trials,
            "run": place + 1,
            "runs": len(self.actings),
            "reset": reset,
            "mark": mark,
            "undo": self.ledger.can_undo,
            "home": self._home is not None,
            "starts": list(starts),
        }
        page.show(self.robot.processes.folder, shown, self._starts(trial))

    def _starts(self, trial: int) -> Path:
        """Where the pictures of a start are kept."""
        return self.folder / "starts" / f"{trial + 1:03d}"

    def _run(self, trial: int, place: int) -> None:
        """One episode and its mark."""
        bundle = self.plan.orders[trial][place]
        start: dict[str, np.ndarray] = {}
        reasons: list[str] = []

        def record(step: StepRecord) -> None:
            if step.step == 0:
                start.update(self._look())
            self.log.write(step)
            reasons.extend(endings(step))

        outcome = self.actings[bundle].episode(
            self.robot,
            seed=self.plan.seed(trial),
            log=record,
            operator=self.people.operator,
            subscriber=self.people.subscriber,
            clock=self.clock,
            keys=self.keys,
        )
        if outcome.steps == 0:  # it was marked before it moved: nothing was seen of the policy
            return
        why = "; ".join(reasons)
        mark, score = self._marked(trial, place, outcome, why)
        if score is not None and not self.ledger.has_begun(trial):
            self._keep(trial, start)
        made = TrialRun(
            trial=trial, place=place, bundle=bundle, mark=mark, score=score, steps=outcome.steps, reason=why
        )
        self.ledger.append(replace(made, session=self.number, episode=self._episodes))
        self._episodes += 1
        worth = f", score {score:.4g}" if mark in ("partial", "measured") else ""
        which = f"trial {trial + 1} of {self.plan.trials}, run {place + 1} of {len(self.actings)}"
        print(f"{which}: {outcome.steps} steps, {mark}{worth}")
        if mark == "stopped":
            raise InputError(NOBODY.format(why))

    def _marked(self, trial: int, place: int, outcome: Outcome, why: str) -> tuple[str, float | None]:
        """How the run went: as a person says, or else as a simulator measured. why: the robot ended it by itself."""
        measured = outcome.score is not None and not why
        if self._operator is None or (outcome.mark is None and measured):
            return ("measured", outcome.score) if measured else ("stopped", None)
        if outcome.mark is None:
            self._show(trial, place, mark=ENDED.format(why) if why else ASKED)
            self._operator.ask()
        assert self._operator.mark is not None
        return self._operator.mark, self._operator.score

    def _look(self) -> dict[str, np.ndarray]:
        """What each camera sees now, uint8 [H, W, 3], or depth, uint16 [H, W]."""
        return {name: frame.values["image"] for name, ring in self._cameras.items() if (frame := ring.latest())}

    def _keep(self, trial: int, start: Mapping[str, np.ndarray]) -> None:
        """The pictures of a start, for the runs from it that follow."""
        for name, frame in start.items():
            with atomic_path(page.picture(self._starts(trial), name)) as temporary:
                temporary.write_bytes(jpeg(frame, quality=QUALITY))


def together(specs: Sequence[PolicySpec]) -> PolicySpec:
    """A specification that covers several policies: all that they observe, and the longest chunk."""
    observations = {key: value for spec in specs for key, value in spec.observations.items()}
    return replace(specs[0], observations=observations, horizon=max(spec.horizon for spec in specs))


def _widest(limits: Sequence[Limits]) -> Limits:
    """For the page: what any of the policies may command."""
    low, high = (np.stack([getattr(one, end) for one in limits]) for end in ("low", "high"))
    return replace(limits[0], low=low.min(axis=0), high=high.max(axis=0))
