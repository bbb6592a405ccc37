"""Episodes put together: two rooms and a closet, demonstrations of the ways into the door between the rooms and out of
it, and a policy that is asked to go from one room to the other.

    ┌──────────┬───────────┐     A the left room, B the door, C the right room, D the closet
    │          B           │     demonstrated: A to B and B to C; asked for: A to C
    │    A     ├────┐  C   │     and once more with A to D as well: what is nearest to C among the places that were
    │          D    │      │     demonstrated from A is then a wrong one
    └──────────┴────┴──────┘
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from action_diffusion.datasets.batches.windows import make_windows
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.options.data import Augment
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.training.augmenting import augment
from benchmarks.rows import policies
from benchmarks.rows.system import Measured, System

WALL, DOOR, HATCH = 0.1, (0.55, 0.85), (-0.75, -0.35)
"""Half of the wall's thickness, around x = 0, and from where to where in y it is open: into the right room, C, and into
a closet before it that has no other way out, D."""
CLOSET, LID = (0.35, -0.9, -0.2), (0.45, -0.1)
"""The closet's x at most, its y at least and at most; and where its walls end, x and y at most."""
STRIDE, NEAR, LIMIT = 0.2, 0.15, 48
"""A step at most; how near to the goal is there; steps that an episode may take."""
EACH, STARTS = 80, 50
"""Demonstrations of a way; starts to try."""
CHUNK, EXECUTED = 8, 4
LOW = (-0.9, 0.2)
"""From where to where in y episodes begin and end, away from the door."""


def step(at: np.ndarray, action: np.ndarray) -> np.ndarray:
    """Points [n, 2] after a step; one that would go through the wall, or out of the rooms, is not made."""
    length = np.linalg.norm(action, axis=1, keepdims=True)
    after = at + action * np.minimum(1.0, STRIDE / np.maximum(length, 1e-9))
    way = [free(at + share * (after - at)) for share in (0.25, 0.5, 0.75, 1.0)]
    return np.where(np.logical_and.reduce(way)[:, None], after, at)


def free(at: np.ndarray) -> np.ndarray:
    """Whether points [n, 2] are in a room, in the closet or in an opening: [n]."""
    x, y = at[:, 0], at[:, 1]
    wall = (np.abs(x) <= WALL) & ~((y > DOOR[0]) & (y < DOOR[1])) & ~((y > HATCH[0]) & (y < HATCH[1]))
    closed = (x > WALL) & (x < LID[0]) & (y < LID[1])
    inside = (x > WALL) & (x < CLOSET[0]) & (y > CLOSET[1]) & (y < CLOSET[2])
    return (np.abs(at) < 1).all(axis=1) & ~wall & ~(closed & ~inside)


def measure(seed: int) -> Measured:
    measured, baseline, passed = dict[str, float](), dict[str, float](), True
    for closet, named in ((False, ""), (True, ", closet")):
        plain, augmented, report = compare(seed, closet)
        measured |= {f"{name}{named}": value for name, value in report.items()}
        baseline[f"success{named}"] = plain
        passed &= augmented >= 0.8 and plain <= 0.1
    return Measured(measured, baseline, passed)


