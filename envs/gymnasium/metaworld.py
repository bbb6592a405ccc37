"""What MetaWorld 3 does otherwise than Gymnasium says, and its scripted experts as demonstrators.

`reset(seed)` ignores its seed there, and goals are drawn once for all. Here each seed has a goal and a start of its
own, so that starts of demonstrations and of evaluations are never the same.

Source: Meta-World (Yu et al. 2020), version 3.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np

from action_diffusion.errors import InputError

OBJECTS = slice(4, 7)
GOAL = slice(36, 39)
"""Of a state [39]: where the object is, and where it is to be, m."""
ERROR = 0.05
"""m, standard deviation of what a disturbed expert believes of them."""


def choose(sim: gymnasium.Env[Any, Any], seed: int) -> None:
    """Have the next reset of a MetaWorld environment draw its start from `seed`; nothing for others."""
    inner: Any = sim.unwrapped
    if hasattr(inner, "seeded_rand_vec") and hasattr(inner, "_freeze_rand_vec"):
        inner.seeded_rand_vec, inner._freeze_rand_vec = True, False
        inner.seed(seed)


def drawn(sim: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
    """An environment whose constructor takes no `render_mode`, told of it afterwards."""
    inner: Any = sim.unwrapped
    inner.render_mode = "rgb_array"
    camera = "corner2" if hasattr(inner, "seeded_rand_vec") else None
    if camera is not None:
        import mujoco

        number = mujoco.mj_name2id(inner.model, mujoco.mjtObj.mjOBJ_CAMERA, camera)
        inner.mujoco_renderer.camera_id = number
        upright = inner.model.cam_quat[number].copy()  # its corner cameras hang upside down
        mujoco.mju_mulQuat(inner.model.cam_quat[number], upright, np.array([0.0, 0.0, 0.0, 1.0]))
    return sim


class MetaWorldExpert:
    """MetaWorld's own scripted policy of an environment, as `envs.demonstration.Expert`.

    Raises `InputError` for an environment that has none.
    """

    observations: tuple[str, ...] = ("state",)
    steps = 80

    def __init__(self, *, seed: int, about: Mapping[str, Any]) -> None:
        """about: which environment it is, `GymnasiumEnv.metadata`."""
        id, name = about["gymnasium"]["id"], about["gymnasium"]["kwargs"].get("env_name")
        if not id.startswith("Meta-World/") or name is None:
            raise InputError(f"env.id={id} has no scripted expert: only those of Meta-World have")
        from metaworld.policies import ENV_POLICY_MAP

        if name not in ENV_POLICY_MAP:
            raise InputError(f"env.kwargs.env_name={name} has no scripted expert in Meta-World")
        self._policy = ENV_POLICY_MAP[name]()

    def reset(self) -> None:
        """Its policies remember nothing."""

    def act(self, observation: Mapping[str, np.ndarray], error: np.ndarray | None = None) -> np.ndarray:
        """The action [4] in [-1, 1]. error: [6], m, of where it believes the object and the goal to be."""
        state = np.array(observation["state"], dtype=np.float64)
        if error is not None:
            state[OBJECTS] += error[:3]
            state[GOAL] += error[3:]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that its actions will be clipped, as they are here
            action = self._policy.get_action(state)
        return np.clip(np.asarray(action, dtype=np.float64), -1, 1)

    def misbelief(self, random: np.random.Generator) -> np.ndarray:
        return random.normal(0, ERROR, 6)

    def nearly_done(self, random: np.random.Generator) -> np.ndarray | None:
        return None
