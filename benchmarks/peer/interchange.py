"""Whether policies say the same after `bundle import` and `bundle export`, told with lerobot itself.

    python -m benchmarks.peer.interchange [--only 0.6.1] [--json FILE]

lerobot, in an environment of its own (`peer_environment`), makes a policy and says what it does; `bundle import` brings
it here, which is compared; `bundle export` takes that out again, and lerobot, which loads it, is asked anew.
Differences are the largest of a chunk, as a share of what two normalised units of the action are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from action_diffusion.commands import bundle as command
from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.interchange.contract import made_up
from action_diffusion.policy.policy import DiffusionPolicy
from benchmarks.peer.peer_environment import NEWER, OLDER, peer_environment

WORKER = Path(__file__).parent / "peers" / "interchange_worker.py"
BAR = 1e-5
SMALL = {"down_dims": [16, 32], "horizon": 16, "n_action_steps": 8}
DDIM = {"noise_scheduler_type": "DDIM", "num_inference_steps": 10}
PICTURES = {"cameras": ["observation.image"], "size": [64, 64]}
TWO = {"cameras": ["observation.images.top", "observation.images.wrist"], "size": [64, 80]}
CASES: dict[str, dict[str, Any]] = {
    "states, DDIM of 10 steps, predicts the noise": {
        **{"state": 3, "environment": 5, "action": 2},
        "options": {**SMALL, **DDIM},
    },
    "states, DDPM of 50 steps, mean and deviation, FiLM that shifts": {
        **{"state": 2, "environment": 4, "action": 3, "constant": True},
        "modes": {"ACTION": "MEAN_STD", "STATE": "MEAN_STD", "ENV": "IDENTITY"},
        "options": {**SMALL, "num_train_timesteps": 50, "use_film_scale_modulation": False, "clip_sample_range": 2.0},
    },
    "a picture, group norm, cropped, DDIM": {
        **{"state": 2, "action": 2, **PICTURES},
        "options": {**SMALL, **DDIM, "use_group_norm": True, "crop_shape": [56, 53], "prediction_type": "sample"},
    },
    "a picture, batch norm, resized and cropped, DDIM": {
        **{"state": 2, "action": 2, **PICTURES, "size": [72, 96]},
        "options": {**SMALL, **DDIM, "use_group_norm": False, "resize_shape": [54, 70], "crop_ratio": 0.9},
    },
    "two cameras, one encoder, no clipping": {
        **{"state": 2, "action": 2, **TWO},
        "options": {
            **{**SMALL, **DDIM, "use_group_norm": True, "clip_sample": False},
            "use_separate_rgb_encoder_per_camera": False,
        },
    },
    "two cameras, an encoder each, and the environment's state": {
        **{"state": 2, "environment": 3, "action": 2, **TWO},
        "modes": {"VISUAL": "MIN_MAX"},
        "options": {**SMALL, **DDIM, "use_group_norm": False, "use_separate_rgb_encoder_per_camera": True},
    },
}
Say = Callable[[str], None]


def measure(version: str, folder: Path, *, cases: Sequence[str] = (), say: Say = print) -> list[dict[str, Any]]:
    """A row for each case and way. folder: for what is made, empty. Raises `InputError` where lerobot fails."""
    asked = [case for case in CASES if not cases or case in cases]
    places = {case: folder / str(i) for i, case in enumerate(asked)}
    run_worker(version, [{"make": str(places[case] / "theirs"), "settings": CASES[case]} for case in asked], folder)
    policies = {case: _through(place) for case, place in places.items()}
    orders = []
    for place in places.values():
        for name in ("theirs", "back"):
            orders.append(
                {
                    "predict": str(place / name),
                    "inputs": str(place / "inputs.safetensors"),
                    "outputs": str(place / f"{name}.safetensors"),
                }
            )
    run_worker(version, orders, folder)
    rows = []
    for case, place in places.items():
        own, theirs, back = (load_file(place / f"{name}.safetensors")["action"] for name in ("ours", "theirs", "back"))
        for way, found in (("import", own), ("export", back)):
            difference = share(found - theirs, policies[case])
            rows.append(
                {"lerobot": version, "policy": case, "way": way, "difference": difference, "ok": difference < BAR}
            )
            say(f"{version}  {way}  {difference:.1e}  {case}")
    return rows


def share(difference: np.ndarray, policy: DiffusionPolicy) -> float:
    """The largest of a chunk [Ta, A], where 2 normalised units of the action are 1."""
    scale = np.asarray(policy.spec.normalizer["action"]["scale"])
    return float((np.abs(difference) * np.abs(scale) / 2).max())


def _through(place: Path) -> DiffusionPolicy:
    """In and out again by the command, and what the bundle between does."""
    command.run(["import", f"in={place / 'theirs'}", f"out={place / 'bundle'}", "rate=10"])
    policy = bundles.load(place / "bundle", verify=True)
    command.run(["export", f"in={place / 'bundle'}", f"out={place / 'back'}", "format=lerobot"])
    seen = made_up(policy.spec)
    noise = np.random.default_rng(1).standard_normal((1, policy.spec.horizon, *policy.spec.action.shape), np.float32)
    names = bundles.read_config(place / "bundle")["imported"]["names"]
    save_file({**{names[key]: value for key, value in seen.items()}, "noise": noise}, place / "inputs.safetensors")
    chunk = policy.predict(seen, noise=noise, generator=torch.Generator().manual_seed(0))["action"]
    save_file({"action": np.ascontiguousarray(chunk)}, place / "ours.safetensors")
    return policy


def run_worker(version: str, orders: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """lerobot does what is ordered. Raises `InputError` with its last words where it fails."""
    environment = peer_environment(f"lerobot=={version}")
    file = folder / "orders.json"
    file.write_text(json.dumps(list(orders)))
    variables = {**os.environ, **environment.variables, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [environment.python, WORKER, file], env=variables, capture_output=True, text=True, cwd=folder, check=False
    )
    if done.returncode:
        raise InputError(f"lerobot {version}: {done.stderr.strip().splitlines()[-1]}")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.peer.interchange", description=__doc__)
    versions = [name.partition("==")[2] for name in (OLDER, NEWER)]
    parser.add_argument("--only", choices=versions, action="append", help="this version (default: both)")
    parser.add_argument("--json", type=Path, help="file for the rows")
    given = parser.parse_args(arguments)
    rows = []
    for version in given.only or versions:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(version, Path(folder))
    if given.json:
        with atomic_path(given.json) as temporary:
            temporary.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        sys.exit(f"error: {error}")
