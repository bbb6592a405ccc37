"""`action-diffusion collect agent=expert robot=sim_arm`: the scripted expert drives a robot in real time.

    tick           k                      k + 1                    k + 2
    observe        o[k] ──── expert ──┐   o[k+1] ── expert ──┐
    the arm is at  a[k] ───────────▶  a[k+1] ────────────▶  a[k+2]
    row            o[k], a[k]             o[k+1], a[k+1]

What the expert says at a tick is a pose to be at by the next one. A row's action is the pose for its own instant, as
step To-1 of a chunk is when `deploy` executes it, so that what is deployed moves as it was shown. Everything passes the
arm's process with its gate and limits, observations come from the arm and the cameras with their ages.

Where an episode begins is decided as in `envs.demonstration`: most of them where the expert got to on a wrong belief.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from action_diffusion import __version__
from action_diffusion.datasets.record.recorder import Recorder
from action_diffusion.datasets.storage.growing_column import Fields
from action_diffusion.datasets.storage.replay_buffer import ASSUMED_RATE
from action_diffusion.deploy.hardware.command import CommandLayout
from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.loop.clock import MonotonicClock, Pacer
from action_diffusion.deploy.robot.process_robot import ProcessRobot
from action_diffusion.deploy.robot.robots import RobotTask, in_processes
from action_diffusion.deploy.sim.panda import check_task
from action_diffusion.deploy.sim.robots import SimulatedScene
from action_diffusion.envs.demonstration import EXPERTS, STREAM, WANDERED, Expert
from action_diffusion.envs.robosuite.expert import STEP, TURN
from action_diffusion.envs.robosuite.tasks import RECORDED, WRENCH
from action_diffusion.errors import InputError, unknown
from action_diffusion.options import Collect
from action_diffusion.progress import progress
from action_diffusion.rotations import axis_angle_to_6d

POSE = ("position", "rotation")
PACE = 0.7
"""Share of the arm's velocity limits that the expert's poses use: the rest is for chunks that are not quite smooth."""
ACTION = 10


class ExpertDriver:
    """Drives one episode after the other.

    Args:
        robot: whose commands are poses of a hand, and a gripper.
        env_name: the task, of which there is an expert.
        keys: what is recorded.

    Attributes:
        fields: of a recorded step.
        missed, ages: ticks without a command, and how old each observation was (s).
    """

    def __init__(self, *, robot: ProcessRobot, env_name: str, keys: list[str]) -> None:
        self._robot, self._keys = robot, keys
        module, _, name = EXPERTS[env_name].partition(":")
        self._expert = getattr(importlib.import_module(module), name)
        assert robot.arm.limits is not None
        self._layout, self._limits = robot.layout, robot.arm.limits
        seen = robot.observe(keys, time.monotonic()).values
        self.fields: Fields = {key: (value.dtype.str, value.shape) for key, value in seen.items()}
        self.fields = {**self.fields, "action": ("<f4", (ACTION,)), "reward": ("<f4", ())}
        self.missed, self.ages = 0, list[float]()

    def episode(self, seed: int) -> Iterator[dict[str, Any]]:
        """The steps of the episode that begins at `seed`, as they happen; the last one has the reward.

        The robot rests when it is over, or left. Raises `InputError` where it does not begin.
        """
        expert: Expert = self._expert(seed=seed)
        errors = wrong_beliefs(expert, np.random.default_rng([STREAM, seed]))
        pacer, row = Pacer(clock=MonotonicClock(), rate=self._robot.control_rate), dict[str, Any]()
        self._robot.begin(seed)
        try:
            command = None
            for step in range(self._robot.max_steps + len(errors)):
                tick, missed = pacer.wait()
                seen = self._robot.observe([*dict.fromkeys([*self._keys, *expert.observations, *POSE])], tick)
                hand = np.concatenate([np.float64(seen.values[key]) for key in POSE])
                command = np.append(hand, -1.0) if command is None else command
                act = expert.act(seen.values, errors[step] if step < len(errors) else None)
                following = within(command, goal(hand, act), self._layout, self._limits, self._robot.control_rate)
                reward, done = self._robot.command([command, following], tick)
                self.missed += missed
                self.ages.append(tick - seen.t)
                if row:
                    yield {**row, "reward": np.float32(reward)}
                if done:
                    return
                if step >= len(errors):
                    row = {**{key: seen.values[key] for key in self._keys}, "action": action_of(command)}
                command = following
        finally:
            self._robot.stop()
            for reason in dict.fromkeys(self._robot.events()):
                print(f"seed {seed}: {reason}", file=sys.stderr)


def wrong_beliefs(expert: Expert, random: np.random.Generator) -> list[np.ndarray | None]:
    """What the expert is wrong by in each of the steps before the recording begins: often in none."""
    if random.random() > WANDERED:
        right, wrong = int(random.integers(0, expert.steps)), int(random.integers(5, 25))
        late = random.random() < 0.5
        return [None] * right + [expert.misbelief(random)] * wrong if late else []
    errors: list[np.ndarray | None] = []
    wandering = int(random.integers(10, 60))
    while len(errors) < wandering:
        errors += [expert.misbelief(random)] * int(random.integers(5, 25))
    return errors[:wandering]


def goal(hand: np.ndarray, action: np.ndarray) -> np.ndarray:
    """The pose [7] that a relative action [7] of OSC_POSE asks for, of a hand at a pose [6]."""
    turned = Rotation.from_rotvec(TURN * np.float64(action[3:6])) * Rotation.from_rotvec(hand[3:])
    return np.concatenate([hand[:3] + STEP * np.float64(action[:3]), turned.as_rotvec(), action[6:]])


def within(before: np.ndarray, wanted: np.ndarray, layout: CommandLayout, limits: Limits, rate: float) -> np.ndarray:
    """The command that goes from `before` towards `wanted`, all [A], as far as limits allow in a control period."""
    start, end = layout.to_coordinates(before), layout.to_coordinates(wanted)
    step, smooth = end - start, layout.smooth
    assert limits.velocity is not None
    most = PACE * limits.velocity[smooth] / rate
    step[smooth] = np.clip(step[smooth], -most, most)
    return layout.to_command(np.clip(start + step, limits.low, limits.high))


def action_of(command: np.ndarray) -> np.ndarray:
    """A command [7] as an absolute action float32 [10], with a 6D rotation."""
    return np.concatenate([command[:3], axis_angle_to_6d(command[3:6]), command[6:]]).astype(np.float32)


def run(config: Collect) -> dict[str, object]:
    """`collect` with a robot, and the values of `configs/collect.yaml`; returns the numbers to report.

    Episodes begin at the starts `seed`, `seed` + 1, …; one that does not succeed is discarded. Ctrl-C ends early, and
    keeps what there is. Raises `InputError` for another robot or task, and for an output that exists.
    """
    env, wanted, output = _checked(config), config.episodes, Path(config.output).expanduser()
    images = tuple(key for key, value in config.task.seen.items() if value.kind in ("image", "depth"))
    task = RobotTask(control_rate=float(config.task.control_rate or ASSUMED_RATE), env=env, cameras=images)
    robot = in_processes(str(config.robot), task, config)
    began = time.monotonic()
    try:
        keys = [*(f"robot0_{name}" for name in RECORDED), "object", *_wrench(config), *robot.cameras]
        demonstrator = ExpertDriver(robot=robot, env_name=env["name"], keys=keys)
        with Recorder.open(output, demonstrator.fields, _attrs(config, robot)) as recorder:
            counts = _record(demonstrator, recorder, config.seed, wanted, config.min_score)
        lost = 0.0 if robot.scene is None else robot.scene.lost
    finally:
        robot.close()
    return {
        "output": str(output),
        **counts,
        "missed_ticks": demonstrator.missed,
        "observation_age_ms": round(1e3 * float(np.median(demonstrator.ages or [0.0])), 1),
        "simulator_lost_s": round(lost, 3),
        "seconds": round(time.monotonic() - began, 1),
    }


def _wrench(config: Collect) -> list[str]:
    """What the hand feels, where the task wants to know it."""
    return [WRENCH] if any((value.source or key) == WRENCH for key, value in config.task.seen.items()) else []


def _record(
    demonstrator: ExpertDriver, recorder: Recorder, first: int, wanted: int, min_score: float
) -> dict[str, int | float]:
    """Episodes until there are enough of them, or Ctrl-C; the counts to report."""
    discarded, lengths = 0, list[int]()
    try:
        with progress(f"recording {wanted} episodes", wanted) as advance:
            for seed in range(first, first + 3 * wanted + 10):
                if len(lengths) == wanted:
                    break
                score = 0.0
                for step in demonstrator.episode(seed):
                    recorder.add(step)
                    score = max(score, float(step["reward"]))
                if score >= min_score and recorder.n_steps:
                    lengths.append(recorder.n_steps)
                    recorder.keep()
                    advance(1)
                else:
                    recorder.discard()
                    discarded += 1
    except KeyboardInterrupt:
        recorder.discard()
    return {
        "episodes": len(lengths),
        "steps": sum(lengths),
        "median_length": int(np.median(lengths or [0])),
        "discarded": discarded,
    }


def _checked(config: Collect) -> Mapping[str, Any]:
    """The task's simulator, of absolute poses. Raises `InputError`."""
    if config.robot != "sim_arm":
        raise unknown("robot of agent=expert", str(config.robot), ["sim_arm"])
    env = {**check_task(config.task.env, absolute=True), "absolute": True}
    if config.visited_by is not None:
        raise InputError("visited_by=… is for simulators in step, without robot=…")
    output = Path(config.output).expanduser()
    if output.exists() or output.suffix == ".zip":
        raise InputError(f"output={output} exists, or is no folder: give a new DIR.zarr")
    return env


def _attrs(config: Collect, robot: ProcessRobot) -> dict[str, object]:
    scene = robot.scene
    assert isinstance(scene, SimulatedScene)
    return {
        "task": (config.task.env or {})["name"],
        "source": "scripted expert, in real time",
        "robot": config.robot,
        "version": __version__,
        "seed": config.seed,
        "control_rate": robot.control_rate,
        "env_args": scene.said["env_args"],
    }
