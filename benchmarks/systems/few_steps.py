"""Policies of one and two steps beside the hundred of DDPM, on PushT from states.

The same network, a small DiT, learns from the same demonstrations, once to denoise and once by two regressions
(`objective=mip`), and both go on from their weights for `MORE` steps: the one as before, the other to say in one step
what it has said in two (`objective=distillation`). Scores are means over 50 starts; a chunk is timed at batch 1. Sizes,
steps and learning rates were chosen on starts 200000 to 200099.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.policy import DiffusionPolicy
from benchmarks.rows.policies import pusht, scores
from benchmarks.rows.system import Measured, System

STARTS = range(500_000, 500_050)
WITHIN = 0.02
TURNS = 25
STEPS, MORE = 2500, 800
SMALL = ("denoiser=dit", "policy.denoiser.width=64", "policy.denoiser.layers=2")
FAST, SLOWER = (*SMALL, "train.lr=1e-2"), (*SMALL, "train.lr=3e-3")


def measure(seed: int) -> Measured:
    regressions = pusht(seed, "objective=mip", *FAST, steps=STEPS)
    taught = ("objective=distillation", f"policy.objective.teacher={regressions}")
    distilled = pusht(seed, *taught, *SLOWER, steps=MORE)
    denoising = pusht(seed, f"init={pusht(seed, *FAST, steps=STEPS)}", *SLOWER, steps=MORE)
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "ddpm 100": (denoising, {"scheduler": "ddpm", "num_inference_steps": 100}),
        "ddim 20": (denoising, {"num_inference_steps": 20}),
        "ddim 2": (denoising, {"num_inference_steps": 2}),
        "ddim 1": (denoising, {"num_inference_steps": 1}),
        "mip 2": (regressions, {"num_inference_steps": 2}),
        "mip 1": (regressions, {"num_inference_steps": 1}),
        "distilled 1": (distilled, {}),
    }
    policies = {name: bundles.load(path, sampler=sampler, precision="fp32") for name, (path, sampler) in ways.items()}
    found = {f"{name} score": float(scores(policy, STARTS).mean()) for name, policy in policies.items()}
    found |= {f"{name} ms": ms for name, ms in milliseconds(policies).items()}
    best = max(found[f"{name} 1 score"] for name in ("mip", "ddim", "distilled"))
    return Measured(
        {name: value for name, value in found.items() if name.split()[1] in ("1", "2")},
        {name: value for name, value in found.items() if name.split()[1] not in ("1", "2")},
        best >= found["ddpm 100 score"] - WITHIN,
    )


def milliseconds(policies: dict[str, DiffusionPolicy]) -> dict[str, float]:
    """A chunk at batch 1, the median; the ways take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in policies}
    for _ in range(TURNS):
        for name, policy in policies.items():
            spec = policy.spec
            obs = {key: np.zeros((spec.n_obs_steps, *one.shape), one.dtype) for key, one in spec.observations.items()}
            began = time.perf_counter()
            policy.predict(obs)
            seconds[name].append(time.perf_counter() - began)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


SYSTEM = System(
    name="few_steps",
    what="policies of one and two steps score as a hundred of DDPM do",
    bar=f"one of one step is within {WITHIN} of DDPM 100, 50 starts",
    measure=measure,
)
