"""Plans of a double integrator under a quadratic cost, from demonstrations of slow, noisy controllers.

    p' = p + v dt + u dt² / 2,   v' = v + u dt,   dt = 0.2 s, 16 steps      cost  Σ p² + 0.1 v² + 0.1 u²

Its least is known, by the Riccati equation; the controller that reaches it moves faster than any demonstration.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy.spatial import cKDTree

from action_diffusion.policy.planning.drifting import drift
from benchmarks.rows.policies import trained
from benchmarks.rows.system import Measured, System

DT, STEPS = 0.2, 16
A, B = np.array([[1.0, DT], [0.0, 1.0]]), np.array([DT**2 / 2, DT])
Q, R = np.diag([1.0, 0.1]), 0.1
STARTS, CONTROLLERS = 64, 16
"""Starts that plans are made from, and demonstrations from each that they are held against."""
Controller = Callable[[np.ndarray, int], np.ndarray]
"""States [N, 2] and the step → accelerations [N]."""


def planned(u: np.ndarray, state: np.ndarray, step: int) -> np.ndarray:
    """The control of a plan u [N, STEPS] at a step, wherever one is: [N]."""
    found: np.ndarray = u[:, step]
    return found


def rollout(start: np.ndarray, control: Controller) -> np.ndarray:
    """From states [N, 2]: position, velocity and acceleration of every step, [N, STEPS, 3]."""
    state, found = start, []
    for step in range(STEPS):
        u = control(state, step)
        found.append(np.column_stack([state, u]))
        state = state @ A.T + u[:, None] * B
    return np.stack(found, axis=1)


def cost(path: np.ndarray) -> np.ndarray:
    """Of rollouts [N, STEPS, 3], [N]."""
    x, u = path[..., :2], path[..., 2]
    found: np.ndarray = (np.einsum("nti,ij,ntj->nt", x, Q, x) + R * u**2).sum(axis=1)
    return found


def planned_cost(start: np.ndarray) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same of chunks of accelerations [N, STEPS, 1], the chunks of a start being neighbours."""
    a, b, q = (torch.tensor(part, dtype=torch.float32) for part in (A, B, Q))

    def of(chunk: torch.Tensor) -> torch.Tensor:
        x = torch.tensor(start, dtype=torch.float32).repeat_interleave(len(chunk) // len(start), dim=0)
        total = torch.zeros(len(chunk))
        for u in chunk[..., 0].unbind(dim=1):
            total = total + ((x @ q) * x).sum(dim=1) + R * u.square()
            x = x @ a.T + u.unsqueeze(1) * b
        return total

    return of


def optimum() -> Controller:
    """The finite-horizon linear-quadratic regulator."""
    value, gains = Q, [np.zeros(2)]
    for _ in range(STEPS - 1):
        gain = (B @ value @ A) / (R + B @ value @ B)
        value = Q + A.T @ value @ (A - np.outer(B, gain))
        gains.insert(0, gain)
    return lambda state, step: -(state @ gains[step])


def demonstrated(start: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rollouts of controllers with gains and noise of their own: slow ones."""
    n = len(start)
    stiffness, damping = rng.uniform(0.3, 1.2, n), rng.uniform(0.8, 2.0, n)
    noise = rng.normal(0.0, 0.2, (n, STEPS))
    return rollout(start, lambda state, step: noise[:, step] - stiffness * state[:, 0] - damping * state[:, 1])


def starts(n: int, rng: np.random.Generator, *, margin: float = 0.0) -> np.ndarray:
    """States [n, 2] at rest nearly, on either side; margin: how far within the range of the demonstrations' starts."""
    position, velocity = rng.uniform(1.0 + margin, 2.0 - margin, n), rng.uniform(margin - 0.5, 0.5 - margin, n)
    return np.column_stack([rng.choice([-1.0, 1.0], n) * position, velocity])


def descended(u: torch.Tensor, cost: Callable[[torch.Tensor], torch.Tensor], steps: int = 200) -> torch.Tensor:
    """Accelerations [N, STEPS, 1] after descent along the cost's gradient alone."""
    u = u.clone().requires_grad_()
    optimizer = torch.optim.Adam([u], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        cost(u).sum().backward()
        optimizer.step()
    return u.detach()


def measure(seed: int) -> Measured:
    rng = np.random.default_rng(seed)
    paths = demonstrated(starts(8000, rng), rng)
    fitted, held_out = paths[:7000], paths[7000:]
    policy = trained({"state": fitted[:, :1, :2]}, fitted[:, :, 2:], steps=600, seed=seed, batch_size=128)
    scale = np.abs(fitted[..., :2]).max(axis=(0, 1))
    support = cKDTree((fitted[..., :2] / scale).reshape(-1, 2))

    def distances(path: np.ndarray) -> np.ndarray:
        """Of the states that a path [N, STEPS, 3] leads to, which its start is not: [N, STEPS - 1]."""
        found: np.ndarray = support.query((path[:, 1:, :2] / scale).reshape(-1, 2))[0]
        return found.reshape(len(path), -1)

    limit = np.quantile(distances(held_out), 0.99)
    start = starts(STARTS, rng, margin=0.2)
    obs = {"state": torch.tensor(start[:, None], dtype=torch.float32)}
    price, generator = planned_cost(start), torch.Generator().manual_seed(seed)
    sampled = policy.sample(obs, n_samples=2, noise_generator=generator).action[:, 0]

    def inside(chunk: torch.Tensor) -> torch.Tensor:
        """Whether all states of the chunks [N, STEPS, 1] are: those of a start are neighbours."""
        first = start.repeat(len(chunk) // len(start), axis=0)
        path = rollout(first, partial(planned, chunk[..., 0].double().numpy()))
        return torch.from_numpy((distances(path) <= limit).all(axis=1))

    plans = {
        "drift": drift(policy, obs, price, allowed=inside, generator=generator).action,
        "sampled": sampled,
        "descent": descended(sampled, price),
    }
    best = rollout(start, optimum())
    demos = np.stack([cost(demonstrated(start, rng)) for _ in range(CONTROLLERS)], axis=1)
    measured: dict[str, float] = {}
    baseline: dict[str, float] = {
        "cost demonstrated": demos.mean(),
        "cost best demonstrated": demos.min(axis=1).mean(),
        "cost optimum": cost(best).mean(),
        "outside optimum": (distances(best) > limit).mean(),
    }
    for name, chunk in plans.items():
        u = chunk[..., 0].double().numpy()
        path = rollout(start, partial(planned, u))
        into = measured if name == "drift" else baseline
        into |= {
            f"cost {name}": cost(path).mean(),
            f"outside {name}": (distances(path) > limit).mean(),
        }
    passed = measured["cost drift"] < baseline["cost best demonstrated"] and measured["outside drift"] == 0
    return Measured(measured, baseline, passed)


SYSTEM = System(
    name="drifting_mpc",
    what="Chunks drifted by a cost and denoised again cost less than demonstrations, and stay where these were.",
    bar="cost below the best of 16 demonstrations from the same start; no state outside their support's 99 % quantile",
    measure=measure,
)
