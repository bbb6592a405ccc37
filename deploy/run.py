"""`action-diffusion deploy`: from a bundle to motion, a log and a latency report."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from action_diffusion.datasets.progress import progress
from action_diffusion.deploy import robots
from action_diffusion.deploy.clock import Clock, MonotonicClock
from action_diffusion.deploy.gate import Gate, demonstrated
from action_diffusion.deploy.loop import StepRecord, run_episode
from action_diffusion.deploy.record import RunLog
from action_diffusion.deploy.robots import Robot
from action_diffusion.envs.rollout import generators
from action_diffusion.errors import InputError
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.agent import Agent
from action_diffusion.policy.policy import DiffusionPolicy


def run(config: Mapping[str, Any], *, clock: Clock | None = None) -> int:
    """Deploy what `configs/deploy.yaml` asks for; returns the exit code: 0, or 130 after Ctrl-C.

    `clock`: real time where none is given. Raises `InputError` for a bundle that cannot be loaded or does not fit
    the robot, and for an output folder that holds a log.
    """
    for name, least in (("n_episodes", 1), ("seed", 0)):
        if config[name] < least:
            raise InputError(f"{name}={config[name]} must be at least {least}")
    if isinstance(config["bundle"], list):
        raise InputError(f"bundle={config['bundle']}: one bundle is deployed at a time")
    path = Path(config["bundle"])
    policy = bundles.load(path, config["device"], sampler=config["sampler"])
    robot = robots.make(config["robot"], policy.spec)
    try:
        robots.check_fit(robot, policy.spec)
        limits = demonstrated(policy.spec.normalizer["action"], config["safety"]["margin"]).within(robot.limits)
        _warm_up(policy)
        stamp = f"deployment-{datetime.now():%Y%m%d-%H%M%S}"
        output_dir = Path(config["output_dir"]) if config["output_dir"] else path.parent / stamp
        with RunLog(output_dir, control_rate=policy.spec.control_rate) as log:
            try:
                _episodes(config, policy, robot, Gate(limits=limits), clock or MonotonicClock(), log)
                code = 0
            except KeyboardInterrupt:
                print("interrupted: the robot is stopped, the log is kept", file=sys.stderr)
                code = 130
    finally:
        robot.close()
    if log.path.exists():
        _print(log)
    return code


def _episodes(
    config: Mapping[str, Any], policy: DiffusionPolicy, robot: Robot, gate: Gate, clock: Clock, log: RunLog
) -> None:
    """One episode after the other, each with a line of its outcome."""
    spec = policy.spec
    with progress("deploying", config["n_episodes"] * robot.max_steps) as advance:

        def record(step: StepRecord) -> None:
            log.write(step)
            advance(1)

        for seed in range(config["seed"], config["seed"] + config["n_episodes"]):
            outcome = run_episode(
                policy=policy,
                robot=robot,
                agent=Agent(n_obs_steps=spec.n_obs_steps, n_action_steps=spec.n_action_steps),
                gate=gate,
                clock=clock,
                log=record,
                seed=seed,
                keys=list(spec.observations),
            )
            advance(robot.max_steps - outcome.steps)
            score = "" if outcome.score is None else f", score {outcome.score:.4f}"
            print(f"seed {seed}: {outcome.steps} steps{score}")


def _warm_up(policy: DiffusionPolicy) -> None:
    """The first prediction also allocates memory and picks kernels: have that behind us before the robot moves."""
    obs = {
        key: np.zeros((1, policy.spec.n_obs_steps, *value.shape), dtype=value.dtype)
        for key, value in policy.spec.observations.items()
    }
    noise_generator, generator = generators(0)
    policy.predict(obs, noise_generator=[noise_generator], generator=[generator])


def _print(log: RunLog) -> None:
    summary = log.summary()
    table = Table("ms", "median", "95 %", "max", title=f"period {summary['period_ms']:g} ms")
    for name in ("inference", "lateness"):
        spread = summary[f"{name}_ms"].values()
        table.add_row(name, *("–" if value is None else f"{value:.1f}" for value in spread))
    Console().print(table)
    print(f"deadline misses: {summary['deadline_misses']} beside {summary['steps']} commands")
    print(f"interventions of the safety gate: {summary['interventions']}")
    print(f"log: {log.path}")
