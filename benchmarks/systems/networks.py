"""Transformers beside the U-Net, on PushT from states: the score after as long a training, and the time of a chunk.

Each network trains for as many steps as `SECONDS` of the processor's time hold, on one thread, one after the other:
what a step takes is measured first, since machines differ in it. Each has the learning rate with which it did best on
starts 200000 to 200099, of 1e-3, 3e-3 and 1e-2 (the transformers also of 2e-2); their width and depth are the first
that were tried.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from action_diffusion.options.configuration import load
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.training.run import train
from benchmarks.rows.policies import scores
from benchmarks.rows.system import Measured, System
from benchmarks.systems.few_steps import milliseconds

SECONDS = 60.0
STARTS = range(500_000, 500_100)
WITHIN = 0.02
SMALL = ("policy.denoiser.width=64", "policy.denoiser.layers=2", "train.lr=1e-2")
NETWORKS: dict[str, Sequence[str]] = {
    "unet": ("denoiser=unet_small", "train.lr=1e-2"),
    "transformer": ("denoiser=transformer", "policy.denoiser.causal=false", *SMALL),
    "dit": ("denoiser=dit", *SMALL),
}
SHORT, LONGER = 10, 40
"""Steps of two trainings, whose difference says what a step takes."""


def measure(seed: int) -> Measured:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        made = {name: trained_for(SECONDS, seed, *options) for name, options in NETWORKS.items()}
        found: dict[str, float] = {}
        for name, (policy, seconds, steps) in made.items():
            found |= {f"{name} score": float(scores(policy, STARTS).mean()), f"{name} seconds": seconds}
            found |= {f"{name} steps": float(steps)}
        policies = {name: policy for name, (policy, _, _) in made.items()}
        found |= {f"{name} ms": ms for name, ms in milliseconds(policies).items()}
    finally:
        torch.set_num_threads(threads)
    worst = min(found["transformer score"], found["dit score"])
    return Measured(
        {name: value for name, value in found.items() if not name.startswith("unet")},
        {name: value for name, value in found.items() if name.startswith("unet")},
        worst >= found["unet score"] - WITHIN,
    )


def trained_for(seconds: float, seed: int, *options: str) -> tuple[DiffusionPolicy, float, int]:
    """A PushT policy of `options` (as of `train`) after so much time of the processor; that time, and its steps."""
    took = [trained(steps, seed, *options)[1] for steps in (SHORT, SHORT, LONGER)]  # the first one warms up
    steps = round(seconds * (LONGER - SHORT) / (took[2] - took[1]))
    return *trained(steps, seed, *options), steps


def trained(steps: int, seed: int, *options: str) -> tuple[DiffusionPolicy, float]:
    """A PushT policy after so many steps, and the processor's seconds that they took with all that goes with them."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"train.max_steps={steps}", f"train.validate_every={steps}", "train.tensorboard=false", f"seed={seed}"]
        config = load("train", [*words, "evaluation.n_episodes=0", f"output_dir={folder}/run", *options])
        began = time.process_time()
        train(config)
        took = time.process_time() - began
        return bundles.load(Path(folder) / "run" / "bundle", precision="fp32"), took


SYSTEM = System(
    name="networks",
    what="a transformer and a DiT denoiser score on PushT as the U-Net does after as long a training",
    bar=f"both within {WITHIN} of the U-Net after {SECONDS:g} s of one core, 100 starts",
    measure=measure,
)
