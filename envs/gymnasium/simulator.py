"""Any environment that is registered with Gymnasium, behind `Env`: MetaWorld, gym-aloha, gymnasium-robotics, your own.

    env: {name: gymnasium, id: Meta-World/goal_observable, kwargs: {env_name: reach-v3, seed: 0}}

An environment of Gymnasium gives a whole observation in every step. It is cut into named ones once, from its space:

    Box [39]                                  ─▶ state
    Dict pixels: Dict top: Box, agent_pos     ─▶ pixels_top, agent_pos
    its own picture (render_mode rgb_array)   ─▶ image [image_size, image_size, 3], drawn where it is looked at

and `observations` gives them other names. Its score is what `info` says of success, not its reward, whose scale says
nothing to anybody else.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import cv2
import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from action_diffusion.envs.gymnasium import metaworld
from action_diffusion.envs.robosuite import headless
from action_diffusion.errors import InputError, unknown

PICTURE = "image"
SUCCESS = ("success", "is_success")
TASKS, LEFT = "episode_task_completions", "tasks_to_complete"
"""Kitchen's: the names of the tasks that are done, and of those that are not."""
PACKAGES = {"Meta-World": "metaworld", "gym_aloha": "gym-aloha", "": "gymnasium-robotics"}
"""What an id begins with, before its slash → the package that registers it when it is imported."""


class GymnasiumEnv:
    """One episode at a time of the environment that is registered as `id`.

    Observations: numbers are float32, pictures uint8 [H, W, 3]. Actions are in the environment's own units, float
    [A], and cut to the bounds of its action space, as its other users do.

    Args:
        id: as registered, "Meta-World/goal_observable". Packages in `PACKAGES` are imported for it, no others: what
            else registers environments is a plugin's work (`plugins=`).
        kwargs: what its constructor takes; plain values that name no files.
        observations: name → where it is in the observation ("pixels_top"), or "image". None: all of them.
        success: the key of `info` that says so: a number of [0, 1], a truth value, or a list of what is done. Or
            "reward". None: `success` or `is_success`, or Kitchen's tasks.
        success_total: what of it counts as success, 1: how long that list gets, or which reward.
        max_steps: None for the environment's own. control_rate: Hz; None for what its time steps say.
        image_size: of `image`, px.

    Raises `InputError` for an id that nobody registered, for one whose package is missing, whose actions are no
    vector of numbers, and for what it does not have.

    Source: Gymnasium (Towers et al. 2024).
    """

    def __init__(
        self,
        *,
        id: str,
        kwargs: Mapping[str, Any] | None = None,
        observations: Mapping[str, str] | None = None,
        success: str | None = None,
        success_total: float = 1.0,
        max_steps: int | None = None,
        control_rate: float | None = None,
        image_size: int = 96,
    ) -> None:
        self.id, self._kwargs = id, dict(kwargs or {})
        self._sim = _made(id, self._kwargs)
        space = self._sim.action_space
        if not isinstance(space, Box) or len(space.shape) != 1:
            raise InputError(f"env.id={id} takes actions of {space}: a policy's are vectors of numbers, Box [A]")
        self._low, self._high = space.low.astype(np.float64), space.high.astype(np.float64)
        self.action_shape: tuple[int, ...] = space.shape
        self._names = self._named(observations)
        self._success, self._total, self._size = success, float(success_total), image_size
        self.control_rate = _rate(self._sim, id) if control_rate is None else float(control_rate)
        self.max_steps = _steps(self._sim, id) if max_steps is None else max_steps
        self._values: dict[str, np.ndarray] = {}
        self._steps = 0

    def _named(self, asked: Mapping[str, str] | None) -> dict[str, str]:
        """Name → where it is in the flat observation."""
        there = [name for name, _ in _parts(self._sim.observation_space)] + [PICTURE]
        for place in (asked or {}).values():
            if place not in there:
                raise unknown(f"observation of {self.id}", place, there)
        return dict(asked or {place: place for place in there})

    def reset(self, seed: int) -> None:
        """Begin the episode of `seed`."""
        metaworld.choose(self._sim, seed)
        observation, self._first = self._sim.reset(seed=seed)
        self._values = dict(_leaves(observation))
        self._steps = 0

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        """Execute `action` [A] for one control period. Returns how much of success is reached, in [0, 1], and done.

        Raises `InputError` for an action of another shape, or not finite, and where nothing says what success is.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != self.action_shape or not np.isfinite(action).all():
            raise InputError(f"an action of {self.id} is {self.action_shape[0]} finite numbers, got {action!r}")
        action = np.clip(action, self._low, self._high).astype(self._sim.action_space.dtype)
        observation, reward, terminated, truncated, info = self._sim.step(action)
        self._values = dict(_leaves(observation))
        self._steps += 1
        score = self._score(info, float(reward))
        return score, bool(terminated or truncated or score >= 1.0 or self._steps >= self.max_steps)

    def _score(self, info: Mapping[str, Any], reward: float) -> float:
        if self._success == "reward":
            found: Any = reward
        else:
            key = self._success or next((key for key in (*SUCCESS, TASKS) if key in info), None)
            if key is None or key not in info:
                raise InputError(
                    f"{self.id} says nothing of success{'' if key is None else f' as {key!r}'}: env.success=KEY, of "
                    f"info ({', '.join(info) or 'empty'}), or env.success=reward env.success_total=REWARD"
                )
            found = info[key]
        if isinstance(found, list | tuple | set):
            total = self._total if self._total != 1 else len({*found, *info.get(LEFT, ())}) or 1.0
            return min(len(found) / total, 1.0)
        value = float(np.asarray(found).max()) / self._total
        return min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0

    def observe(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """The observations named by `keys`. Raises `InputError` for others, and for pictures without OpenGL."""
        return {key: self._observation(key) for key in keys}

    def _observation(self, key: str) -> np.ndarray:
        if key not in self._names:
            raise unknown(f"observation of {self.id}", key, self._names)
        place = self._names[key]
        if place == PICTURE and place not in self._values:
            return self.render(self._size)
        value = np.asarray(self._values[place])
        return np.ascontiguousarray(value) if _is_picture(value) else value.astype(np.float32)

    def render(self, size: int = 256) -> np.ndarray:
        """A picture for people, uint8 [size, size, 3], in the shape of a square. Raises `InputError` without OpenGL."""
        try:
            picture = self._sim.render()
        except Exception as error:  # of any simulator, and of OpenGL
            raise InputError(f"{self.id} cannot be drawn: {type(error).__name__}: {error}") from error
        if not isinstance(picture, np.ndarray) or picture.ndim != 3:
            raise InputError(f"{self.id} cannot be drawn: it gives no picture (render_mode=rgb_array)")
        resized = cv2.resize(picture[..., :3], (size, size), interpolation=cv2.INTER_AREA)
        return np.ascontiguousarray(resized.astype(np.uint8))

    @property
    def recorded(self) -> tuple[str, ...]:
        """The low-dimensional observations."""
        space = dict(_parts(self._sim.observation_space))
        return tuple(name for name, place in self._names.items() if place in space and not _is_image(space[place]))

    def metadata(self) -> dict[str, Any]:
        """Which environment it is: an attribute of a recording's buffer."""
        return {"gymnasium": {"id": self.id, "kwargs": self._kwargs}}

    def episode_metadata(self) -> dict[str, str]:
        return {}

    def restore(self, state: np.ndarray) -> None:
        """Gymnasium knows no states to go back to."""
        raise InputError(f"{self.id} cannot begin at a recorded state")

    def close(self) -> None:
        """Release the simulator."""
        self._sim.close()


