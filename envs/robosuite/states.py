"""What recorded states of robosuite look like: the simulator is put into each and looked at (`robomimic.observing`)."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from action_diffusion.datasets.robomimic.file import FileLayout


@dataclass(frozen=True)
class SimulatorObserver:
    """Looks through `envs.manipulation`, one simulator a process. keys: which observations."""

    env_args: Mapping[str, Any]
    keys: tuple[str, ...]

    @property
    def settings(self) -> dict[str, Any]:
        from action_diffusion.envs.recorded import installed

        render = self.env_args.get("render")
        return {"keys": list(self.keys), "robosuite": installed().__version__, "render": render}

    def __call__(self, model: str | None, states: np.ndarray) -> dict[str, np.ndarray]:
        env = _simulator(json.dumps(dict(self.env_args)))
        rows: list[dict[str, np.ndarray]] = []
        for state in states:
            env.restore(state, model if not rows else None)
            rows.append(env.observe(self.keys))
        return {key: np.stack([row[key] for row in rows]) for key in self.keys}


def with_render_settings(layout: FileLayout) -> FileLayout:
    """`layout` as it will be observed: the simulators of this package draw faster than robosuite does by itself.

    Nothing is changed where the file has observations already, which new ones must look like.
    """
    from action_diffusion.envs.robosuite.headless import RenderSettings

    if layout.has_observations or "render" in layout.env_args:
        return layout
    return replace(layout, env_args={**layout.env_args, "render": RenderSettings()._asdict()})


def state_keys(env_args: Mapping[str, Any]) -> tuple[str, ...]:
    """The observations of the low-dimensional tasks: the object, and each arm's hand and gripper."""
    robots = env_args.get("env_kwargs", {}).get("robots", "Panda")
    n_robots = 1 if isinstance(robots, str) else len(robots)
    parts = ("eef_pos", "eef_quat", "gripper_qpos")
    return ("object", *(f"robot{index}_{part}" for index in range(n_robots) for part in parts))


@functools.cache
def _simulator(env_args: str) -> Any:
    from action_diffusion.envs.robosuite.tasks import Manipulation

    return Manipulation(env_args=json.loads(env_args))
