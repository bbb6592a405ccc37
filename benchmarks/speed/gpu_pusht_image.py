"""From nothing to an evaluated PushT image policy on one GPU, in ten minutes: is that so here?

    python -m benchmarks.speed.gpu_pusht_image output_dir=DIR [name=value …]

One `action-diffusion train task=pusht_image` with settings for a GPU: the demonstrations' images are drawn, the policy
is trained in bfloat16, a CUDA graph a step, on batches that stay on the device, evaluated from the paper's starts, and
reported. Other words are settings of that command, so `device=cpu train.cuda_graph=false train.max_steps=2` tries it
out without a GPU. DIR/benchmark.json gets the score and the seconds, of which nothing is left out.

Exit code: of the training, and 1 where score or time are not what they should be on a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path
from benchmarks.command import command

MOST_MINUTES, LEAST_SCORE = 10.0, 0.91
SETTINGS = {
    "task": "pusht_image",
    "device": "cuda",
    "train.max_minutes": "2.25",
    "train.batch_size": "256",
    "train.lr": "1e-3",
    "train.mixed_precision": "bf16",
    "train.cuda_graph": "true",
    "train.rollout_every": "0",
    "train.validate_every": "2000",
    "train.checkpoint_every": "0",
    "evaluation.n_envs": "50",
    "evaluation.policy_batch": "50",
    "evaluation.n_videos": "3",
}


def training_command(words: Sequence[str]) -> tuple[list[str], Path]:
    """The training command with `words` in place of settings, and its output folder. Raises `InputError`."""
    given = dict(SETTINGS)
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"{word!r} is not of the form name=value")
        given[name] = value
    if not given.get("output_dir"):
        raise InputError("output_dir is required: python -m benchmarks.speed.gpu_pusht_image output_dir=DIR")
    training = [sys.executable, "-m", "action_diffusion", "train"]
    return training + [f"{name}={value}" for name, value in given.items()], Path(given["output_dir"])


def outcome(folder: Path, seconds: float) -> dict[str, Any]:
    """What DIR/benchmark.json says, from the results that the training left in `folder`.

    Raises `InputError` where nothing was evaluated.
    """
    results = folder / "evaluation" / "results.json"
    if not results.exists():
        raise InputError(f"{results} does not exist: nothing was evaluated, see evaluation.n_episodes")
    found = json.loads(results.read_text())
    keys = ("n_episodes", "mean_score", "mean_interval", "success_rate", "success_interval", "versions")
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return {"seconds": round(seconds, 1), "steps": last["step"], **{key: found[key] for key in keys}}


@command
def main(words: Sequence[str]) -> int:
    """Run, time, write; returns the exit code."""
    training, folder = training_command(words)
    print(" ".join(training[1:]))
    began = time.monotonic()
    code = subprocess.run(training, check=False).returncode
    if code:
        return code
    found = outcome(folder, time.monotonic() - began)
    with atomic_path(folder / "benchmark.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    low, high = found["mean_interval"]
    print(f"score {found['mean_score']:.3f} [{low:.3f}, {high:.3f}] after {found['seconds']:.0f} s in all")
    if "device=cpu" in words:
        return 0
    kept = found["mean_score"] >= LEAST_SCORE and found["seconds"] <= 60 * MOST_MINUTES
    print(f"asked: {LEAST_SCORE} within {MOST_MINUTES:g} minutes: {'kept' if kept else 'MISSED'}")
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
