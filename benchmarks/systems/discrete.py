"""Masked diffusion on a combinatorial bandit: twelve switches, 4,096 sets, and one that is best.

A set's reward is a sum of what its switches and its pairs of switches are worth (random, from 0 to 1 over all sets).
Demonstrations are sets of all kinds with their reward, good ones more often; the best set is not among them. The policy
is asked for the best reward that was shown. Beside it: each switch drawn by itself, as often as it is on in the best
tenth of the demonstrations; and the mean demonstration.
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.rows.policies import trained
from benchmarks.rows.system import Measured, System

SWITCHES, SETS = 12, 3000
BAR = 0.95


def rewards(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """All sets [4096, 12] of −1 and 1, and the reward of each [4096], from 0 to 1."""
    sets = np.where((np.arange(2**SWITCHES)[:, None] >> np.arange(SWITCHES)) & 1, 1.0, -1.0)
    single = random.normal(size=SWITCHES)
    pairs = np.triu(random.normal(size=(SWITCHES, SWITCHES)), 1)
    worth = sets @ single + np.einsum("ni,ij,nj->n", sets, pairs, sets)
    return sets, (worth - worth.min()) / (worth.max() - worth.min())


def measure(seed: int) -> Measured:
    random = np.random.default_rng(seed)
    sets, reward = rewards(random)
    shown = np.argsort(reward)[:-1]
    rows = random.choice(shown, SETS, p=_odds(reward[shown]))
    obs = {"asked": reward[rows, None, None].astype(np.float32)}
    policy = trained(
        obs,
        sets[rows, :, None].astype(np.float32),
        steps=2000,
        n_action_steps=SWITCHES,
        seed=seed,
        batch_size=128,
        lr=2e-3,
        denoiser={"name": "unet1d", "channels": [64, 128], "kernel_size": 5},
        process={"name": "masked"},
        sampler={"scheduler": "masked", "num_inference_steps": SWITCHES},
    )
    asked = np.full((64, 1, 1), reward[shown].max(), np.float32)
    generators = [torch.Generator().manual_seed(row) for row in range(len(asked))]
    found = policy.predict({"asked": asked}, noise_generator=generators, generator=generators)["action_pred"][..., 0]
    reached = _reward(found > 0, reward)
    best = np.argsort(reward[rows])[-SETS // 10 :]
    alone = random.random((len(asked), SWITCHES)) < (sets[rows][best] > 0).mean(axis=0)
    return Measured(
        {
            "mean": float(reached.mean()),
            "best": float(reached.max()),
            "the best set itself": float((reached > reward[shown].max()).mean()),
        },
        {"switches alone": float(_reward(alone, reward).mean()), "demonstrations": float(reward[rows].mean())},
        bool(reached.max() >= BAR and reached.mean() >= BAR - 0.1),
    )


def _odds(reward: np.ndarray) -> np.ndarray:
    """Good sets are shown more often."""
    odds = np.exp(4 * reward)
    return odds / odds.sum()


def _reward(on: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """Of sets bool [N, 12]: [N]."""
    result: np.ndarray = reward[on @ (1 << np.arange(SWITCHES))]
    return result


SYSTEM = System(
    name="discrete",
    what="masked diffusion chooses sets: a bandit of 4,096 with a known best one",
    bar=f"the best of 64 chunks earns {BAR} of the best set's reward, their mean {BAR - 0.1:.2f}",
    measure=measure,
)
