"""Scripted experts for Lift, PickPlaceCan and NutAssemblySquare, made for their demonstrations to be imitated.

An expert is a function of what a policy observes: nothing is timed, and nothing is remembered. Which phase an episode
is in can be seen:

    placed    the object is at the goal, and low          ─▶ open, and go up
    held      the hand is at the object, and its width    ─▶ lift, carry it over, lower it
              says that the fingers have closed on it
    else                                                  ─▶ go above it, down to it, and close there

Up and down happen along funnels around the object and the goal, so that what to do changes gradually with where the
hand is. Outside the first, the hand goes down no further; below the second, it goes up before it goes on:

    height ▲   ────╲      ╱────               ▲ carry ─────╲      ╱─────
           │        ╲    ╱                    │             ╲    ╱
           │        object                    │   object     goal
           └────────────────────▶             └──────────────────────────▶

Actions are relative ones of OSC_POSE, with a little noise, so that what is seen on the way is wider than one line.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

OBSERVATIONS = ("object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "robot0_gripper_qvel")
STEP, TURN = 0.05, 0.5  # m and rad that a full action asks for
NOISE = 0.02  # standard deviation, of a full action
ARM = 0.05  # m beside that a radian counts as
HOVER = 0.08  # m above the object, until the hand is over it
OVER, STEEPNESS = 0.012, 2.0  # the funnel around the object: m beside it, and height gained per distance from there
AT = 0.012  # m from where the hand grasps: fingers close,
STILL_AT = 0.025  # and stay closed up to here
CLOSING = 0.06  # m / s of fingers that are still closing
OPEN = 0.07  # m between fingers that have not begun to close
CLEARANCE = 0.03  # m below the height for carrying where going on slows down, and as much again where it stops


@dataclass(frozen=True, kw_only=True)
class TaskPlan:
    """What differs between tasks. Heights are of the object's centre; lengths in m, in the world's frame.

    Attributes:
        grasp: where the hand grasps, in the object's frame [3].
        width: of the fingers when they have closed on it, at least and at most.
        symmetry: the turns about the vertical (rad) after which the object looks the same to the fingers; 0 for all.
        carry: the height that it is carried at.
        goal: x, y of where it goes, None for nowhere but up.
        over, steepness: the funnel around the goal.
        low: the height that it is lowered to there, and let go a little above.
        yaws: of the object (rad), one of which it has to have there.
        steps: about how many an episode takes.
    """

    grasp: tuple[float, float, float]
    width: tuple[float, float]
    symmetry: float
    carry: float
    goal: tuple[float, float] | None = None
    over: float = 0.0
    steepness: float = 0.0
    low: float = 0.0
    yaws: tuple[float, ...] = ()
    steps: int = 0


LIFT = TaskPlan(grasp=(0, 0, 0), width=(0.03, 0.066), symmetry=0, carry=1.0, steps=26)
CAN = TaskPlan(
    grasp=(0, 0, 0.02),
    width=(0.02, 0.056),
    symmetry=0,
    carry=1.03,
    goal=(0.15, 0.38),  # nearer than the middle of the can's bin, which the arm hardly reaches
    over=0.02,
    steepness=4.0,
    low=0.88,
    steps=115,
)
SQUARE = TaskPlan(
    grasp=(0.054, 0, 0.006),
    width=(0.02, 0.036),
    symmetry=np.pi,
    carry=0.99,
    goal=(0.23, 0.1),
    over=0.004,
    steepness=8.0,
    low=0.83,
    yaws=(np.pi / 2, np.pi, -np.pi / 2),  # not 0, which takes the hand where the arm hardly reaches
    steps=97,
)
RELEASE, STILL_RELEASED = 0.02, 0.06  # m above `low` where fingers open, and where they stay open
LOOSE = 0.015  # m that fingers open beyond the object's width before the hand leaves


class SceneView(NamedTuple):
    """What is seen of an observation. Positions [3] in m.

    Attributes:
        hand: its position. rotation: [3, 3]; its y axis is along the fingers' motion, its z axis points down.
        width: between the fingers, 0 to 0.08 m. speed: at which it changes, m / s.
        object: its position. yaw: of the object, rad.
        grasp: the position where the hand grasps.
    """

    hand: np.ndarray
    rotation: np.ndarray
    width: float
    speed: float
    object: np.ndarray
    yaw: float
    grasp: np.ndarray


class RelativeMove(NamedTuple):
    """Move by `shift` [3] (m), turn by `turn` [3] (axis times angle, rad); the gripper closes (1) or opens (-1)."""

    shift: np.ndarray
    turn: np.ndarray
    gripper: float


class ManipulationExpert:
    """Acts on the observations named in `observations`, one relative action at a time; `seed` decides the noise."""

    observations: tuple[str, ...] = OBSERVATIONS

    def __init__(self, *, seed: int, plan: TaskPlan) -> None:
        self._random = np.random.default_rng(seed)
        self._plan = plan
        self.steps = plan.steps

    def reset(self) -> None:
        """Begin an episode; there is nothing to forget."""

    def act(self, observation: Mapping[str, np.ndarray], error: np.ndarray | None = None) -> np.ndarray:
        """The action float32 [7], within [-1, 1]; `error` [3] (m) is how far off the object is believed to be."""
        order = decide(seen(observation, self._plan, error), self._plan)
        motion = np.clip(np.concatenate([order.shift / STEP, order.turn / TURN]), -1, 1)
        motion = np.clip(motion + self._random.normal(0, NOISE, 6), -1, 1)
        return np.append(motion, order.gripper).astype(np.float32)

    def misbelief(self, random: np.random.Generator) -> np.ndarray:
        """An error [3] of the believed position of the object: sd 4 cm to the sides, 2 cm up, never down."""
        error = random.normal(0, [0.04, 0.04, 0.02])
        error[2] = abs(error[2])
        return error

    def nearly_done(self, random: np.random.Generator) -> None:
        """No state but a start is known without simulating."""


def seen(observation: Mapping[str, np.ndarray], plan: TaskPlan, error: np.ndarray | None = None) -> SceneView:
    """The scene of an observation, whose `object` begins with a position [3] and a quaternion [4] (x, y, z, w)."""
    position = np.asarray(observation["object"][:3], np.float64) + (0 if error is None else error)
    pose = Rotation.from_quat(np.float64(observation["object"][3:7])).as_matrix()
    fingers, speeds = observation["robot0_gripper_qpos"], observation["robot0_gripper_qvel"]
    return SceneView(
        hand=np.asarray(observation["robot0_eef_pos"], np.float64),
        rotation=Rotation.from_quat(np.float64(observation["robot0_eef_quat"])).as_matrix(),
        width=float(fingers[0] - fingers[1]),
        speed=float(speeds[0] - speeds[1]),
        object=position,
        yaw=_yaw(pose),
        grasp=position + pose @ np.array(plan.grasp),
    )


def decide(scene: SceneView, plan: TaskPlan) -> RelativeMove:
    """What to do now."""
    distance = float(np.linalg.norm(scene.grasp - scene.hand))
    if _placed(scene, plan):
        away = np.clip((scene.width - plan.width[1]) / LOOSE, 0, 1)
        return RelativeMove(np.array([0, 0, away * HOVER]), _upright(scene, _yaw(scene.rotation)), -1)
    if distance < STILL_AT and plan.width[0] < scene.width < plan.width[1]:
        return _carry(scene, plan)
    offset = scene.grasp - scene.hand
    turn = _upright(scene, _nearest(scene.yaw, plan.symmetry))
    beside = np.linalg.norm(offset[:2]) + ARM * np.linalg.norm(turn)
    offset[2] += np.clip(STEEPNESS * (beside - OVER), 0, HOVER)
    close = distance < (AT if scene.width > OPEN else STILL_AT)
    return RelativeMove(offset, turn, 1 if close else -1)


def _placed(scene: SceneView, plan: TaskPlan) -> bool:
    if plan.goal is None:
        return False
    if scene.object[2] > plan.low + (RELEASE if scene.width < plan.width[1] else STILL_RELEASED):
        return False
    return bool(np.linalg.norm(scene.object[:2] - plan.goal) < 2 * plan.over)


def _carry(scene: SceneView, plan: TaskPlan) -> RelativeMove:
    closed = np.clip(1 - abs(scene.speed) / CLOSING, 0, 1)
    if plan.goal is None:
        rise = plan.carry - scene.object[2]
        return RelativeMove(np.array([0, 0, closed * rise]), _upright(scene, 0), 1)
    shift = plan.goal - scene.object[:2]
    turn = min((_nearest(yaw - scene.yaw, 2 * np.pi) for yaw in plan.yaws), key=abs, default=0.0)
    beside = np.linalg.norm(shift) + ARM * abs(turn)
    height = np.clip(plan.low + plan.steepness * (beside - plan.over), plan.low, plan.carry)
    rise = height - scene.object[2]
    onward = np.clip(2 - rise / CLEARANCE, 0, 1) if height == plan.carry else 1.0
    upright = _upright(scene, _yaw(scene.rotation) + turn)
    return RelativeMove(closed * np.append(onward * shift, rise), upright, 1)


def _upright(scene: SceneView, yaw: float) -> np.ndarray:
    """The turn [3] that lets the hand point straight down, its x axis at `yaw` from the world's."""
    down = Rotation.from_euler("z", yaw) * Rotation.from_euler("x", np.pi)
    result: np.ndarray = (down * Rotation.from_matrix(scene.rotation).inv()).as_rotvec()
    return result


def _yaw(rotation: np.ndarray) -> float:
    return float(np.arctan2(rotation[1, 0], rotation[0, 0]))


def _nearest(angle: float, symmetry: float) -> float:
    """The angle nearest to 0 among those that differ from `angle` by multiples of `symmetry`."""
    return float((angle + symmetry / 2) % symmetry - symmetry / 2) if symmetry else 0.0


lift = functools.partial(ManipulationExpert, plan=LIFT)
can = functools.partial(ManipulationExpert, plan=CAN)
square = functools.partial(ManipulationExpert, plan=SQUARE)