def _made(id: str, kwargs: Mapping[str, Any]) -> gymnasium.Env[Any, Any]:
    if ":" in id:
        raise InputError(f"env.id={id}: a module is not imported by its name: plugins=FILE.py may import it")
    for name, value in kwargs.items():
        if isinstance(value, str) and (any(part in value for part in ("/", "\\", "..")) or value.startswith("~")):
            raise InputError(f"env.kwargs.{name}={value}: names a file, which an environment is not given")
    _register(id)
    if id not in gymnasium.registry:
        close = [known for known in gymnasium.registry if known.startswith(id.partition("/")[0][:3])]
        raise unknown("env.id", id, close or ["Meta-World/goal_observable", "gym_aloha/AlohaTransferCube-v0"])
    headless.choose()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what its checker finds in other people's environments
        try:
            return _drawing(id, kwargs)
        except (gymnasium.error.Error, KeyError, TypeError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"env.id={id} env.kwargs={kwargs}: {type(error).__name__}: {reason}") from None


def _drawing(id: str, kwargs: Mapping[str, Any]) -> gymnasium.Env[Any, Any]:
    try:
        return gymnasium.make(id, render_mode="rgb_array", disable_env_checker=True, **kwargs)
    except TypeError as error:
        if "render_mode" not in str(error):
            raise
        return metaworld.drawn(gymnasium.make(id, disable_env_checker=True, **kwargs))


def _register(id: str) -> None:
    """Import the package that registers `id`, where that is a known one."""
    space, slash, _ = id.partition("/")
    package = PACKAGES.get(space if slash else "")
    if id in gymnasium.registry or package is None:
        return
    module = package.replace("-", "_")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            if not slash:  # it may be anybody's
                return
            raise InputError(f"env.id={id} needs {package}: pip install 'action-diffusion[{package}]'") from None
        raise InputError(f"env.id={id}: {package} does not import: {error}") from None
    gymnasium.register_envs(found)


def _parts(space: Any, before: str = "") -> Iterator[tuple[str, Box]]:
    """(name, box) of every leaf of an observation space; a Box by itself is `state`."""
    if isinstance(space, Box):
        yield before or "state", space
        return
    if not isinstance(space, Dict):
        raise InputError(f"observations of {space} are no numbers and pictures with names: Box, or Dict of such")
    for key, inside in space.spaces.items():
        yield from _parts(inside, f"{before}_{key}" if before else str(key))


def _leaves(value: Any, before: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every leaf of an observation, as `_parts` names them."""
    if not isinstance(value, Mapping):
        yield before or "state", np.asarray(value)
        return
    for key, inside in value.items():
        yield from _leaves(inside, f"{before}_{key}" if before else str(key))


def _is_image(space: Box) -> bool:
    return space.dtype == np.uint8 and len(space.shape) == 3 and space.shape[2] == 3


def _is_picture(value: np.ndarray) -> bool:
    return value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3


def _rate(sim: gymnasium.Env[Any, Any], id: str) -> float:
    """Actions a second: by its time step, or by the pictures a second that it gives."""
    step = getattr(sim.unwrapped, "dt", None)
    rate = 1 / step if isinstance(step, float | int) and step > 0 else (sim.metadata or {}).get("render_fps")
    if not rate:
        raise InputError(f"{id} does not say how many actions a second it takes: env.control_rate=HZ")
    return round(float(rate), 6)


def _steps(sim: gymnasium.Env[Any, Any], id: str) -> int:
    own = getattr(sim.spec, "max_episode_steps", None) or getattr(sim.unwrapped, "max_path_length", None)
    if own is None:
        raise InputError(f"{id} does not say how long an episode is: env.max_steps=STEPS")
    return int(own)
