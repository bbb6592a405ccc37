"""`action-diffusion deploy … calibrate=true`: how late cameras, arm and policy are, from a slow motion of the arm.

The motion goes through all that a policy's does: waypoints to the arm's process, its gate, its shaper, the driver. The
arm stops as it does in any run. `calibration` has what is measured, docs/bringup.md what to do with it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from action_diffusion.deploy.calibrate.delays import actuation, camera
from action_diffusion.deploy.calibrate.motion import RecordedMotion, Wanted, move, plan
from action_diffusion.deploy.calibrate.report import SEEN, Calibrated, CameraFound, print_table, write
from action_diffusion.deploy.robot.process_robot import ProcessRobot
from action_diffusion.deploy.robot.robots import RobotTask, in_processes
from action_diffusion.errors import InputError
from action_diffusion.options import Deploy

if TYPE_CHECKING:  # torch is only needed where there is a policy
    from action_diffusion.deploy.serve.policies import DeployedPolicy

N_PREDICTIONS, LONG = 20, 10.0
"""How many predictions are timed, unless they take longer (s) together: at least three."""
FOLLOWS = 0.2
"""An arm that moves by less than this share of the motion does not follow."""


def run(config: Deploy) -> int:
    """Measure what `configs/deploy.yaml` names. Returns the exit code: 0; 1 where the arm's process intervened.

    Raises `InputError` for a motion that cannot be, a robot that does not start or does not follow, and an output
    folder that holds latencies.
    """
    wanted = Wanted(**vars(config.calibration))
    if config.dry_run:
        raise InputError("calibrate=true moves the arm, which dry_run=true forbids")
    beside = Path(config.bundle).parent if config.bundle else Path()
    folder = Path(config.output_dir or beside / f"calibration-{datetime.now():%Y%m%d-%H%M%S}")
    if (folder / "latency.json").exists():
        raise InputError(f"{folder} already holds latencies: give another output_dir")
    policy = _policy(config)
    try:
        with closing(_robot(config, policy)) as robot:
            measured = _moved(robot, wanted, config.seed)
            if measured.events:
                for event in measured.events:
                    print(f"the arm's process intervened: {event}", file=sys.stderr)
                return 1
            seconds = None if policy is None else _inference(policy, config)
            found = estimate(config.robot, measured, robot.stamp_latency, seconds)
    finally:
        close = getattr(policy, "close", None)  # of a policy behind a server
        if close is not None:
            close()
    write(found, folder)
    print_table(found)
    print(f"latencies: {folder / 'latency.json'}, and a picture beside it")
    return 0


def _policy(config: Deploy) -> DeployedPolicy | None:
    """None where neither a bundle nor a server is given: then nothing thinks."""
    if config.bundle is None and config.server is None:
        return None
    from action_diffusion.deploy.loop.prediction import PolicyElsewhere
    from action_diffusion.deploy.serve.policies import open_policy
    from action_diffusion.policy.inference import choose_threads

    policy = open_policy(config)
    if not isinstance(policy, PolicyElsewhere):
        choose_threads(policy)
    return policy


def _robot(config: Deploy, policy: DeployedPolicy | None) -> ProcessRobot:
    """The robot with its cameras; the simulated PushT with one, whatever the policy looks at."""
    task = RobotTask() if policy is None else RobotTask.of(policy.spec)
    if config.robot == "sim_pusht":
        task = replace(task, cameras=("image",))
    return in_processes(config.robot, task, config)


def _moved(robot: ProcessRobot, wanted: Wanted, seed: int) -> RecordedMotion:
    """Begin, go through the motion, and rest."""
    try:
        robot.begin(seed)
        motion = plan(robot.arm, wanted)
        far = motion.commands[:, wanted.number]
        print(
            f"number {wanted.number} goes to and fro between {far.min():.4g} and {far.max():.4g}, "
            f"{motion.times[-1]:.1f} s long, cameras: {', '.join(robot.cameras) or 'none'}"
        )
        return move(robot, motion, wanted.number)
    finally:
        robot.stop()


def _inference(policy: DeployedPolicy, config: Deploy) -> list[float]:
    """Seconds of each prediction, as the loop would ask for them, while cameras and arm go on.

    Raises `InputError` where a server does not answer.
    """
    from action_diffusion.deploy.loop.inference_worker import Unavailable
    from action_diffusion.deploy.loop.prediction import Guidance, rehearse

    guidance = Guidance(**vars(config.rtc))
    horizon = config.execution_horizon or policy.spec.n_action_steps
    running = horizon if config.scheduling == "rtc" else None
    seconds: list[float] = []
    try:
        rehearse(policy, guidance, running)
        while len(seconds) < N_PREDICTIONS and (len(seconds) < 3 or sum(seconds) < LONG):
            start = time.perf_counter()
            rehearse(policy, guidance, running)
            seconds.append(time.perf_counter() - start)
    except Unavailable as error:
        raise InputError(str(error)) from None
    return seconds


def estimate(
    robot: str, measured: RecordedMotion, stamp_latency: Mapping[str, float], inference: list[float] | None
) -> Calibrated:
    """All latencies. stamp_latency: of each camera, what was taken off its stamps already (s).

    Raises `InputError` where the arm did not follow.
    """
    told, went = np.ptp(measured.sent.values), np.ptp(measured.state.values)
    if went < FOLLOWS * told:
        raise InputError(f"the arm did not follow: it was told to move by {told:.4g}, and moved by {went:.4g}")
    periods = list(measured.edges)
    arm = actuation(measured.sent, measured.state, periods)
    late = arm.total.median
    cameras = {}
    for key, frames in measured.frames.items():
        try:  # the arm's own periods are later than the setpoints'
            sight = camera(frames, measured.state, [edge + late for edge in periods])
        except ValueError:  # hardly any frames
            sight = None
        if sight is not None and sight.seen < SEEN:
            sight = None
        cameras[key] = CameraFound(sight=sight, arrived=measured.arrived[key], corrected=stamp_latency[key])
    return Calibrated(robot=robot, measured=measured, actuation=arm, cameras=cameras, inference=inference)
