"""Diffusion-QL's bandit: four modes of actions that earn differently, and a policy that is to find the best of them.

Demonstrations come from all four modes alike, so a clone visits each as often; a policy that climbs a critic without
fear leaves them all, since what nobody tried may be worth anything to it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.options.configuration import load
from action_diffusion.policy import bundle as bundles
from action_diffusion.training.run import train
from benchmarks.rows.system import Measured, System

CENTRES = 0.8 * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
SPREAD, REWARDS, NOISE = 0.05, (0.0, 1.5, 3.0, 5.0), 0.5
DEMONSTRATIONS, ASKED = 10_000, 2000
MOST_OUTSIDE, LEAST_BEST, OUTSIDE = 0.03, 0.9, 4 * SPREAD
SETTINGS = (
    "task=custom",
    "task.n_obs_steps=1",
    "task.horizon=1",
    "task.n_action_steps=1",
    "task.control_rate=10",
    "denoiser=dit",
    "policy.denoiser.width=64",
    "policy.denoiser.layers=2",
    "policy.process.prediction=sample",
    "dataset.val_fraction=0",
    "train.batch_size=128",
    "train.ema_max_decay=0.995",
    "train.validate_every=0",
    "train.rollout_every=0",
    "train.tensorboard=false",
    "evaluation.n_episodes=0",
    "device=cpu",
)
LEARNT = (
    "objective=diffusion_ql",
    "policy.objective.loss=l1",
    "policy.objective.eta=0.5",
    "policy.objective.counted=given",
    "policy.objective.terminal=terminal",
    "policy.objective.hidden=[128,128]",
    "policy.objective.octaves=0",
    "policy.objective.temperature=0.2",
    "policy.objective.warmup=200",
    "train.max_steps=1500",
)
CLONED = ("policy.objective.loss=l1", "policy.sampler.num_inference_steps=5", "train.max_steps=1000")


def bandit(seed: int) -> tuple[ReplayBuffer, int]:
    """Demonstrations of one step each, from all modes, and which mode is the best."""
    random = np.random.default_rng([19, seed])
    means = random.permutation(REWARDS)
    mode = random.integers(0, len(CENTRES), DEMONSTRATIONS)
    columns = {
        "state": random.normal(size=(DEMONSTRATIONS, 1)),  # tells nothing
        "action": CENTRES[mode] + SPREAD * random.normal(size=(DEMONSTRATIONS, 2)),
        "reward": means[mode] + NOISE * random.normal(size=DEMONSTRATIONS),
        "terminal": np.ones(DEMONSTRATIONS, bool),
    }
    return ReplayBuffer.from_arrays(columns, np.arange(1, DEMONSTRATIONS + 1)), int(means.argmax())


def shares(data: Path, folder: Path, seed: int, *words: str) -> np.ndarray:
    """Train; of its actions, the share in each mode, [4]."""
    config: Any = load("train", [f"data={data}", f"output_dir={folder}", f"seed={seed}", *SETTINGS, *words])
    train(config)
    policy = bundles.load(folder / "bundle", "cpu")
    obs = {"state": np.random.default_rng([20, seed]).normal(size=(ASKED, 1, 1)).astype(np.float32)}
    made = policy.predict(obs, noise_generator=torch.Generator().manual_seed(seed))["action"][:, 0]
    distance = np.linalg.norm(made[:, None] - CENTRES, axis=2)
    return (distance < OUTSIDE).mean(axis=0)


def measure(seed: int) -> Measured:
    buffer, best = bandit(seed)
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "bandit.zarr"
        buffer.save(data)
        learnt = shares(data, Path(name) / "learnt", seed, *LEARNT)
        cloned = shares(data, Path(name) / "cloned", seed, *CLONED)
    numbers = {"best": float(learnt[best]), "outside": 1 - float(learnt.sum())}
    baseline = {"best": float(cloned[best]), "outside": 1 - float(cloned.sum())}
    passed = numbers["best"] >= LEAST_BEST and numbers["outside"] <= MOST_OUTSIDE
    alike = bool((abs(cloned - 0.25) < 0.1).all())
    return Measured(_rounded(numbers), _rounded(baseline), passed and alike)


def _rounded(numbers: dict[str, float]) -> dict[str, float]:
    return {name: round(number, 4) for name, number in numbers.items()}


SYSTEM = System(
    name="bandit",
    what="offline learning from reward picks the best of four modes of actions, and stays in it (Diffusion-QL)",
    bar="at least 90 % of 2,000 actions in the best mode, at most 3 % further than 4 sd from all of them; the clone "
    "visits each about as often",
    measure=measure,
)
