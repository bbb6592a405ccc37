"""A scripted expert for PushT, made for its demonstrations to be imitated.

It plans with the block's equations of motion (`block`) and no simulator. Each step anew, from the state
alone: the push worth most for what it costs, the way to where that push begins, and a target a little ahead.

    gain  = cost to go now - cost to go after the push - its length
    worth = gain / (way to it + its length + 60 px)

Worth rises as the finger comes nearer, so what was begun is carried through without a memory: the expert is a
function of the state, which is what a policy can learn. Dividing by the cost is what keeps pushes few: adding
it would always do the small near thing first, and put off the long way round.

The one thing an episode remembers is its handedness: one way round the block counts up to 15 % longer, drawn at
random. Where the two ways are nearly equal, either is then shown; where they are not, the shorter.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from action_diffusion.envs.pusht.block import (
    CORNERS,
    GRAVITY,
    BlockPose,
    Contacts,
    Ways,
    all_contacts,
    backed_off,
    on_face,
    pushed,
    rotated,
)
from action_diffusion.envs.pusht.simulator import GOAL_POSE

GOAL = BlockPose(np.array(GOAL_POSE[:2]) + rotated(GRAVITY, GOAL_POSE[2]), GOAL_POSE[2])
ARENA = (1.0, 511.0)  # where the finger may go, px
WALLS = (9.0, 503.0)  # where the block may be pushed, px
TURN = 110.0  # finger travel that one radian takes, px / rad
OVERHEAD = 120.0  # the way to one more push, px
SPACING = 4.0  # between the contacts that are compared, px
APPROACH = 10.0  # a push begins this far in front of the face, px
CLEAR = 22.0  # before it goes elsewhere, the finger backs off to this distance from the T, px
GENTLE, PUSHING = 11.0, 28.0  # how far ahead of the finger its target is at the end of a push, and at most, px
WALKING = 60.0  # and on the way to one
TRAVELS = 280.0 * (np.arange(1, 41) / 40) ** 2  # lengths of push that are compared, px


def _unfinished(error: np.ndarray, tolerance: np.ndarray | float) -> np.ndarray:
    """From 0 (done) to 1: whether an error still needs a push of its own."""
    result: np.ndarray = 1 - np.exp(-np.maximum(error, 0) / tolerance)
    return result


def cost_to_go(pose: BlockPose) -> np.ndarray:
    """What it takes from `pose` [...] to the goal, in px of finger travel, [...].

    Each error costs the travel that mends it, and the way to one more push while it is not done. An error is done
    more easily while the others are large, since mending those disturbs it: the angle comes first, then the
    larger shift. Shifts are measured along the goal's axes, in which the T can be pushed straight.
    """
    shift = np.abs(rotated(pose.centre - GOAL.centre, -np.asarray(GOAL.angle)))
    turn = np.abs((pose.angle - GOAL.angle + np.pi) % (2 * np.pi) - np.pi)
    turned = np.exp(-turn / 0.3)[..., None]
    shifts_open = 1 - turned * (1 - _unfinished(shift - 1.0, 4.0 + 0.15 * shift[..., ::-1]))
    turn_open = _unfinished(turn - 0.015, 0.08 + 0.15 * shift.sum(axis=-1) / TURN)
    result: np.ndarray = (shift + OVERHEAD * shifts_open).sum(axis=-1) + TURN * turn + OVERHEAD * turn_open
    return result


class PushTExpert:
    """Acts on a PushT state, one target of the finger at a time; `seed` decides the handedness of its episodes."""

    observations: tuple[str, ...] = ("state",)
    steps = 60

    def __init__(self, *, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._contacts = all_contacts(SPACING)
        self._handedness = 0.0

    def reset(self) -> None:
        """Begin an episode."""
        self._handedness = float(self._random.uniform(-0.15, 0.15))

    def act(self, observation: Mapping[str, np.ndarray], error: np.ndarray | None = None) -> np.ndarray:
        """The target float32 [2] (px, within [0, 512]) for `state` [5] (agent x, y, block x, y, angle).

        error: [5], how far off the state is believed to be.
        """
        state = np.asarray(observation["state"], np.float64) + (0.0 if error is None else error)
        pose = BlockPose.of(state)
        path, contact = self._path(pose, pose.to_block(state[:2]))
        reached = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=-1))])
        # A target L px ahead means L / 2.5 px a step; it slows down before the contact, and again before the end.
        pace = min(GENTLE + 0.25 * (reached[-1] - reached[contact]), PUSHING)
        ahead = min(pace + 0.4 * reached[contact], WALKING, reached[-1])
        target = [np.interp(ahead, reached, path[:, axis]) for axis in range(2)]
        result: np.ndarray = np.clip(target, 0.0, 512.0).astype(np.float32)
        return result

    def misbelief(self, random: np.random.Generator) -> np.ndarray:
        """An error [5] of the believed state: the block's place (sd 35 px) and angle (sd 0.5 rad)."""
        return np.concatenate([[0.0, 0.0], random.normal(0, 35, 2), random.normal(0, 0.5, 1)])

    def nearly_done(self, random: np.random.Generator) -> np.ndarray:
        """A state [5] with the block near the goal (sd 25 px, 0.3 rad) and the finger anywhere clear of it."""
        block = np.array(GOAL_POSE) + random.normal(0, 1, 3) * [25, 25, 0.3]
        while True:
            finger = random.uniform(60, 450, 2)
            if np.linalg.norm(finger - block[:2]) > 130:
                return np.concatenate([finger, block])

    def _path(self, pose: BlockPose, finger: np.ndarray) -> tuple[np.ndarray, int]:
        """The finger's path [K, 2] in the world, from where it is to the end of the best push; where contact is."""
        contacts = self._contacts
        start = backed_off(finger, CLEAR)
        ways = Ways(start=start, targets=contacts.at - APPROACH * contacts.push, pose=pose, arena=ARENA)
        bias = np.array([1.0, 1.0 + self._handedness, 1.0 - self._handedness])
        lengths = (ways.lengths + np.linalg.norm(start - finger) + APPROACH) * bias[:, None]
        lengths = np.concatenate([lengths, _in_front(contacts, finger)[None]])
        best, contact, travel = self._best_push(pose, lengths.min(axis=0))
        way = int(lengths[:, best].argmin())
        points = [finger]
        if way < 3:
            points += [start, *ways.path(best, way)[:-1], contact.at[0] - APPROACH * contact.push[0]]
        points.append(contact.at[0])
        # Aiming 1.5 px further than the push is meant to go makes it end instead of creeping up to the end.
        ends = pushed(pose, contact, (travel + 1.5) * np.linspace(0, 1, 9)[1:])
        return np.concatenate([pose.to_world(np.array(points)), ends.to_world(contact.at)]), len(points) - 1

    def _best_push(self, pose: BlockPose, ways: np.ndarray) -> tuple[int, Contacts, float]:
        """The contact whose push is worth most given `ways` [N] (px) to all, a finer place of it, and its travel."""
        contacts = self._contacts
        worth = _worth(pose, contacts[:, None], TRAVELS, ways[:, None])
        best, n = divmod(int(worth.argmax()), len(TRAVELS))
        face = int(contacts.face[best])
        along = float(np.linalg.norm(contacts.at[best] - on_face(face, np.zeros(1)).at[0]))
        finer = on_face(face, along + np.linspace(-SPACING, SPACING, 9))
        shorter, longer = TRAVELS[n - 1] if n else 0.0, TRAVELS[min(n + 1, len(TRAVELS) - 1)]
        travels = np.linspace(shorter, longer, 33)[1:]
        place, n = divmod(int(_worth(pose, finer[:, None], travels, ways[best]).argmax()), len(travels))
        return best, finer[place : place + 1], float(travels[n])


