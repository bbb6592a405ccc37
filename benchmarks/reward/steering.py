"""A weak PushT policy, trained for half of the quick start's steps, steered by the noise that its chunks begin with."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from action_diffusion.options.configuration import settings
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.extensions.extension import weights_hash
from action_diffusion.training.reward.finetune import finetune
from benchmarks.rows.policies import pusht, scores
from benchmarks.rows.system import Measured, System

STARTS = range(500_000, 500_100)


def improved(seed: int, method: str) -> tuple[dict[str, float], dict[str, float]]:
    """What `finetune method=…` with its own settings makes of the weak policy, and what that is, on `STARTS`."""
    weak = pusht(seed)
    with tempfile.TemporaryDirectory() as folder:
        words = [f"bundle={weak}", f"output_dir={folder}/run", f"seed={seed}", "evaluation.n_episodes=0"]
        finetune(settings("finetune", [*words, f"method={method}"]))
        better = Path(folder) / "run/bundle"
        untouched = weights_hash(better) == weights_hash(weak)
        after = scores(bundles.load(better), STARTS)
    before = scores(bundles.load(weak), STARTS)
    measured = {"success": float(np.mean(after >= 1)), "score": float(after.mean())}
    baseline = {"success": float(np.mean(before >= 1)), "score": float(before.mean())}
    return measured | {"weights untouched": float(untouched)}, baseline


def measure(seed: int) -> Measured:
    measured, baseline = improved(seed, "dsrl")
    passed = measured["weights untouched"] == 1 and measured["success"] >= baseline["success"] + 0.2
    return Measured(measured, baseline, passed)


SYSTEM = System(
    name="dsrl",
    what="a weak PushT policy, its weights untouched, is steered by its initial noise",
    bar=f"success 0.2 above that of the policy alone, on {len(STARTS)} starts from {STARTS.start}",
    measure=measure,
)
