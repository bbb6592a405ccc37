"""Which of our simulators a checkpoint's task is, and how often it acts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from action_diffusion.errors import InputError
from action_diffusion.policy.interchange.diffusion_policy.theirs import targeted
from action_diffusion.policy.spec import ObservationSpec
from action_diffusion.registry import ENVS
from action_diffusion.schema import shown

ROBOSUITE_RATE, USUAL_RATE = 20.0, 10.0
"""Hz: of robosuite's tasks, whose `fps` is that of videos; and of theirs on a real arm (eval_real_robot.py)."""


class Simulator(NamedTuple):
    """env: as a specification names it, or None. said: about what has no counterpart."""

    task: str
    env: dict[str, Any] | None
    control_rate: float
    demonstrations: str
    said: tuple[str, ...]


def simulator_of(config: Mapping[str, Any], observations: Mapping[str, ObservationSpec]) -> Simulator:
    """Of `cfg.task`; where there is none, what is usual."""
    task = config.get("task")
    task = task if isinstance(task, dict) else {}
    name = shown(task.get("name") or config.get("task_name") or config.get("name") or "")
    runner = _runner(task)
    data = task.get("dataset")
    paths = [data.get(key) for key in ("zarr_path", "dataset_path", "dataset_dir")] if isinstance(data, dict) else []
    demonstrations = next((shown(path) for path in paths if isinstance(path, str)), "")
    env, rate, said = _env(runner, task, observations)
    return Simulator(name, env, rate, demonstrations, said)


def _runner(task: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    try:
        return targeted(task.get("env_runner"), "cfg.task.env_runner")
    except InputError:
        return "", {}


def _env(
    runner: tuple[str, Mapping[str, Any]], task: Mapping[str, Any], observations: Mapping[str, ObservationSpec]
) -> tuple[dict[str, Any] | None, float, tuple[str, ...]]:
    kind, options = runner
    steps = options.get("max_steps")
    most = {"max_steps": steps} if type(steps) is int and steps > 0 else {}
    given = options.get("fps")
    rate = float(given) if isinstance(given, int | float) and 0 < given <= 10_000 else None
    if kind == "PushTImageRunner" and {"image", "agent_pos"} >= observations.keys():
        size = {"image_size": observations["image"].shape[0]} if "image" in observations else {}
        return {"name": "pusht", **most, **size, "control_rate": rate or USUAL_RATE}, rate or USUAL_RATE, ()
    if kind in ("RobomimicImageRunner", "RobomimicLowdimRunner"):
        name = task.get("task_name")
        if kind == "RobomimicImageRunner" and isinstance(name, str) and name in ENVS.own:
            return {"name": name, "absolute": task.get("abs_action") is True, **most}, ROBOSUITE_RATE, ()
        rate = ROBOSUITE_RATE
    named = f"cfg.task.env_runner {shown(kind)}" if kind else "a task without cfg.task.env_runner"
    said = f"{named} with observations {', '.join(observations)} is none of the simulators here: no env"
    guess = "" if rate else f", and {USUAL_RATE:g} Hz is assumed"
    return None, rate or USUAL_RATE, (said + guess,)
