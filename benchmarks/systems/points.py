"""What the eyes of a policy are worth when somebody moves the camera: Lift by its pictures, and by points in space.

Both policies learn from the same demonstrations of the scripted expert, whose one camera stands where it always does,
and both know the hand. Then the camera is carried around the table by 10 degrees, which keeps the cube near the middle
of the picture, or turned by 10 degrees on the spot, which does not. The policy of points is told where the camera is
now, as a calibrated rig says; nobody could tell that to the policy of pictures.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion import __version__, envs
from action_diffusion.envs.collect import collect
from action_diffusion.envs.rollout import rollout
from action_diffusion.files import cache_folder
from action_diffusion.options.configuration import load
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.training.run import train
from benchmarks.rows.system import Measured, System

CAMERA, DEGREES = "agentview", 10.0
DEMONSTRATIONS, STARTS, LIMIT = 150, 20, 100
"""Episodes to learn from; starts to try in each place of the camera; steps that an episode may take."""
CLOUD: dict[str, Any] = {"cameras": [CAMERA], "n": 128}
STEPS = {"pictures": 1200, "points": 1500}
"""Of training: about as long for either, a minute and a half of one core."""
COMMON = (
    *("task.n_obs_steps=1", "train.batch_size=64", "train.lr=1e-3", "train.tensorboard=false", "device=cpu"),
    *("train.rollout_every=0", "train.validate_every=0", "dataset.val_fraction=0.0", "evaluation.n_episodes=0"),
    *("policy.denoiser.channels=[32,64]", "policy.objective.noise_draws=1"),
)
POLICIES = {
    "pictures": ("task=lift_image", "task.observations.robot0_eye_in_hand_image=null"),
    "points": ("task=lift_points",),
}


def measure(seed: int) -> Measured:
    """Success with the camera where it was, and where it was moved to; the drop is the mean of both moves'."""
    demonstrations = collected()
    measured, baseline = (success(learnt(name, demonstrations, seed), seed) for name in ("points", "pictures"))
    lift = min(measured["success"], baseline["success"]) >= 0.5
    return Measured(measured, baseline, lift and max(0.0, measured["drop"]) <= baseline["drop"] / 2)


def collected() -> Path:
    """The demonstrations, the same for every seed, which stay in the user's cache folder."""
    named = repr((__version__, DEMONSTRATIONS, CLOUD))
    path = cache_folder() / "systems" / f"lift-{hashlib.sha256(named.encode()).hexdigest()[:16]}.zarr"
    if not path.exists():
        seen = (f"{CAMERA}_image", "points")
        settings: Mapping[str, Any] = {"points": CLOUD}
        options: dict[str, Any] = {"episodes": DEMONSTRATIONS, "workers": 2}
        collect(env_name="lift", settings=settings, cameras=seen, output=path, **options)
    return path


def learnt(name: str, demonstrations: Path, seed: int) -> DiffusionPolicy:
    words = [*POLICIES[name], *COMMON, f"train.max_steps={STEPS[name]}", f"data={demonstrations}", f"seed={seed}"]
    folder = demonstrations.with_suffix("") / f"{name}-{hashlib.sha256(repr(words).encode()).hexdigest()[:16]}"
    if not (folder / "bundle" / "golden.safetensors").exists():
        train({**load("train", words), "output_dir": str(folder), "resume": (folder / "metrics.jsonl").exists()})
    return bundles.load(folder / "bundle")


def success(policy: DiffusionPolicy, seed: int) -> dict[str, float]:
    """Of `STARTS` episodes, the share that lifts the cube, by where the camera is."""
    places: dict[str, dict[str, Any]] = {
        "success": {},
        "carried": {"turned": {CAMERA: DEGREES}},
        "turned": {"panned": {CAMERA: DEGREES}},
    }
    found = {name: float(lifted(policy, place, seed).mean()) for name, place in places.items()}
    return found | {"drop": found["success"] - (found["carried"] + found["turned"]) / 2}


def lifted(policy: DiffusionPolicy, place: Mapping[str, Any], seed: int) -> np.ndarray:
    """The score of each start [n]. place: of the camera, settings of the simulator."""
    assert policy.spec.env is not None
    env = {**policy.spec.env, **place, "max_steps": LIMIT}
    starts = range(100_000 + 1000 * seed, 100_000 + 1000 * seed + STARTS)
    make, keys = functools.partial(envs.make, **env), list(policy.spec.observations)
    episodes = rollout(policy=policy, make_env=make, seeds=starts, keys=keys, n_envs=6, policy_batch=6, workers=2)
    return np.array([episode.score for episode in episodes])


SYSTEM = System(
    name="points",
    what="Lift whose camera is carried around the table by 10° after training, or turned by that on the spot",
    bar="points lose at most half of the success that pictures lose; where the camera was, both lift at least 0.5",
    measure=measure,
    needs={"robosuite": "pip install 'action-diffusion[robomimic]'"},
)
