"""Policies to try systems on: small ones of arrays, and one of PushT, which is trained once and kept."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel

from action_diffusion import envs
from action_diffusion.datasets.batches.loader import BatchSource, ObsKey
from action_diffusion.datasets.batches.windows import Windows
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.envs.rollout import rollout
from action_diffusion.files import cache_folder
from action_diffusion.options.configuration import load
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy import kernels
from action_diffusion.policy.build import build_policy
from action_diffusion.policy.model import normalizer
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec
from action_diffusion.progress import progress
from action_diffusion.training.run import train

SMALL: dict[str, Any] = {
    "encoder": {"name": "observation"},
    "denoiser": {"name": "unet1d", "channels": [32, 64], "n_groups": 4, "kernel_size": 3},
    "process": {"name": "diffusion", "prediction": "sample"},
    "sampler": {"scheduler": "ddim", "num_inference_steps": 20},
    "objective": {"name": "denoising"},
    "normalizer": {"default": "minmax"},
}
"""The `policy` section of what `trained` makes."""


def described(obs: Mapping[str, np.ndarray], action: np.ndarray, *, n_action_steps: int) -> PolicySpec:
    """The specification of a policy for states, key → [N, To, D], and chunks [N, H, A], min-max normalised."""
    statistics = {key: normalizer.fit(value.reshape(-1, value.shape[-1]), "minmax") for key, value in obs.items()}
    statistics["action"] = normalizer.fit(action.reshape(-1, action.shape[-1]), "minmax")
    return PolicySpec(
        observations={
            key: ObservationSpec(
                shape=(value.shape[-1],), dtype="float32", unit="", kind="state", source=key, columns=None
            )
            for key, value in obs.items()
        },
        action=ActionSpec(shape=(action.shape[-1],), unit="", source="action"),
        n_obs_steps=next(iter(obs.values())).shape[1],
        horizon=action.shape[1],
        n_action_steps=n_action_steps,
        control_rate=10.0,
        task="benchmark",
        normalizer=statistics,
    )


def trained(
    obs: Mapping[str, np.ndarray],
    action: np.ndarray,
    *,
    steps: int,
    n_action_steps: int = 1,
    gain: np.ndarray | None = None,
    seed: int = 0,
    batch_size: int = 256,
    lr: float = 1e-3,
    **sections: Any,
) -> DiffusionPolicy:
    """A policy of states, key → [N, To, D], and chunks [N, H, A], with the average of its weights, for `predict`.

    gain: [N, A, D], for the objective `sobolev`. sections: of `policy`, instead of those of `SMALL`.
    """
    torch.manual_seed(seed)
    policy = build_policy(SMALL | sections, described(obs, action, n_action_steps=n_action_steps))
    fit(policy, obs, action, steps=steps, gain=gain, seed=seed, batch_size=batch_size, lr=lr)
    return policy


def fit(
    policy: DiffusionPolicy,
    obs: Mapping[str, np.ndarray],
    action: np.ndarray,
    *,
    steps: int,
    gain: np.ndarray | None = None,
    seed: int = 0,
    batch_size: int = 256,
    lr: float = 1e-3,
) -> None:
    """Train a policy in place on windows that are all in memory; it ends with the average of its weights."""
    kernels.for_training(policy.train())
    tensors = {key: torch.as_tensor(value, dtype=torch.float32) for key, value in obs.items()}
    chunks = torch.as_tensor(action, dtype=torch.float32)
    gains = None if gain is None else torch.as_tensor(gain, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-6, betas=(0.95, 0.999))
    schedule = get_cosine_schedule_with_warmup(optimizer, min(50, steps // 10), steps)
    average = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75, foreach=True)
    with progress("training", steps) as advance:
        for _ in range(steps):
            rows = torch.randint(len(chunks), (batch_size,), generator=generator)
            batch = {key: value[rows] for key, value in tensors.items()}
            given = None if gains is None else gains[rows]
            loss = policy(batch, chunks[rows], gain=given, generator=generator)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            average.step(parameters)
            advance(1)
    average.copy_to(parameters)
    policy.eval().requires_grad_(False)


def source(obs: Mapping[str, np.ndarray], action: np.ndarray) -> BatchSource:
    """Windows [N] of one observation each, key → [N, 1, D], and chunks [N, H, A], for an extension's `fit`."""
    n, horizon = action.shape[:2]
    rows = {key: np.repeat(value[:, 0], horizon, axis=0).astype(np.float32) for key, value in obs.items()}
    buffer = ReplayBuffer.from_arrays(
        rows | {"action": action.reshape(n * horizon, -1).astype(np.float32)}, horizon * np.arange(1, n + 1)
    )
    ends = buffer.episode_ends
    return BatchSource(
        buffer=buffer,
        windows=Windows(ends - horizon, ends - horizon, ends, horizon, n_obs_steps=1, n_action_steps=horizon),
        observations={key: ObsKey(key, None, "state") for key in obs},
        action_key="action",
        n_obs_steps=1,
        device=torch.device("cpu"),
    )


def pusht(seed: int, *options: str, steps: int = 1100) -> Path:
    """The bundle of a PushT policy: the quick start's, by default after half of its training; options: as of `train`.

    It stays in the user's cache folder, by the whole configuration and the versions of the packages.
    """
    words = [f"train.max_steps={steps}", "train.tensorboard=false", f"train.validate_every={steps}", *options]
    config = load("train", [*words, f"seed={seed}", "evaluation.n_episodes=0"])
    named = json.dumps([config, bundles.versions()], sort_keys=True, default=str)
    folder = cache_folder() / "systems" / hashlib.sha256(named.encode()).hexdigest()[:16]
    if not (folder / "bundle" / "golden.safetensors").exists():
        unfinished = (folder / "metrics.jsonl").exists()
        train({**config, "output_dir": str(folder), "resume": unfinished})
    return folder / "bundle"


def scores(policy: DiffusionPolicy, seeds: Sequence[int]) -> np.ndarray:
    """The score of each start [n], in the simulator of the policy's task."""
    env = policy.spec.env
    assert env is not None
    make = functools.partial(envs.make, **env)
    keys = list(policy.spec.observations)
    episodes = rollout(policy=policy, make_env=make, seeds=seeds, keys=keys, n_envs=25, policy_batch=25)
    return np.array([episode.score for episode in episodes])
