"""A context told from the history: PushT whose actuator has drifted in each episode otherwise, which nothing says.

The expert's demonstrations with the drift made up for: as they are in the package, with targets moved the other way.
In the simulator with `actuator_drift` these lead to the same states, so nothing has to be recorded anew.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from action_diffusion.datasets.batches.sources import open_data
from action_diffusion.datasets.batches.windows import Windows, make_windows
from action_diffusion.policy.policy import DiffusionPolicy
from benchmarks.rows import policies
from benchmarks.rows.system import Measured, System

DRIFT = 30.0
"""Standard deviation of the offset, px."""
HISTORY, EXECUTED, HELD_OUT = 16, 8, 100
POLICIES: dict[str, dict[str, Any]] = {
    "plain": {"steps": 2, "keys": ("state",)},
    "short": {"steps": 2, "keys": ("state", "told")},
    "oracle": {"steps": 2, "keys": ("state", "drift")},
    "context": {"steps": HISTORY, "keys": ("state", "told"), "context": {"size": 16, "recent": 2}},
}


def measure(seed: int) -> Measured:
    """Mean absolute error (px) of the executed steps, on held-out episodes, where the history is as long as it gets."""
    columns, ends = drifted(np.random.default_rng(seed))
    errors = {name: error(columns, ends, seed, **options) for name, options in POLICIES.items()}
    regained = (errors["plain"] - errors["context"]) / (errors["plain"] - errors["oracle"])
    measured = {"context error px": errors["context"], "regained": regained}
    baseline = {f"{name} error px": errors[name] for name in ("plain", "short", "oracle")}
    return Measured(measured, baseline, regained >= 0.5 and errors["oracle"] < errors["plain"])


def drifted(random: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The expert's columns with a drift in each episode that it makes up for, and the ends of the episodes.

    told: the last action, from where the finger is now.
    """
    buffer = open_data("pusht_expert")
    ends = np.asarray(buffer.episode_ends)
    lengths = np.diff(ends, prepend=0)
    state, wanted = (np.asarray(buffer[key][:], np.float32) for key in ("state", "action"))
    drift = np.repeat(random.normal(0, DRIFT, (len(ends), 2)), lengths, axis=0).astype(np.float32)
    action = wanted - drift
    last = np.concatenate([state[:1, :2], action[:-1]])
    last[ends[:-1]] = state[ends[:-1], :2]
    seen = np.concatenate([state[:, :4], np.sin(state[:, 4:]), np.cos(state[:, 4:])], axis=1)
    return {"state": seen, "action": action, "told": last - state[:, :2], "drift": drift}, ends


def error(
    columns: dict[str, np.ndarray],
    ends: np.ndarray,
    seed: int,
    *,
    steps: int,
    keys: tuple[str, ...],
    context: dict[str, int] | None = None,
) -> float:
    """Of a policy that observes the `keys` of so many steps, and says targets from where the finger is now."""
    horizon = -(-(steps - 1 + EXECUTED) // 2) * 2
    n = len(ends) - HELD_OUT

    def windows(episodes: np.ndarray) -> Windows:
        return make_windows(ends, horizon=horizon, n_obs_steps=steps, n_action_steps=EXECUTED, episodes=episodes)

    def observed(windows: Windows, indices: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        rows = windows.rows(indices)
        finger = columns["state"][rows[:, steps - 1 : steps], :2]
        return {key: columns[key][rows[:, :steps]] for key in keys}, columns["action"][rows] - finger

    train, held_out = windows(np.arange(n)), windows(np.arange(n, len(ends)))
    obs, chunks = observed(train, np.arange(len(train)))
    encoder = {"name": "observation", "context": context}
    learning: dict[str, Any] = {"objective": {"name": "denoising", "loss": "l1"}, "steps": 700, "batch_size": 128}
    policy = policies.trained(obs, chunks, n_action_steps=EXECUTED, seed=seed, encoder=encoder, **learning)
    every = np.arange(len(held_out))
    late = every[held_out.now(every) - held_out.first[every] >= HISTORY]
    obs, chunks = observed(held_out, late[:: max(1, len(late) // 500)])
    return off(policy, obs, chunks[:, steps - 1 : steps - 1 + EXECUTED])


def off(policy: DiffusionPolicy, obs: dict[str, np.ndarray], executed: np.ndarray) -> float:
    """How far the policy's actions are from the demonstrated ones [n, Ta, A], in their unit."""
    generator = torch.Generator().manual_seed(0)
    return float(np.abs(policy.predict(obs, noise_generator=generator)["action"] - executed).mean())


SYSTEM = System(
    name="latent_context",
    what="PushT whose actuator has drifted by a hidden offset in each episode: the error of the policy's actions",
    bar="a context of 16 steps regains at least half of the error that a policy of 2 steps has over one that is told",
    measure=measure,
)
