"""A policy that goes left or right, a trap on one side: which way is taken, alone and by imagined futures.

The policy was trained before there were traps: it goes either way as often, and the side of the trap, which it sees,
tells it nothing. Who comes near enough to the trap stays there, within the second that a chunk lasts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from action_diffusion.policy.planning.imagination import Imagination, choose
from action_diffusion.policy.policy import DiffusionPolicy
from benchmarks.rows.policies import trained
from benchmarks.rows.system import Measured, System

STEPS, DT = 10, 0.1
TRAP, REACH = np.array([0.75, 0.5]), 0.3
"""Where the trap is, its first number on either side, and how near is too near."""
SEEN = (5, 10)
"""The steps after which the future is imagined."""
STARTS = 400


def starts(n: int, rng: np.random.Generator) -> np.ndarray:
    """States [n, 3]: x, y, and the side of the trap, −1 or 1."""
    return np.column_stack([rng.normal(0, 0.05, n), rng.uniform(0, 0.1, n), rng.choice([-1.0, 1.0], n)])


def ways(n: int, rng: np.random.Generator) -> np.ndarray:
    """Demonstrated velocities [n, STEPS, 2]: out to one side and back, forwards all the while."""
    side = rng.choice([-1.0, 1.0], (n, 1)) * rng.uniform(0.8, 1.2, (n, 1))
    sideways = 2.4 * side * np.cos(np.linspace(0, np.pi, STEPS))
    forwards = np.broadcast_to(rng.uniform(0.8, 1.2, (n, 1)), (n, STEPS))
    return np.stack([sideways, forwards], axis=2) + rng.normal(0, 0.05, (n, STEPS, 2))


def simulate(state: np.ndarray, chunk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The states [n, STEPS + 1, 3], and who is in the trap at the end, bool [n]."""
    found, caught = [state], np.zeros(len(state), bool)
    for velocity in chunk.swapaxes(0, 1):
        state = state.copy()
        state[:, :2] += DT * np.where(caught[:, None], 0.0, velocity)
        beside = state[:, :2] - np.column_stack([TRAP[0] * state[:, 2], np.full(len(state), TRAP[1])])
        caught = caught | (np.linalg.norm(beside, axis=1) < REACH)
        found.append(state)
    return np.stack(found, axis=1), caught


def imagination(policy: DiffusionPolicy, rng: np.random.Generator, seed: int) -> Imagination:
    """Learnt from 8000 chunks like those of the policy, with traps."""
    state, chunk = starts(8000, rng), ways(8000, rng)
    path, caught = simulate(state, chunk)
    embedding = policy.encode(observed(state)).numpy()
    future = np.stack([policy.encode(observed(path[:, step])).numpy() for step in SEEN], axis=1)
    value = np.repeat(1.0 - caught[:, None], len(SEEN), axis=1)
    return Imagination.fit(embedding, chunk, future, value, steps=800, batch_size=128, seed=seed)


def observed(state: np.ndarray) -> dict[str, torch.Tensor]:
    return {"state": torch.tensor(state[:, None], dtype=torch.float32)}


def measure(seed: int) -> Measured:
    rng = np.random.default_rng(seed)
    state, chunk = starts(8000, rng), ways(8000, rng)
    policy = trained({"state": state[:, None]}, chunk, steps=800, seed=seed, batch_size=128)
    known = imagination(policy, rng, seed)
    state = starts(STARTS, rng)

    def avoided(action: torch.Tensor) -> float:
        return float(1.0 - simulate(state, action.double().numpy())[1].mean())

    def chosen(**options: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        found = choose(policy, observed(state), known, n_samples=8, n_futures=2, generator=generator, **options)
        return found.action

    alone = policy.sample(observed(state), noise_generator=torch.Generator().manual_seed(seed)).action
    measured = {"avoided": avoided(chosen())}
    at_random = chosen(
        score=lambda embedding, value: torch.rand(len(value), generator=torch.Generator().manual_seed(1))
    )
    baseline = {"avoided, policy alone": avoided(alone), "avoided, chosen at random": avoided(at_random)}
    passed = measured["avoided"] >= 0.95 and 0.35 <= baseline["avoided, policy alone"] <= 0.65
    return Measured(measured, baseline, passed)


SYSTEM = System(
    name="imagined_futures",
    what="Chunks chosen by the futures that a latent diffusion model imagines keep out of a trap.",
    bar="the trap is avoided in at least 95 % of starts, where the policy alone avoids it in about half",
    measure=measure,
)
