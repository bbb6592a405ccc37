"""What robomimic's files say of the simulator that they were recorded in, and that simulator again.

env_args, JSON       {"env_name": "Lift", "env_version": "1.4.1", "type": 1, "env_kwargs": {…}}
                              │ complete: controllers upgraded, what is not said added
                              ▼
                     the same form, of the robosuite that is installed; `make` builds it

model_file, MJCF     sizes of the objects, which robosuite draws anew for each episode (Lift's cube)
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from action_diffusion.envs.robosuite import controllers
from action_diffusion.envs.robosuite.headless import RenderSettings
from action_diffusion.errors import InputError, unknown


class RecordedTask(NamedTuple):
    """env_name: robosuite's. steps: after which an episode is over. camera: for people. size: of images, px."""

    env_name: str
    robots: tuple[str, ...] = ("Panda",)
    steps: int = 400
    camera: str = "agentview"
    size: int = 84


TASKS = {
    "lift": RecordedTask("Lift"),
    "can": RecordedTask("PickPlaceCan"),
    "square": RecordedTask("NutAssemblySquare"),
    "transport": RecordedTask("TwoArmTransport", robots=("Panda", "Panda"), steps=700),
    "tool_hang": RecordedTask("ToolHang", steps=700, camera="sideview", size=240),
}
OURS = {
    "has_renderer": False,
    "has_offscreen_renderer": False,  # `headless.Renderer` draws
    "use_camera_obs": False,
    "use_object_obs": True,
    "reward_shaping": False,
    "ignore_done": True,
    "hard_reset": True,  # else the sizes of objects would not depend on the seed
    "renderer": "mujoco",
}
"""Settings of robosuite that are not for the file to choose."""
DROPPED = ("camera_", "render_", "env_name", "horizon", "seed")
"""How others begin, which say how the file was made and not what is in it."""
LAYOUTS = ("1.4", "1.5")
"""Of the observation `object`. Simulators that no file asks for have the first."""
OBJECT_PARTS = {
    "Lift": ("cube_pos", "cube_quat", "gripper_to_cube_pos"),
    "PickPlaceCan": ("Can_pos", "Can_quat", "Can_to_robot0_eef_pos", "Can_to_robot0_eef_quat"),
    "NutAssemblySquare": (
        "SquareNut_pos",
        "SquareNut_quat",
        "SquareNut_to_robot0_eef_pos",
        "SquareNut_to_robot0_eef_quat",
    ),
    "TwoArmTransport": (
        *("payload_pos", "payload_quat", "trash_pos", "trash_quat", "lid_handle_pos", "lid_handle_quat"),
        *("target_bin_pos", "trash_bin_pos", "gripper0_to_payload", "gripper0_to_lid_handle"),
        *("gripper1_to_payload", "gripper1_to_trash", "payload_in_target_bin", "trash_in_trash_bin"),
    ),
    "ToolHang": (
        *("base_pos", "base_quat", "base_to_robot0_eef_pos", "base_to_robot0_eef_quat"),
        *("frame_pos", "frame_quat", "frame_to_robot0_eef_pos", "frame_to_robot0_eef_quat"),
        *("tool_pos", "tool_quat", "tool_to_robot0_eef_pos", "tool_to_robot0_eef_quat"),
        *("frame_is_assembled", "tool_on_frame"),
    ),
}
"""The parts of `object` in the layout of 1.4, under the names of 1.5."""
ROBOSUITE_TYPE = 1  # robomimic's number for robosuite
AS_ROBOSUITE = RenderSettings(reflections=True, samples=4)
"""How robosuite renders by itself, and so every file that does not say otherwise."""


def task_of(task: str | None, env_args: Mapping[str, Any] | None) -> RecordedTask:
    """The task of that name or of that metadata, which must agree. Raises `InputError` for others, and for neither."""
    if task is not None and task not in TASKS:
        raise unknown("manipulation task", task, TASKS)
    if env_args is None:
        if task is None:
            raise InputError(f"name a task ({', '.join(TASKS)}), or give the env_args of a robomimic file")
        return TASKS[task]
    named = {found.env_name: found for found in TASKS.values()}
    env_name = str(env_args.get("env_name"))
    if env_name not in named:
        raise unknown("environment", env_name, named, "env_args")
    if task is not None and TASKS[task].env_name != env_name:
        raise InputError(f"task {task} is {TASKS[task].env_name}, but the data were recorded in {env_name}")
    return named[env_name]


