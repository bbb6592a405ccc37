"""Which of our simulators a checkpoint's task is, and how often it acts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from action_diffusion.errors import InputError
from action_diffusion.policy.interchange.diffusion_policy.theirs import targeted
from action_diffusion.policy.spec import ObservationSpec
from action_diffusion.schema import shown

ROBOSUITE_RATE, USUAL_RATE = 20.0, 10.0
"""Hz: of robosuite's tasks, where `fps` is that of videos; and of their arms, unless one says another."""
ROBOSUITE = ("lift", "can", "square", "transport", "tool_hang")
PUSHT_OBS = {"obs": (20,)}
"""Nine points of the T, and where the finger is."""


class KnownSimulator(NamedTuple):
    """env: as a specification names it, or None. said: about what has no counterpart."""

    task: str
    env: dict[str, Any] | None
    control_rate: float
    demonstrations: str
    said: tuple[str, ...]


def simulator_of(config: Mapping[str, Any], observations: Mapping[str, ObservationSpec]) -> KnownSimulator:
    """Of `cfg.task`; where there is none, what is usual."""
    task = config.get("task")
    task = task if isinstance(task, dict) else {}
    name = shown(task.get("name") or config.get("task_name") or "")
    data = task.get("dataset")
    paths = [data.get(key) for key in ("zarr_path", "dataset_path", "dataset_dir")] if isinstance(data, dict) else []
    demonstrations = next((shown(path) for path in paths if isinstance(path, str)), "")
    kind, options = _runner(task)
    given = options.get("fps")
    rate = float(given) if isinstance(given, int | float) and 0 < given <= 10_000 else None
    rate = ROBOSUITE_RATE if kind.startswith("Robomimic") else rate
    env = _env(kind, options, task, observations)
    said = []
    if env is None:
        what = f"cfg.task.env_runner {shown(kind)}" if kind else "a task without cfg.task.env_runner"
        said.append(f"{what}, with observations {', '.join(observations)}, is none of the simulators here: no env")
    if rate is None:
        said.append(f"the control rate is not said: {USUAL_RATE:g} Hz, as their arms have, unless rate=HZ says another")
    rate = rate or USUAL_RATE
    if env is not None and env["name"] == "pusht":
        env["control_rate"] = rate
    return KnownSimulator(name, env, rate, demonstrations, tuple(said))


def _runner(task: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The class of what evaluates there, and its options."""
    try:
        return targeted(task.get("env_runner"), "cfg.task.env_runner")
    except InputError:
        return "", {}


def _env(
    kind: str, options: Mapping[str, Any], task: Mapping[str, Any], observations: Mapping[str, ObservationSpec]
) -> dict[str, Any] | None:
    steps, name = options.get("max_steps"), task.get("task_name")
    env: dict[str, Any] = {"max_steps": steps} if type(steps) is int and 0 < steps <= 100_000 else {}
    if kind == "PushTImageRunner" and observations.keys() == {"image", "agent_pos"}:
        return {"name": "pusht", **env, "image_size": observations["image"].shape[0]}
    if kind == "PushTKeypointsRunner" and {key: value.shape for key, value in observations.items()} == PUSHT_OBS:
        return {"name": "pusht", **env, "joined": {"obs": ["keypoint", "agent_pos"]}}
    if name not in ROBOSUITE or not kind.startswith("Robomimic"):
        return None
    env = {"name": name, "absolute": task.get("abs_action") is True, **env}
    if kind == "RobomimicImageRunner":
        return env
    keys = options.get("obs_keys")
    named = isinstance(keys, list) and keys and all(isinstance(key, str) and key for key in keys)
    return {**env, "joined": {"obs": keys}} if named and observations.keys() == {"obs"} else None
