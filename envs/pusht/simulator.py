"""PushT: push a T-shaped block onto its outline with a round finger, by the Diffusion Policy paper's rules.

The simulator is gym-pusht, to the last bit; this module adds what makes its numbers comparable with the paper's:
the paper's starts (`initial_state`), its score, and poses that mean the same here as in recorded data.

A pose needs care. The block turns about its centre of gravity c = (0, 45), not about its origin p, and
gym-pusht's `reset_to_state` sets p first and the angle after it, which moves p:

        0───────────1    y = 0        asked for:  p, theta
        3───4─p─5───2                 obtained:   p + c - R(theta) c
            │ c │        y = 45
            7───6        y = 120

The paper's starts went through this very order, so `reset` keeps it. A *recorded* state says where the block
was: `restore` and `render_states` set the angle first, and the position stays as written.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from action_diffusion.errors import InputError, unknown

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # pygame prints an advertisement when imported

import cv2
from gym_pusht.envs.pusht import PushTEnv, pymunk_to_shapely

OBSERVATIONS = ("state", "agent_pos", "keypoint", "image", "last_action", "drift")
DRIFT_STREAM = 17  # of the random numbers that decide how an actuator has drifted
IMAGE_SIZE = 96
PHYSICS_RATE = 100.0
GOAL_POSE = (256.0, 256.0, np.pi / 4)  # block x, y (px), angle (rad)

# The nine points of the T in the block's frame (px) that the paper's state data calls "keypoint": the mean of
# `R(-theta) (keypoint - p)` over its 25,650 steps, which scatter by 0.02 px.
KEYPOINTS = np.array(
    [
        [9.27, 90.02],
        [-60.99, -1.19],
        [60.91, -1.39],
        [-0.27, 25.54],
        [-14.06, 122.81],
        [39.00, 32.86],
        [-39.95, 32.73],
        [-16.82, 62.87],
        [23.54, -1.70],
    ]
)


def initial_state(seed: int) -> np.ndarray:
    """The paper's start number `seed`: agent x, y, block x, y (px), angle (rad), float64 [5], for `reset_to`.

    Raises `InputError` for a seed outside [0, 2**32 - 1].
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"PushT seeds run from 0 to {2**32 - 1}, got {seed}")
    random = np.random.RandomState(seed)
    agent = (random.randint(50, 450), random.randint(50, 450))
    block = (random.randint(100, 400), random.randint(100, 400))
    return np.array([*agent, *block, random.randn() * 2 * np.pi - np.pi])


def keypoints(states: np.ndarray) -> np.ndarray:
    """Nine points of the T, float32 [N, 9, 2] in px, for `states` [N, 5] (agent x, y, block x, y, angle)."""
    states = np.asarray(states, dtype=np.float64)
    cos, sin = np.cos(states[:, 4, None]), np.sin(states[:, 4, None])
    x = states[:, 2, None] + cos * KEYPOINTS[:, 0] - sin * KEYPOINTS[:, 1]
    y = states[:, 3, None] + sin * KEYPOINTS[:, 0] + cos * KEYPOINTS[:, 1]
    return np.stack([x, y], axis=-1).astype(np.float32)


def render_states(states: np.ndarray, size: int = IMAGE_SIZE) -> np.ndarray:
    """Pictures of recorded `states` [N, 5] as a policy sees them: uint8 [N, size, size, 3].

    Takes about a millisecond each.
    """
    env = PushT(image_size=size)
    images = np.empty((len(states), size, size, 3), dtype=np.uint8)
    for image, state in zip(images, states, strict=True):
        env._place(state, (0.0, 0.0))
        image[:] = env._picture(size)
    return images


