"""Controller settings of robosuite files of every version, in the form that robosuite 1.5 takes.

Up to 1.4 a file says how one arm is controlled, and the same for every arm; from 1.5 on, how every part of a robot is:

    {"type": "OSC_POSE", "kp": 150,           {"type": "BASIC", "body_parts": {
     "control_delta": true, …}         ──▶       "right": {"type": "OSC_POSE", "kp": 150, "input_type": "delta",
                                                           "input_ref_frame": "world", …, "gripper": {…}}}}

Two meanings moved with it. Deltas were along the world's axes and are along those of the robot's base unless
told otherwise, which are others where robots face each other (TwoArmTransport); and `damping` became `damping_ratio`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from action_diffusion.errors import InputError, unknown

ARM_CONTROLLERS = ("IK_POSE", "JOINT_POSITION", "JOINT_TORQUE", "JOINT_VELOCITY", "OSC_POSE", "OSC_POSITION")
RENAMED = {"damping": "damping_ratio", "damping_limits": "damping_ratio_limits"}  # in robosuite 1.2
ARMS = ("right", "left")

Config = dict[str, Any]


def upgraded(configs: Any, robots: Sequence[str], where: str = "") -> list[Config]:
    """The controller settings of each of `robots` ("Panda", …) as robosuite 1.5 takes them.

    configs: the `controller_configs` of a file: the settings for all robots, a list with those of each, or None for
        robosuite's default (deltas of the pose by OSC_POSE for a Panda).
    where: what messages call the file.

    Raises `InputError` for a robot or controller that robosuite does not have, and for another number of settings.
    """
    from robosuite.controllers.composite.composite_controller_factory import load_composite_controller_config
    from robosuite.models.robots.robot_model import REGISTERED_ROBOTS

    each = list(configs) if isinstance(configs, list | tuple) else [configs] * len(robots)
    if len(each) != len(robots):
        raise InputError(f"{_named(where)} has controller settings for {len(each)} of {len(robots)} robots")
    result = []
    for config, robot in zip(each, robots, strict=True):
        if robot not in REGISTERED_ROBOTS:
            raise unknown("robot", robot, REGISTERED_ROBOTS, where)
        if config is None:
            config = load_composite_controller_config(robot=robot)
        result.append(_of_one_robot(config, robot, REGISTERED_ROBOTS[robot].arms, where))
    return result


def _of_one_robot(config: Any, robot: str, arms: Sequence[str], where: str) -> Config:
    if not isinstance(config, Mapping):
        raise InputError(f"{_named(where)}: controller settings are {config!r}; expected an object with a type")
    if "body_parts" in config:
        return _composite(config, where)
    from robosuite.controllers.composite.composite_controller_factory import refactor_composite_controller_config

    _check_type(config, where)
    part = {RENAMED.get(key, key): copy.deepcopy(value) for key, value in config.items() if key != "control_delta"}
    part = {"interpolation": None, "ramp_ratio": 0.2, **part}
    if "control_delta" in config:
        part["input_type"] = "delta" if config["control_delta"] else "absolute"
    if part["type"].startswith("OSC"):
        part.setdefault("input_ref_frame", "world")
    result: dict[str, Any] = refactor_composite_controller_config(part, robot, arms)
    return result


def _composite(config: Mapping[str, Any], where: str) -> Config:
    from robosuite.controllers.composite import ALL_COMPOSITE_CONTROLLERS

    if config.get("type") not in ALL_COMPOSITE_CONTROLLERS:
        raise unknown("controller", str(config.get("type")), ALL_COMPOSITE_CONTROLLERS, where)
    result = copy.deepcopy(dict(config))
    parts = dict(result["body_parts"])
    parts = {**parts.pop("arms", {}), **parts}
    for arm in ARMS:
        if arm in parts:
            _check_type(parts[arm], where)
    return {**result, "body_parts": parts}


def _check_type(part: Mapping[str, Any], where: str) -> None:
    if part.get("type") not in ARM_CONTROLLERS:
        raise unknown("controller", str(part.get("type")), ARM_CONTROLLERS, where)


def absolute(configs: Sequence[Config], where: str = "") -> list[Config]:
    """The same controllers told the pose to go to, in the world's frame, instead of a step from where they are.

    Raises `InputError` where an arm is not controlled by OSC_POSE.
    """
    result = copy.deepcopy(list(configs))
    for config in result:
        for arm in ARMS:
            part = config["body_parts"].get(arm)
            if part is None:
                continue
            if part["type"] != "OSC_POSE":
                raise InputError(f"absolute actions need the controller OSC_POSE; {_named(where)} has {part['type']}")
            part |= {"input_type": "absolute", "input_ref_frame": "world"}
    return result


def _named(where: str) -> str:
    return where or "the environment"
