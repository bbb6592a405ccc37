"""`action-diffusion deploy`: from a bundle to motion, a log and a latency report."""

from __future__ import annotations

import shlex
import sys
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from action_diffusion.deploy.arm.link import ArmSetup
from action_diffusion.deploy.loop.clock import Clock, MonotonicClock
from action_diffusion.deploy.loop.episode import run_episode
from action_diffusion.deploy.loop.events import StepRecord
from action_diffusion.deploy.loop.gate import Gate, demonstrated
from action_diffusion.deploy.loop.inference_worker import Unavailable
from action_diffusion.deploy.loop.prediction import Guidance, PolicyElsewhere, rehearse
from action_diffusion.deploy.records.run_log import RunLog
from action_diffusion.deploy.records.stream import RECORD
from action_diffusion.deploy.robot import robots
from action_diffusion.deploy.robot.robots import Robot, RobotTask
from action_diffusion.deploy.serve.policies import DeployedPolicy, open_policy
from action_diffusion.deploy.subscribers import Subscribers
from action_diffusion.errors import InputError
from action_diffusion.options import Deploy
from action_diffusion.policy.action_queue import ActionQueue, check_room
from action_diffusion.policy.extensions.watch import LEVEL
from action_diffusion.policy.history import History
from action_diffusion.policy.inference import choose_threads
from action_diffusion.policy.runtime.onnx_policy import OnnxPolicy
from action_diffusion.policy.spec import PolicySpec
from action_diffusion.progress import progress

ENDINGS = ("stop: ", "broken: ", "the arm's process")
"""How the reasons begin for which a robot ends an episode by itself."""


def run(config: Deploy, *, clock: Clock | None = None) -> int:
    """Deploy what `configs/deploy.yaml` asks for; returns the exit code: 0, or 130 after Ctrl-C.

    `clock`: real time where none is given; on another the loop thinks by itself, so that a run repeats. Raises
    `InputError` for a bundle that cannot be loaded or does not fit the robot, for a scheduling that its chunks are too
    short for, and for an output folder that holds a log.
    """
    asked = ArmSetup(driver=config.robot, limits=config.limits, obstacles=config.obstacles)
    asked.check()  # before all that takes long
    policy = open_policy(config)
    threads = None if isinstance(policy, PolicyElsewhere) else choose_threads(policy)
    guidance = Guidance(**vars(config.rtc))
    queue = _queue(config, policy.spec)
    robot = robots.make(config.robot, RobotTask.of(policy.spec), config if clock is None else None)
    try:
        robots.check_fit(robot, policy.spec)
        limits = demonstrated(policy.spec.normalizer["action"], config.safety.margin).within(robot.limits)
        _warm_up(policy, queue, guidance, config.guard.action)
        computing = {"threads": threads} | _ways(policy)
        stamp = f"deployment-{datetime.now():%Y%m%d-%H%M%S}"
        beside = Path(config.bundle).parent if config.bundle else Path()
        output_dir = Path(config.output_dir) if config.output_dir else beside / stamp
        with (
            RunLog(output_dir, control_rate=policy.spec.control_rate) as log,
            closing(
                Subscribers(config, robot, policy.spec, limits=limits, output_dir=output_dir, computing=computing)
            ) as subscribers,
        ):
            try:
                parts = {"queue": queue, "guidance": guidance, "gate": Gate(limits=limits)}
                waits = config.scheduling == "sync" and not isinstance(policy, PolicyElsewhere)
                parts |= {"beside": clock is None and not waits, "guard": config.guard.action}
                _episodes(config, policy, robot, log, subscribers, clock=clock or MonotonicClock(), **parts)
                code = 0
            except KeyboardInterrupt:
                print("interrupted: the robot is stopped, the log is kept", file=sys.stderr)
                code = 130
            finally:
                if robot.processes is not None and robot.processes.scene is not None:
                    log.notes["simulator_lost_s"] = robot.processes.scene.lost
    finally:
        robot.close()
        if isinstance(policy, PolicyElsewhere):
            policy.close()
    if log.path.exists():
        _print(log)
    return code


def _ways(policy: DeployedPolicy) -> dict[str, Any]:
    """The kernels that torch took for it, and on what machine; ONNX Runtime does not say."""
    if isinstance(policy, OnnxPolicy):
        return {}
    from action_diffusion import choice

    return {"ways": choice.table().taken, "machine": choice.machine()}


def _queue(config: Deploy, spec: PolicySpec) -> ActionQueue:
    """The queue that is asked for, after a check that the policy's chunks are long enough for it."""
    name, n_obs_steps, s = config.scheduling, spec.n_obs_steps, config.execution_horizon or spec.n_action_steps
    queue = ActionQueue(name, n_obs_steps=n_obs_steps, execution_horizon=s)
    delay = config.delay or 0
    check_room(name, horizon=spec.horizon, n_obs_steps=n_obs_steps, execution_horizon=s, delay=delay)
    return queue


def _episodes(
    config: Deploy,
    policy: DeployedPolicy,
    robot: Robot,
    log: RunLog,
    subscribers: Subscribers,
    **parts: Any,
) -> None:
    """One episode after the other, each with a line of its outcome; `parts` go to `run_episode`."""
    spec = policy.spec
    with progress("deploying", config.n_episodes * robot.max_steps) as advance:

        def record(step: StepRecord) -> None:
            log.write(step)
            advance(1)
            for reason in step.interventions:
                if reason.startswith(ENDINGS):
                    print(f"seed {step.seed}, step {step.step}: {reason}", file=sys.stderr)

        for seed in range(config.seed, config.seed + config.n_episodes):
            subscribers.between()
            outcome = run_episode(
                policy=policy,
                robot=robot,
                history=History(spec.n_obs_steps),
                log=record,
                seed=seed,
                keys=list(spec.observations),
                delay=config.delay or 0,
                operator=subscribers.operator,
                subscriber=subscribers.subscriber,
                **parts,
            )
            advance(robot.max_steps - outcome.steps)
            score = "" if outcome.score is None else f", score {outcome.score:.4f}"
            mark = "" if outcome.mark is None else f", {outcome.mark}"
            print(f"seed {seed}: {outcome.steps} steps{score}{mark}")


def _warm_up(policy: DeployedPolicy, queue: ActionQueue, guidance: Guidance, guard: str) -> None:
    """The first prediction also allocates memory and picks kernels: have that behind us before the robot moves.

    Raises `InputError` where something is to be done about alarms, and nobody guards.
    """
    try:
        said = rehearse(policy, guidance, queue.execution_horizon if queue.scheduling == "rtc" else None)
    except Unavailable as error:
        raise InputError(str(error)) from None
    if guard != "warn" and LEVEL not in said.notes:
        where = "action-diffusion serve" if isinstance(policy, PolicyElsewhere) else "deploy"
        raise InputError(f"guard.action={guard} needs a guard: give {where} extensions=[guard]")


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
    if log.notes.get("simulator_lost_s"):
        print(f"the simulator stood still for {log.notes['simulator_lost_s']:.2f} s: this machine is too busy for it")
    print(f"log: {log.path}")
    if (log.path.parent / RECORD).exists():
        print(f"the same once more, offline: action-diffusion deploy replay={shlex.quote(str(log.path.parent))}")