class _Simulator(PushTEnv):  # type: ignore[misc]
    """gym-pusht, with one thing decided: a body's shapes are a set in memory order, and areas summed in another order
    differ in the last bit, so the same episode would be rewarded differently from run to run. And what need not be
    computed again is not: the goal, and the coverage by a block that did not move."""

    _goal: tuple[tuple[float, ...], Any] = ((), None)
    _covered: tuple[tuple[float, ...], float] = ((), 0.0)
    _last_action: np.ndarray | None = None

    def advance(self, target: np.ndarray) -> float:
        """One control period towards `target` [2]; returns the reward. The arithmetic is that of gym-pusht's `step`."""
        self.n_contact_points, self._last_action = 0, target
        x, y = target.tolist()
        agent, dt = self.agent, self.dt
        for _ in range(int(1 / (dt * self.control_hz))):
            (at_x, at_y), (vx, vy) = agent.position, agent.velocity
            pull_x = self.k_p * (x - at_x) + self.k_v * (0 - vx)
            pull_y = self.k_p * (y - at_y) + self.k_v * (0 - vy)
            agent.velocity = vx + pull_x * dt, vy + pull_y * dt
            self.space.step(dt)
        result: float = min(max(self._get_coverage() / self.success_threshold, 0.0), 1.0)
        return result

    def _get_coverage(self) -> float:
        at = (*self.block.position, self.block.angle, *self.goal_pose)
        if self._covered[0] != at:
            self._covered = at, self._coverage()
        return self._covered[1]

    def _coverage(self) -> float:
        shapes = sorted(self.block.shapes, key=lambda shape: shape.get_vertices())
        pose = tuple(self.goal_pose)
        if self._goal[0] != pose:
            self._goal = pose, pymunk_to_shapely(self.get_goal_pose_body(self.goal_pose), shapes)
        goal = self._goal[1]
        return float(goal.intersection(pymunk_to_shapely(self.block, shapes)).area / goal.area)