def compare(seed: int, closet: bool) -> tuple[float, float, dict[str, float]]:
    """Success with the demonstrations alone and with those that `data augment` made of them, and numbers to show.

    Both policies learn as long.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, more = Path(folder) / "demos.zarr", Path(folder) / "more.zarr"
        demonstrations(np.random.default_rng(seed), closet).save(given)
        options: dict[str, Any] = {"episodes": 200, "horizon": 16, "steps": 700, "goal": "goal", "seed": seed}
        report = augment(Augment(in_=str(given), out=str(more), **options))
        buffers = ReplayBuffer.open(given), ReplayBuffer.open(more)
        plain, augmented = (success(trained(buffer, seed), seed) for buffer in buffers)
        crossing = across(buffers[1], buffers[0].n_episodes)
    kept = report["generated"] / report["tried"]
    return plain, augmented, {"success": augmented, "kept": kept, "crossing": crossing}


def demonstrations(random: np.random.Generator, closet: bool) -> ReplayBuffer:
    """From anywhere in the left room into the door (A to B), from the door on (B to C), or into the closet (A to D).

    They end at rest.
    """
    states, actions, goals, ends = [], [], [], []
    kinds = 3 if closet else 2
    for episode in range(kinds * EACH):
        left = np.array([-random.uniform(0.3, 0.9), random.uniform(*LOW)])
        door = np.array([random.uniform(-0.05, 0.05), random.uniform(0.6, 0.8)])
        inside = np.array([random.uniform(0.15, 0.3), random.uniform(-0.65, -0.45)])
        right = np.array([random.uniform(0.55, 0.9), random.uniform(*LOW)])
        at, *way = (
            (left, np.array([-0.25, door[1]]), door),
            (door, np.array([0.6, 0.6]), right),
            (left, np.array([-0.25, inside[1]]), inside),
        )[episode % kinds]
        for target in way:
            while (far := np.linalg.norm(target - at)) > 1e-3:
                action = (target - at) * min(1.0, 0.8 * STRIDE / far)
                states.append(at)
                actions.append(action)
                goals.append(way[-1])
                at = step(at[None], action[None])[0]
        states.append(at)
        actions.append(np.zeros(2))
        goals.append(way[-1])
        ends.append(len(states))
    columns = {
        key: np.array(values, np.float32) for key, values in (("state", states), ("action", actions), ("goal", goals))
    }
    return ReplayBuffer.from_arrays(columns, np.array(ends), {"control_rate": 10.0})


def trained(buffer: ReplayBuffer, seed: int) -> DiffusionPolicy:
    """Told where it is and where it is to go."""
    windows = make_windows(buffer.episode_ends, horizon=CHUNK, n_obs_steps=1, n_action_steps=EXECUTED)
    every = np.arange(len(windows))
    obs = {key: np.asarray(buffer[key][:])[windows.now(every)][:, None] for key in ("state", "goal")}
    chunks = np.asarray(buffer["action"][:])[windows.rows(every)]
    return policies.trained(obs, chunks, steps=600, batch_size=128, n_action_steps=EXECUTED, seed=seed)


def success(policy: DiffusionPolicy, seed: int) -> float:
    """The share of `STARTS` ways from A to C that get there."""
    random = np.random.default_rng([seed, 1])
    at = np.stack([-random.uniform(0.3, 0.9, STARTS), random.uniform(*LOW, STARTS)], axis=1)
    goal = np.stack([random.uniform(0.55, 0.9, STARTS), random.uniform(*LOW, STARTS)], axis=1)
    reached, generator = np.zeros(STARTS, bool), torch.Generator().manual_seed(seed)
    for _ in range(LIMIT // EXECUTED):
        now = {key: value[:, None].astype(np.float32) for key, value in (("state", at), ("goal", goal))}
        actions = policy.predict(now, noise_generator=generator)["action"]
        for t in range(EXECUTED):
            at = step(at, actions[:, t])
            reached |= np.linalg.norm(at - goal, axis=1) < NEAR
    return float(reached.mean())


def across(buffer: ReplayBuffer, given: int) -> float:
    """The share of the episodes after those that were given which go from A to C."""
    ends, x = np.asarray(buffer.episode_ends), np.asarray(buffer["state"][:])[:, 0]
    starts = np.concatenate([[0], ends[:-1]])[given:]
    return float(((x[starts] < -WALL) & (x[ends[given:] - 1] > LID[0])).mean())


SYSTEM = System(
    name="augment",
    what="two rooms, demonstrations into the door and out of it, then also into a closet: from room to room",
    bar="success at least 0.8 with what data augment makes of the demonstrations, at most 0.1 with them alone, in both",
    measure=measure,
)
