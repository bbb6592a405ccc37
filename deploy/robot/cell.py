"""Arms and cameras that are real, as a file says: from `hardware=cell.yaml` to processes.

    arm: {host: 192.168.0.10, model: ur5e}            options of the arm's driver; which one is `robot=ur`
    limits: {low: […], high: […], velocity: […], acceleration: […], jerk: […]}
    obstacles: {table: 0.0}                           optional
    cameras:                                          one for each image that the policy sees, by its key
      front: {driver: usb, device: /dev/video0, image_size: [96, 96], stamp_latency: 0.03}
    observations: {state: [joints, gripper]}          optional: keys of the policy → states, one after the other
    leader: {type: so101_leader, config: {…}}         optional: the arm that a person leads it with (`collect`)
    device: {…}                                       optional: options of a plugin's device
    seconds: 60.0                                     optional: of an episode

docs/bringup.md shows a whole one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from action_diffusion.deploy.arm.link import ArmSetup
from action_diffusion.deploy.ipc.rings import Segments
from action_diffusion.deploy.robot.process_robot import CameraSetup, ProcessRobot
from action_diffusion.deploy.robot.robots import Observation, RobotOptions, RobotTask
from action_diffusion.errors import InputError, unknown

MOST_SECONDS = 86_400.0
SECTIONS = ("arm", "limits", "obstacles", "cameras", "observations", "leader", "device", "seconds")


def read_cell(path: str | None) -> dict[str, Any]:
    """The sections of a hardware file. Raises `InputError` for one that cannot be read, or has others."""
    if not path:
        raise InputError("hardware=FILE.yaml is missing: what the arm and its cameras are, see docs/bringup.md")
    try:
        cell = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"hardware={path}: {' '.join(str(error).split())}") from None
    if not isinstance(cell, dict):
        raise InputError(f"hardware={path}: sections are expected: {', '.join(SECTIONS)}")
    for name, value in cell.items():
        if name not in SECTIONS:
            raise unknown("section", str(name), SECTIONS, f"hardware={path}")
        if name != "seconds" and not isinstance(value, dict | None):
            raise InputError(f"hardware={path}: {name} must be values by name, not {value!r}")
    seconds = cell.get("seconds", 60.0)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= MOST_SECONDS:
        raise InputError(f"hardware={path}: seconds={seconds} must be a number above 0, at most {MOST_SECONDS:g}")
    for key, states in (cell.get("observations") or {}).items():
        named = [states] if isinstance(states, str) else states
        if not isinstance(named, list) or not named or not all(isinstance(state, str) for state in named):
            raise InputError(f"hardware={path}: observations.{key}={states} must be names of states, such as [joints]")
    return cell


def arm_setup(
    driver: str,
    cell: Mapping[str, Any],
    *,
    dry_run: bool = False,
    limits: Mapping[str, object] | None = None,
    obstacles: Mapping[str, object] | None = None,
) -> ArmSetup:
    """The arm of a cell. limits, obstacles: of the command, which go before the cell's."""
    settings = dict(cell.get("arm") or {}) | ({"dry_run": True} if dry_run else {})
    limits, obstacles = limits or cell.get("limits"), obstacles or cell.get("obstacles")
    return ArmSetup(driver=driver, settings=settings, limits=limits, obstacles=obstacles)


def camera_setups(cell: Mapping[str, Any]) -> dict[str, CameraSetup]:
    """The cameras of a cell, by key. Raises `InputError` for one without a driver, or with an impossible latency."""
    setups = {}
    for key, settings in (cell.get("cameras") or {}).items():
        if not isinstance(settings, dict) or "driver" not in settings:
            raise InputError(f"camera {key} names no driver: {{driver: usb, …}} or {{driver: realsense, …}}")
        rest, late = dict(settings), settings.get("stamp_latency", 0.0)
        if isinstance(late, bool) or not isinstance(late, int | float) or not abs(late) < 1:
            raise InputError(f"camera {key}: stamp_latency={late} must be a number of seconds, less than 1")
        driver = rest.pop("driver")
        rest.pop("stamp_latency", None)
        setups[key] = CameraSetup(driver=driver, settings=rest, stamp_latency=float(late))
    return setups


def check_cameras(keys: Sequence[str], cameras: Mapping[str, CameraSetup], hardware: str | None) -> None:
    """Raises `InputError` for an image, or depth, that a policy sees, and that no camera of the file takes."""
    for key in keys:
        if key not in cameras:
            raise unknown("camera", key, cameras, f"hardware={hardware}, and the policy needs it")


class CellRobot(ProcessRobot):
    """A `ProcessRobot` whose observations may be several states, one after the other.

    joined: the observation's key → names of states. Raises `InputError` for a state that the arm does not have.
    """

    def __init__(self, *, joined: Mapping[str, Sequence[str]], **parts: Any) -> None:
        super().__init__(**parts)
        self._joined = joined
        states = [group.name for group in self.arm.state]
        for key, sources in joined.items():
            for source in sources:
                if source not in states:
                    self.close()
                    raise unknown("state", str(source), states, f"observations.{key} of the hardware's file")

    def observe(self, keys: Sequence[str], t: float) -> Observation:
        """See `ProcessRobot`: all of one instant."""
        needed = [source for key in keys for source in self._joined.get(key, [key])]
        seen = super().observe(list(dict.fromkeys(needed)), t)
        values = {
            key: np.concatenate([seen.values[source] for source in self._joined[key]])
            if key in self._joined
            else seen.values[key]
            for key in keys
        }
        return Observation(seen.t, values)


def robot(task: RobotTask, options: RobotOptions) -> CellRobot:
    """The robot that `options` name, with the file's settings. Raises `InputError` for one that does not start."""
    cell = read_cell(options.hardware)
    cameras = camera_setups(cell)
    check_cameras(task.cameras, cameras, options.hardware)
    given = cell.get("observations") or {}
    segments = Segments()
    try:
        return CellRobot(
            segments=segments,
            arm=arm_setup(
                str(options.robot),
                cell,
                dry_run=options.dry_run,
                limits=options.limits,
                obstacles=options.obstacles,
            ),
            cameras=cameras,
            control_rate=task.control_rate,
            max_steps=math.ceil(float(cell.get("seconds", 60.0)) * task.control_rate),
            joined={key: [states] if isinstance(states, str) else list(states) for key, states in given.items()},
        )
    except BaseException:
        segments.remove()
        raise
