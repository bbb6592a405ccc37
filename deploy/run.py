"""`action-diffusion deploy`: from a bundle to motion, a log and a latency report."""

from __future__ import annotations

import shlex
import sys
from contextlib import closing
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from action_diffusion.deploy.acting import EpisodeRunner, ways
from action_diffusion.deploy.arm.link import ArmSetup
from action_diffusion.deploy.loop.clock import Clock
from action_diffusion.deploy.loop.events import StepRecord, endings
from action_diffusion.deploy.records.run_log import RunLog
from action_diffusion.deploy.records.stream import RECORD
from action_diffusion.deploy.robot import robots
from action_diffusion.deploy.robot.robots import Robot, RobotTask
from action_diffusion.deploy.sim.world import stood_still
from action_diffusion.deploy.subscribers import Subscribers
from action_diffusion.options import Deploy
from action_diffusion.progress import progress


def run(config: Deploy, *, clock: Clock | None = None) -> int:
    """Deploy what `configs/deploy.yaml` asks for; returns the exit code: 0, or 130 after Ctrl-C.

    `clock`: real time where none is given; on another the loop thinks by itself, so that a run repeats. Raises
    `InputError` for a bundle that cannot be loaded or does not fit the robot, for a scheduling that its chunks are too
    short for, and for an output folder that holds a log.
    """
    asked = ArmSetup(driver=config.robot, limits=config.limits, obstacles=config.obstacles)
    asked.check()  # before all that takes long
    acting = EpisodeRunner(config)
    spec = acting.policy.spec
    robot = robots.make(config.robot, RobotTask.of(spec), config if clock is None else None)
    try:
        acting.meet(robot)
        stamp = f"deployment-{datetime.now():%Y%m%d-%H%M%S}"
        beside = Path(config.bundle).parent if config.bundle else Path()
        output_dir = Path(config.output_dir) if config.output_dir else beside / stamp
        with (
            RunLog(output_dir, control_rate=spec.control_rate) as log,
            closing(
                Subscribers(
                    config,
                    robot,
                    spec,
                    limits=acting.limits,
                    output_dir=output_dir,
                    computing=lambda: {"threads": acting.threads} | ways(acting.policy),
                )
            ) as subscribers,
        ):
            try:
                _episodes(config, acting, robot, log, subscribers, clock)
                code = 0
            except KeyboardInterrupt:
                print("interrupted: the robot is stopped, the log is kept", file=sys.stderr)
                code = 130
            finally:
                if robot.processes is not None and robot.processes.scene is not None:
                    log.notes["simulator_lost_s"] = robot.processes.scene.lost
    finally:
        robot.close()
        acting.close()
    if log.path.exists():
        _print(log)
    return code


def _episodes(
    config: Deploy, acting: EpisodeRunner, robot: Robot, log: RunLog, subscribers: Subscribers, clock: Clock | None
) -> None:
    """One episode after the other, each with a line of its outcome."""
    with progress("deploying", config.n_episodes * robot.max_steps) as advance:

        def record(step: StepRecord) -> None:
            log.write(step)
            advance(1)
            for reason in endings(step):
                print(f"seed {step.seed}, step {step.step}: {reason}", file=sys.stderr)

        for seed in range(config.seed, config.seed + config.n_episodes):
            subscribers.between()
            outcome = acting.episode(
                robot,
                seed=seed,
                log=record,
                operator=subscribers.operator,
                subscriber=subscribers.subscriber,
                clock=clock,
            )
            advance(robot.max_steps - outcome.steps)
            score = "" if outcome.score is None else f", score {outcome.score:.4f}"
            mark = "" if outcome.mark is None else f", {outcome.mark}"
            print(f"seed {seed}: {outcome.steps} steps{score}{mark}")


def _print(log: RunLog) -> None:
    summary = log.summary()
    table = Table("ms", "median", "95 %", "max", title=f"period {summary['period_ms']:g} ms")
    rows = {
        "inference": "inference_ms",
        "lateness": "lateness_ms",
        "delay of a chunk (control steps)": "delay_steps",
        "jump where chunks meet (the data's units)": "jump",
    }
    for name, key in rows.items():
        table.add_row(name, *("–" if value is None else f"{value:.1f}" for value in summary[key].values()))
    Console().print(table)
    print(f"deadline misses: {summary['deadline_misses']} beside {summary['steps']} commands")
    print(f"steps without a command of their own, in which the robot held: {summary['holds']}")
    print(f"interventions of the safety gate: {summary['interventions']}")
    lost = log.notes.get("simulator_lost_s")
    if isinstance(lost, float) and (words := stood_still(lost)):
        print(words)
    print(f"log: {log.path}")
    if (log.path.parent / RECORD).exists():
        print(f"the same once more, offline: action-diffusion deploy replay={shlex.quote(str(log.path.parent))}")