def _in_front(contacts: Contacts, finger: np.ndarray) -> np.ndarray:
    """Lengths [N] of the way straight onto the face, where the `finger` [2] is in front of the contact already."""
    offset = contacts.at - finger
    gap = (offset * contacts.push).sum(axis=-1)
    aside = np.linalg.norm(offset - gap[:, None] * contacts.push, axis=-1)
    in_front = (gap > -6.0) & (gap < 40.0) & (aside < np.maximum(14.0, 0.8 * gap))
    return np.where(in_front, np.hypot(np.maximum(gap, 0.0), aside), np.inf)


def _worth(pose: BlockPose, contacts: Contacts, travels: np.ndarray, ways: np.ndarray) -> np.ndarray:
    """The worth of pushing at each of `contacts` [N, 1] by each of `travels` [T] px, [N, T]."""
    after = pushed(pose, contacts, travels)
    gain = cost_to_go(pose) - cost_to_go(after) - travels
    finger = np.stack([pose.to_world(contacts.at) + 0 * after.centre, after.to_world(contacts.at)])
    allowed = ((finger > ARENA[0]) & (finger < ARENA[1])).all(axis=(0, -1))
    if _within_walls(pose):
        allowed &= _within_walls(after)
    result: np.ndarray = np.where(allowed, gain, -np.inf) / (travels + ways + 60.0)
    return result


def _within_walls(pose: BlockPose) -> np.ndarray:
    """Whether the block at `pose` [...] is clear of the walls, bool [...]."""
    corners = BlockPose(pose.centre[..., None, :], np.asarray(pose.angle)[..., None]).to_world(CORNERS)
    return np.asarray(((corners > WALLS[0]) & (corners < WALLS[1])).all(axis=(-1, -2)))