def complete(task: RecordedTask, env_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Metadata in robomimic's form that says all that the simulator depends on, from `env_args` or from nothing.

    Beside robomimic's `env_name`, `env_version`, `type` and `env_kwargs` there are `render`, `RenderSettings`, which
    are robosuite's own where a file does not say, and `object_layout`, one of `LAYOUTS`. Raises `InputError` for
    settings that robosuite does not have.
    """
    robosuite = installed()
    given = dict(env_args or {})
    said = dict(given.get("env_kwargs", {}))
    kwargs = {key: value for key, value in said.items() if key not in OURS and not key.startswith(DROPPED)}
    known = _settings(robosuite.environments.base.REGISTERED_ENVS[task.env_name])
    for key in kwargs:
        if key not in known:
            raise unknown(f"setting of {task.env_name}", key, known, "env_args")
    robots = kwargs.get("robots", list(task.robots))
    kwargs["robots"] = [robots] if isinstance(robots, str) else list(robots)
    kwargs["controller_configs"] = controllers.upgraded(kwargs.get("controller_configs"), kwargs["robots"], "env_args")
    kwargs.setdefault("control_freq", 20)
    is_old = env_args is not None and _is_old(given.get("env_version"))
    kwargs.setdefault("lite_physics", not is_old)  # what it computes once in each physics step, 1.4 computed twice
    size = _image_size(said, task.size)
    render = (RenderSettings() if env_args is None else AS_ROBOSUITE)._asdict()
    return {
        "env_name": task.env_name,
        "env_version": robosuite.__version__,
        "type": ROBOSUITE_TYPE,
        "env_kwargs": {**OURS, **kwargs, "camera_heights": size, "camera_widths": size},
        "render": dict(given.get("render", render)),
        "object_layout": given.get("object_layout", "1.4" if env_args is None or is_old else "1.5"),
    }


def make(env_args: Mapping[str, Any], *, absolute: bool) -> Any:
    """robosuite's simulator of complete metadata, told poses to go to if `absolute`."""
    kwargs = {key: value for key, value in env_args["env_kwargs"].items() if not key.startswith(DROPPED)}
    configs = copy.deepcopy(kwargs["controller_configs"])  # robosuite writes into them
    kwargs["controller_configs"] = controllers.absolute(configs, "env_args") if absolute else configs
    return installed().make(env_args["env_name"], **kwargs)


def installed() -> Any:
    """The module robosuite. Raises `InputError` where it cannot be imported."""
    # It warns of extras that nobody asked for, and says EGL to every child process before anybody tried.
    logging.getLogger("robosuite_logs").addFilter(_no_warnings)
    before = os.environ.get("MUJOCO_GL")
    try:
        import robosuite
    except ImportError as error:
        raise InputError(
            f"manipulation tasks need robosuite: pip install 'action-diffusion[robomimic]' ({error})"
        ) from None
    if before is None:
        os.environ.pop("MUJOCO_GL", None)
    return robosuite


def _no_warnings(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _settings(simulator: type) -> list[str]:
    """What may be set: tasks that narrow another one hand on everything else."""
    for kind in simulator.__mro__:
        parameters = inspect.signature(getattr(kind, "__init__")).parameters.values()  # noqa: B009
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            return [parameter.name for parameter in parameters if parameter.name != "self"]
    raise AssertionError(f"{simulator} takes anything")


def _is_old(version: Any) -> bool:
    found = re.match(r"(\d+)\.(\d+)", str(version))
    return found is None or (int(found[1]), int(found[2])) < (1, 5)


def _image_size(said: Mapping[str, Any], size: int) -> int:
    """The one size of all images, px."""
    sizes: set[Any] = set()
    for key in ("camera_heights", "camera_widths"):
        value = said.get(key, size)
        sizes |= set(value) if isinstance(value, list | tuple) else {value}
    found = sizes.pop() if len(sizes) == 1 else None
    if not isinstance(found, int) or found < 1:
        raise InputError("env_args: camera_heights and camera_widths must be one number of pixels for all cameras")
    return found


def object_vector(found: Mapping[str, Any], env_args: Mapping[str, Any]) -> np.ndarray:
    """The observation `object` [n] from robosuite's observations, in the layout of `env_args`."""
    if env_args["object_layout"] == LAYOUTS[1]:
        return np.asarray(found["object-state"])
    parts = [np.atleast_1d(found[name]) for name in OBJECT_PARTS[env_args["env_name"]]]
    if env_args["env_name"] == "Lift":
        parts[-1] = -parts[-1]
    return np.concatenate(parts)


def object_sizes(model: str, env_name: str) -> dict[str, str]:
    """The size of every box, cylinder, … of the bodies that move freely in an MJCF scene, by name, as written there.

    Raises `InputError` for text that is no MJCF.
    """
    try:
        root = ElementTree.fromstring(model)
    except ElementTree.ParseError as error:
        raise InputError(f"the recorded model of {env_name} is no MJCF: {error}") from None
    bodies = [
        body
        for body in root.iter("body")
        if body.find("freejoint") is not None or any(joint.get("type") == "free" for joint in body.findall("joint"))
    ]
    geoms = [geom for body in bodies for geom in body.iter("geom")]
    return {
        name: size
        for geom in geoms
        if (name := geom.get("name")) and (size := geom.get("size")) and not geom.get("mesh")
    }


def resized(model: str, sizes: Mapping[str, str], env_name: str) -> str:
    """An MJCF scene with those sizes. Raises `InputError` where it has no such shapes."""
    if not sizes:
        return model
    root = ElementTree.fromstring(model)
    geoms = {geom.get("name", ""): geom for geom in root.iter("geom")}
    for name, size in sizes.items():
        if name not in geoms:
            raise InputError(f"the recorded model has {name}, which {env_name} does not have")
        geoms[name].set("size", size)
    return ElementTree.tostring(root, encoding="unicode")
