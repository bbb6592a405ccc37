"""Feedback gains in the loss: a policy of few LQR demonstrations, with and without them, and what an optimiser of
trajectories has left to do where it begins with their roll-outs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.linalg import solve_discrete_are

from action_diffusion.policy.policy import DiffusionPolicy
from benchmarks.rows import policies
from benchmarks.rows.system import Measured, System

DT, HORIZON, STEPS = 0.1, 4, 30
A = np.kron([[1.0, DT], [0.0, 1.0]], np.eye(2))
B = np.kron([[DT**2 / 2], [DT]], np.eye(2))
STATE, EFFORT = np.diag([1.0, 1.0, 0.1, 0.1]), 0.05 * np.eye(2)
"""A mass in the plane, s = (x, y, their velocities), pushed by u: s' = A s + B u, and its cost Σ s·STATE·s +
u·EFFORT·u."""
DEMONSTRATIONS, STARTS, NEAR = 6, 20, 0.02
COST_TO_GO = solve_discrete_are(A, B, STATE, EFFORT)
GAIN = -np.linalg.solve(EFFORT + B.T @ COST_TO_GO @ B, B.T @ COST_TO_GO @ A)
SECTIONS: dict[str, Any] = {"sampler": {"scheduler": "ddim", "num_inference_steps": 10, "clip": None}}


def measure(seed: int) -> Measured:
    """Both learn from the same demonstrations, as many steps."""
    random = np.random.default_rng(seed)
    obs, action = demonstrated(random)
    gain = np.tile(GAIN, (len(obs), 1, 1))
    starts = random.normal(0, 1, (STARTS, 4))
    near = random.normal(0, 0.5, (64, 4))
    found = {}
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "sobolev": {"gain": gain, "objective": {"name": "sobolev", "weight": 5.0}},
    }
    for name, beside in ways.items():
        policy = policies.trained({"state": obs}, action, steps=500, batch_size=64, seed=seed, **beside, **SECTIONS)
        found[f"{name} Jacobian error"] = float(
            np.linalg.norm(jacobian(policy, near) - GAIN, axis=(1, 2)).mean() / np.linalg.norm(GAIN)
        )
        found[f"{name} iterations"] = float(np.mean([iterations(s, rolled_out(policy, s)) for s in starts]))
    found["zero iterations"] = float(np.mean([iterations(s, np.zeros((STEPS, 2))) for s in starts]))
    ours = {name: value for name, value in found.items() if name.startswith("sobolev")}
    others = {name: value for name, value in found.items() if name not in ours}
    passed = ours["sobolev Jacobian error"] <= others["plain Jacobian error"] / 2
    passed &= ours["sobolev iterations"] <= others["plain iterations"] / 2
    return Measured(ours, others, passed)


def demonstrated(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Observations [N, 1, 4] and chunks [N, H, 2] of the optimal feedback from a few starts."""
    states = [random.normal(0, 1, (DEMONSTRATIONS, 4))]
    for _ in range(STEPS + HORIZON):
        states.append(states[-1] @ (A + B @ GAIN).T)
    rows = np.stack(states, axis=1)
    chunks = np.stack([rows[:, t : t + HORIZON] @ GAIN.T for t in range(STEPS)], axis=1)
    return rows[:, :STEPS].reshape(-1, 1, 4), chunks.reshape(-1, HORIZON, 2)


def jacobian(policy: DiffusionPolicy, states: np.ndarray) -> np.ndarray:
    """∂u/∂s [n, 2, 4] of the action that is executed first, through all denoising steps, at fixed noise."""
    now = torch.as_tensor(states, dtype=torch.float32).unsqueeze(1).requires_grad_()
    noise = torch.randn(len(states), HORIZON, 2, generator=torch.Generator().manual_seed(0))
    action = policy.sample({"state": now}, noise=noise, grad=True).action[:, 0]
    rows = [torch.autograd.grad(action[:, i].sum(), now, retain_graph=True)[0][:, 0] for i in range(2)]
    return torch.stack(rows, dim=1).numpy()


def rolled_out(policy: DiffusionPolicy, start: np.ndarray) -> np.ndarray:
    """Actions [STEPS, 2] of the policy from `start` [4]."""
    state, actions = start, []
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        now = state.astype(np.float32)[None]
        actions.append(policy.predict({"state": now}, noise_generator=generator)["action"][0])
        state = A @ state + B @ actions[-1]
    return np.stack(actions)


def iterations(start: np.ndarray, actions: np.ndarray) -> int:
    """Steps of gradient descent at its best rate from `actions` until the cost is within `NEAR` of the optimum."""
    hessian, slope, constant = quadratic(start)
    best = -np.linalg.solve(hessian, slope)
    values = np.linalg.eigvalsh(hessian)
    rate, u = 2.0 / (values[0] + values[-1]), actions.ravel().astype(np.float64)

    def cost(u: np.ndarray) -> float:
        return float(u @ hessian @ u / 2 + slope @ u + constant)

    enough, count = (1 + NEAR) * cost(best), 0
    while cost(u) > enough:
        u, count = u - rate * (hessian @ u + slope), count + 1
    return count


def quadratic(start: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """The cost of actions u [STEPS · 2] from `start`: u·h·u / 2 + g·u + c; the cost to go ends it."""
    free, driven = start, np.zeros((4, STEPS * 2))
    hessian, slope, constant = 2 * np.kron(np.eye(STEPS), EFFORT), np.zeros(STEPS * 2), float(start @ STATE @ start)
    for t in range(STEPS):
        driven = A @ driven
        driven[:, 2 * t : 2 * t + 2] += B
        free = A @ free
        weight = COST_TO_GO if t == STEPS - 1 else STATE
        hessian += 2 * driven.T @ weight @ driven
        slope += 2 * driven.T @ weight @ free
        constant += float(free @ weight @ free)
    return hessian, slope, constant


SYSTEM = System(
    name="sobolev",
    what="six LQR demonstrations with their gains: the derivative of the policy's action, and its roll-outs as the "
    "beginning of an optimiser of trajectories",
    bar="Jacobian error and iterations of gradient descent (to 2 % of the optimum) at most half of the plain policy's",
    measure=measure,
)