class PushT:
    """One PushT episode at a time. Actions are targets for the finger in px, [0, 512]; it follows with a lag.

    The reward is clip(coverage / 0.95, 0, 1), coverage being the share of the goal that the block covers.
    Observations: `state` float32 [5] (agent x, y, block x, y in px, block angle in [0, 2 pi) rad),
    `agent_pos` float32 [2], `keypoint` float32 [9, 2] (px), `image` uint8 [image_size, image_size, 3]; `last_action`
    float32 [2], the finger's place before there is one, and `drift` float32 [2] (px).

    Args:
        control_rate: actions per second (Hz), a divisor of the simulator's 100. The paper's task has 10; a higher one
            shows what happens within one of its steps.
        actuator_drift: standard deviation (px) of a hidden offset [2], drawn from an episode's seed, by which the
            finger aims beside every target. 0, the paper's task: none.

    Source: Chi et al., "Diffusion Policy" (RSS 2023), section V; gym-pusht.
    """

    action_shape: tuple[int, ...] = (2,)
    recorded = ("state",)

    def __init__(
        self,
        *,
        image_size: int = IMAGE_SIZE,
        max_steps: int = 300,
        control_rate: float = 10.0,
        actuator_drift: float = 0.0,
    ) -> None:
        if not 0 < control_rate <= PHYSICS_RATE or PHYSICS_RATE % control_rate:
            raise InputError(f"PushT's control_rate={control_rate} must divide {PHYSICS_RATE:g} Hz")
        self.control_rate = control_rate
        self.max_steps = max_steps
        self._image_size = image_size
        self._sim = _Simulator(obs_type="state")
        self._sim.control_hz = control_rate
        self._sim._setup()
        self._steps = 0
        self._actuator_drift = actuator_drift
        self._drift = np.zeros(2)
        self._told: np.ndarray | None = None

    def metadata(self) -> dict[str, object]:
        """What a recording says of this simulator, beside its control rate: nothing, since there is one PushT."""
        return {}

    def episode_metadata(self) -> dict[str, str]:
        """What it says of one episode: nothing, since the block is always the same."""
        return {}

    def reset(self, seed: int) -> None:
        """Begin at the paper's start number `seed`."""
        self.reset_to(initial_state(seed))
        self._drift = self._actuator_drift * np.random.default_rng([DRIFT_STREAM, seed]).normal(size=2)

    def reset_to(self, state: np.ndarray) -> None:
        """Begin at `state` [5] as gym-pusht's `reset_to_state` reads it: the paper's starts are meant so."""
        self._sim.reset(options={"reset_to_state": state})
        self._sim._last_action = self._told = None
        self._steps = 0

    def restore(self, state: np.ndarray, velocity: Sequence[float] = (0.0, 0.0)) -> None:
        """Begin at a *recorded* `state` [5], with the finger at `velocity` [2] px/s.

        The finger's velocity is all that a recorded state leaves out: the block never keeps any.
        """
        self._sim._setup()  # forgets the contacts of earlier steps, which would push and be drawn
        self._place(state, velocity)
        self._sim._last_action = self._told = None
        self._steps = 0

    @property
    def velocity(self) -> tuple[float, float]:
        """The finger's, px/s."""
        x, y = self._sim.agent.velocity
        return float(x), float(y)

    def _place(self, state: np.ndarray, velocity: Sequence[float]) -> None:
        agent, block = self._sim.agent, self._sim.block
        x, y, block_x, block_y, angle = (float(value) for value in state)
        agent.position, agent.velocity = (x, y), (0.0, 0.0)
        block.angle = angle
        block.position = (block_x, block_y)
        self._sim.space.step(1e-9)  # moves the shapes to their bodies, and finds the contacts that are drawn
        # Only now: the impulse of a finger that pushes would be kept, and scaled by the next step's length over this.
        agent.velocity = (float(velocity[0]), float(velocity[1]))

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        """Move the finger towards `action` [2] (px) for one control period. Returns the reward in [0, 1], and done.

        Done when the reward is 1 or `max_steps` are over. Raises `InputError` where the action is not two
        finite numbers.
        """
        target = np.asarray(action, dtype=np.float64)
        if target.shape != self.action_shape or not np.isfinite(target).all():
            raise InputError(f"a PushT action is two finite numbers (x, y in px), got {action!r}")
        self._told = target
        reward = self._sim.advance(target + self._drift)
        self._steps += 1
        return reward, reward >= 1.0 or self._steps >= self.max_steps

    def observe(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """The observations named by `keys`. Raises `InputError` for another name than the class lists."""
        return {key: self._observation(key) for key in keys}

    def _observation(self, key: str) -> np.ndarray:
        if key == "image":
            return self._picture(self._image_size)
        if key not in OBSERVATIONS:
            raise unknown("PushT observation", key, OBSERVATIONS)
        if key == "drift":
            return self._drift.astype(np.float32)
        state = np.asarray(self._sim.get_obs(), dtype=np.float64)
        if key == "last_action":
            return (state[:2] if self._told is None else self._told).astype(np.float32)
        if key == "keypoint":
            result: np.ndarray = keypoints(state[None])[0]
            return result
        return state.astype(np.float32)[: 2 if key == "agent_pos" else 5]

    def render(self, size: int = 256) -> np.ndarray:
        """The scene for people, uint8 [size, size, 3], with a red cross where the finger is told to go."""
        picture = self._picture(size)
        if self._sim._last_action is not None:
            target = tuple(int(value * size / 512) for value in self._sim._last_action)
            cv2.drawMarker(picture, target, (255, 0, 0), cv2.MARKER_CROSS, size // 16, max(1, size // 128))
        return picture

    def _picture(self, size: int) -> np.ndarray:
        # Scaling the surface's own memory, four bytes a pixel, saves gym-pusht's copy of 786 kB a frame.
        surface = self._sim._draw()
        pixels = np.frombuffer(surface.get_view("0"), dtype=np.uint8).reshape(*surface.get_size(), 4)
        channels = [shift // 8 for shift in surface.get_shifts()[:3]]
        return np.ascontiguousarray(cv2.resize(pixels, (size, size))[:, :, channels])

    def close(self) -> None:
        """Release the simulator."""
        self._sim.close()
