"""Episodes put together: two rooms with a door between them, demonstrations in each room up to the door, and a policy
that is asked to go from one room to the other."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from action_diffusion.datasets.batches.windows import make_windows
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.options.data import Augment
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.training.augmenting import augment
from benchmarks.systems import policies
from benchmarks.systems.system import Measured, System

WALL, DOOR = 0.1, (0.55, 0.85)
"""Half of the wall's thickness, around x = 0, and from where to where in y one can go through."""
STRIDE, NEAR, LIMIT = 0.1, 0.12, 60
"""A step at most; how near to the goal is there; steps that an episode may take."""
EPISODES, STARTS = 160, 50
CHUNK, EXECUTED = 8, 4
LOW = (-0.9, 0.2)
"""From where to where in y episodes begin and end, away from the door."""


def step(at: np.ndarray, action: np.ndarray) -> np.ndarray:
    """Points [n, 2] after a step; one that would end in the wall or outside of the rooms is not made."""
    length = np.linalg.norm(action, axis=1, keepdims=True)
    after = at + action * np.minimum(1.0, STRIDE / np.maximum(length, 1e-9))
    return np.where(free(after)[:, None], after, at)


def free(at: np.ndarray) -> np.ndarray:
    """Whether points [n, 2] are in a room or in the door: [n]."""
    in_door = (at[:, 1] > DOOR[0]) & (at[:, 1] < DOOR[1])
    return (np.abs(at) < 1).all(axis=1) & ((np.abs(at[:, 0]) > WALL) | in_door)


def measure(seed: int) -> Measured:
    """Both policies learn as long, from the demonstrations and from those that `data augment` made of them."""
    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        given, more = Path(folder) / "demos.zarr", Path(folder) / "more.zarr"
        demonstrations(random).save(given)
        report = augment(Augment(in_=str(given), out=str(more), episodes=300, steps=600, goal="goal", seed=seed))
        buffers = {"plain": ReplayBuffer.open(given), "augmented": ReplayBuffer.open(more)}
        found = {name: success(trained(buffer, seed), seed) for name, buffer in buffers.items()}
        crossing = across(buffers["augmented"])
    measured = {"success": found["augmented"], "kept": report["generated"] / report["tried"], "crossing": crossing}
    return Measured(measured, {"success": found["plain"]}, found["augmented"] >= 0.8 and found["plain"] <= 0.2)


def demonstrations(random: np.random.Generator) -> ReplayBuffer:
    """From anywhere in a room to its side of the door and through it (A to B), or from there into a room (B to C)."""
    states, actions, goals, ends = [], [], [], []
    for episode in range(EPISODES):
        side = -1 if episode % 2 else 1
        room = np.array([side * random.uniform(0.3, 0.9), random.uniform(*LOW)])
        door = np.array([random.uniform(-0.05, 0.05), random.uniform(0.6, 0.8)])
        at, goal = (room, door) if side < 0 else (door, room)
        before = np.array([side * 0.25, door[1]])  # straight through the door, and not along the wall
        for target in (before, goal):
            while (left := np.linalg.norm(target - at)) > 1e-3:
                action = (target - at) * min(1.0, 0.8 * STRIDE / left)
                states.append(at)
                actions.append(action)
                goals.append(goal)
                at = step(at[None], action[None])[0]
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
    return policies.trained(obs, chunks, steps=800, batch_size=128, n_action_steps=EXECUTED, seed=seed)


def success(policy: DiffusionPolicy, seed: int) -> float:
    """The share of `STARTS` ways from the left room, A, into the right one, C, that get there."""
    random = np.random.default_rng([seed, 1])
    at = np.stack([-random.uniform(0.3, 0.9, STARTS), random.uniform(*LOW, STARTS)], axis=1)
    goal = np.stack([random.uniform(0.3, 0.9, STARTS), random.uniform(*LOW, STARTS)], axis=1)
    reached, generator = np.zeros(STARTS, bool), torch.Generator().manual_seed(seed)
    for _ in range(LIMIT // EXECUTED):
        now = {key: value[:, None].astype(np.float32) for key, value in (("state", at), ("goal", goal))}
        actions = policy.predict(now, noise_generator=generator)["action"]
        for t in range(EXECUTED):
            at = step(at, actions[:, t])
            reached |= np.linalg.norm(at - goal, axis=1) < NEAR
    return float(reached.mean())


def across(buffer: ReplayBuffer) -> float:
    """The share of generated episodes that begin in the left room and end in the right one."""
    ends, x = np.asarray(buffer.episode_ends), np.asarray(buffer["state"][:])[:, 0]
    starts = np.concatenate([[0], ends[:-1]])[EPISODES:]
    return float(((x[starts] < -WALL) & (x[ends[EPISODES:] - 1] > WALL)).mean())


SYSTEM = System(
    name="augment",
    what="two rooms, demonstrations that end or begin in the door between them: from one room into the other",
    bar="success at least 0.8 with what data augment makes of the demonstrations, at most 0.2 with them alone",
    measure=measure,
)
