"""A tiny policy, and demonstrations for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from action_diffusion.datasets.batches.windows import make_windows
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.policy.build import build_policy, fit_normalizer
from action_diffusion.policy.bundle import versions
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec

TINY = {
    "normalizer": {"default": "minmax"},
    "features": {"state": {"name": "sin_cos", "columns": [4]}},
    "encoder": {"name": "observation"},
    "denoiser": {"name": "unet1d", "channels": [8, 16], "time_dim": 16},
    "process": {"name": "diffusion", "prediction": "epsilon"},
    "sampler": {"scheduler": "ddim", "num_inference_steps": 5},
    "objective": {"loss": "mse"},
}


def demonstrations(n_episodes: int = 6, length: int = 40, seed: int = 0) -> ReplayBuffer:
    """Smooth random PushT-like episodes: state [5], action [2]."""
    random = np.random.default_rng(seed)
    n = n_episodes * length
    state = np.cumsum(random.normal(size=(n, 5)), axis=0).astype(np.float32) + 100
    action = (state[:, :2] + random.normal(size=(n, 2))).astype(np.float32)
    return ReplayBuffer.from_arrays({"state": state, "action": action}, np.arange(1, n_episodes + 1) * length)


def tiny_policy(buffer: ReplayBuffer, **changes: Any) -> DiffusionPolicy:
    """A policy of a few thousand weights for `demonstrations`."""
    torch.manual_seed(0)
    config = TINY | changes
    spec = PolicySpec(
        observations={"state": ObservationSpec(shape=(5,), unit="px", source="state")},
        action=ActionSpec(shape=(2,), unit="px"),
        n_obs_steps=2,
        horizon=8,
        n_action_steps=4,
        control_rate=10.0,
        task="pusht_state",
        env={"name": "pusht"},
        versions=versions(),
    )
    sizes = {name: getattr(spec, name) for name in ("horizon", "n_obs_steps", "n_action_steps")}
    windows = make_windows(buffer.episode_ends, **sizes)
    every = np.arange(len(windows))

    def chunks(key: str) -> tuple[np.ndarray, np.ndarray]:
        return buffer[key][:][windows.now(every)], buffer["action"][:][windows.rows(every)]

    statistics = fit_normalizer(config, spec, lambda key: buffer[key][:], chunks)
    spec = PolicySpec(**{**spec.__dict__, "normalizer": statistics})
    return build_policy(config, spec).eval()
