"""PushT's reward from recorded states: the numbers that the simulator gives, for all rows at once.

    coverage(pose) = area(block ∩ goal) / area(goal),      reward = clip(coverage / 0.95, 0, 1)

Both T are two boxes that touch, so the area is that of four pairs of boxes: each of the block's, as the goal's frame
has it, is cut by the four sides of one of the goal's (Sutherland and Hodgman 1974).
"""

from __future__ import annotations

import numpy as np

from action_diffusion.envs.pusht.block import rotated
from action_diffusion.envs.pusht.simulator import GOAL_POSE, PushT

BOXES = np.array([[[-60.0, 0.0], [60.0, 30.0]], [[-15.0, 30.0], [15.0, 120.0]]])
"""Bar and stem in the block's frame: the lowest and the highest x, y (px)."""
SUCCESS = 0.95
"""The coverage that the reward calls 1."""
BLOCK = 65_536
"""States that are looked at at once."""
BEFORE = 4
"""Steps that are simulated to know how fast the finger was in the last one; what it did before has died away."""


def coverage(states: np.ndarray) -> np.ndarray:
    """The share of the goal that the block covers, float64 [N], for `states` [N, 5] (agent x, y, block x, y, angle)."""
    states = np.asarray(states, dtype=np.float64)
    return np.concatenate([np.empty(0), *(_coverage(states[i : i + BLOCK]) for i in range(0, len(states), BLOCK))])


def rewards(states: np.ndarray, actions: np.ndarray, episode_ends: np.ndarray) -> np.ndarray:
    """What each recorded action earned, float32 [N]: the reward of the state after it.

    states [N, 5], actions [N, 2] (px). Of an episode's last action no state is recorded, so it is simulated, from
    `BEFORE` rows before.
    """
    after = np.empty(len(states))
    after[:-1] = coverage(states[1:])
    env, ends = PushT(), np.asarray(episode_ends, dtype=np.int64)
    for first, end in zip(np.concatenate([[0], ends[:-1]]), ends, strict=True):
        after[end - 1] = SUCCESS * _last_reward(env, states[first:end], actions[first:end])
    env.close()
    return np.clip(after / SUCCESS, 0.0, 1.0).astype(np.float32)


def _last_reward(env: PushT, states: np.ndarray, actions: np.ndarray) -> float:
    """Of the last action of an episode, by the simulator."""
    env.restore(states[max(0, len(states) - 1 - BEFORE)])
    for action in actions[-1 - BEFORE : -1]:
        env.step(action)
    env.restore(states[-1], env.velocity)
    return env.step(actions[-1])[0]


def _coverage(states: np.ndarray) -> np.ndarray:
    x, y, angle = GOAL_POSE
    turn = states[:, 4, None] - angle
    place = rotated(states[:, None, 2:4] - (x, y), -angle)
    area = np.zeros(len(states))
    for low, high in BOXES:
        corners = np.array([[low[0], low[1]], [high[0], low[1]], [high[0], high[1]], [low[0], high[1]]])
        polygon = place + rotated(corners, turn)
        for box in BOXES:
            area += _area(_cut(polygon, box))
    share: np.ndarray = area / np.prod(BOXES[:, 1] - BOXES[:, 0], axis=1).sum()
    return share


def _cut(polygon: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Convex polygons [N, V, 2] within a box [2, 2]: [N, 16 V, 2].

    Each side keeps every corner, moved onto it where it is outside, and puts the crossing after it: what runs along a
    side encloses nothing.
    """
    for axis in (0, 1):
        for bound, sign in zip(box[:, axis], (1.0, -1.0), strict=True):
            depth = sign * (polygon[..., axis] - bound)
            following, next_depth = np.roll(polygon, -1, axis=1), np.roll(depth, -1, axis=1)
            crosses = (depth < 0) != (next_depth < 0)
            share = depth / np.where(crosses, depth - next_depth, 1.0)
            inside = polygon.copy()
            inside[..., axis] = np.where(depth < 0, bound, inside[..., axis])
            crossing = np.where(crosses[..., None], polygon + share[..., None] * (following - polygon), inside)
            polygon = np.stack([inside, crossing], axis=2).reshape(len(polygon), -1, 2)
    return polygon


def _area(polygon: np.ndarray) -> np.ndarray:
    """Of polygons [N, V, 2], whichever way round, [N]."""
    x, y = polygon[..., 0], polygon[..., 1]
    area: np.ndarray = 0.5 * np.abs((x * np.roll(y, -1, axis=1) - y * np.roll(x, -1, axis=1)).sum(axis=1))
    return area
