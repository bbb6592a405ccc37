"""What the eyes of a policy are worth when somebody moves the camera: Lift by its pictures, and by points in space.

Both policies learn from the same demonstrations of the scripted expert, whose one camera stands where it always does,
and both know the hand. Then the camera is carried around the table by 10 degrees, to either side. The policy of points
is told where the camera is now, as a calibrated rig says; nobody could tell that to the policy of pictures.
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
    """Success with the camera where it was, and the mean of the two places that it was moved to."""
    demonstrations = collected()
    found = {name: success(learnt(name, demonstrations, seed), seed) for name in POLICIES}
    drops = {name: before - after for name, (before, after) in found.items()}
    measured, baseline = (
        {"success": found[name][0], f"moved by {DEGREES:g}°": found[name][1], "drop": drops[name]}
        for name in ("points", "pictures")
    )
    passed = min(found["points"][0], found["pictures"][0]) >= 0.7 and drops["points"] <= drops["pictures"] / 2
    return Measured(measured, baseline, passed)


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


def success(policy: DiffusionPolicy, seed: int) -> tuple[float, float]:
    """Of `STARTS` episodes, the share that lifts the cube: with the camera where it was, and where it was moved to."""
    places = [lifted(policy, degrees, seed) for degrees in (0.0, DEGREES, -DEGREES)]
    return float(places[0].mean()), float(np.mean(places[1:]))


def lifted(policy: DiffusionPolicy, degrees: float, seed: int) -> np.ndarray:
    assert policy.spec.env is not None
    env = {**policy.spec.env, "turned": {CAMERA: degrees}, "max_steps": LIMIT}
    starts = range(100_000 + 1000 * seed, 100_000 + 1000 * seed + STARTS)
    make, keys = functools.partial(envs.make, **env), list(policy.spec.observations)
    n = {"n_envs": 6, "policy_batch": 6, "workers": 2}
    episodes = rollout(policy=policy, make_env=make, seeds=starts, keys=keys, **n)
    return np.array([episode.score for episode in episodes])


SYSTEM = System(
    name="points",
    what="Lift whose camera is moved by 10° around the table after training: success by pictures and by points",
    bar="points lose at most half of the success that pictures lose; where the camera was, both lift at least 0.7",
    measure=measure,
    needs={"robosuite": "pip install 'action-diffusion[robomimic]'"},
)
