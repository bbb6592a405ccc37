"""Policies as ONNX files: the same chunks by ONNX Runtime, and nothing read or run that a hostile file asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import demonstrations, tiny_policy

from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.interchange.onnx import write
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.runtime.onnx_file import STEP_NOISE
from action_diffusion.policy.runtime.onnx_policy import OnnxPolicy

pytest.importorskip("onnxruntime")

POLICIES = {
    "ddim": {},
    "ddim that draws noise": {"sampler": {"scheduler": "ddim", "num_inference_steps": 5, "eta": 1.0}},
    "ddpm": {"sampler": {"scheduler": "ddpm", "num_inference_steps": 10}},
    "dpm_solver++": {"sampler": {"scheduler": "dpm_solver++", "num_inference_steps": 6}},
    "v prediction, clipped samples": {
        "process": {"name": "diffusion", "prediction": "v_prediction"},
        "sampler": {"scheduler": "ddim", "num_inference_steps": 4, "clip": "x"},
    },
    "flow": {
        "process": {"name": "flow"},
        "sampler": {"scheduler": "flow", "num_inference_steps": 4, "clip": None},
    },
    "mip": {"process": {"name": "mip"}, "sampler": {"scheduler": "mip", "num_inference_steps": 2}},
    "gaussian normaliser": {"normalizer": {"default": "gaussian"}},
    "mish": {"denoiser": {"name": "unet1d", "channels": [8, 16], "time_dim": 16, "activation": "mish"}},
    "transformer": {"denoiser": {"name": "transformer"}},
    "dit": {"denoiser": {"name": "dit"}},
    "prefix steps": {"objective": {"loss": "mse", "max_delay": 2}},
    "two times": {
        "objective": {"name": "shortcut"},
        "process": {"name": "flow"},
        "sampler": {"scheduler": "flow", "num_inference_steps": 4},
    },
    "position frame": {
        "action_frame": {"name": "position", "observation": "state", "columns": [0, 1], "action_columns": [0, 1]}
    },
    "planar object": {"action_frame": {"name": "planar_object", "observation": "state", "pose": [2, 3, 4]}},
}


def windows(policy: DiffusionPolicy, rows: int) -> dict[str, np.ndarray]:
    """Observations [B, To, …]: demonstrated states, and pictures of noise."""
    states, random = demonstrations()["state"][:], np.random.default_rng(rows)
    obs = {}
    for key, value in policy.spec.observations.items():
        if value.kind == "image":
            obs[key] = random.integers(0, 256, (rows, policy.spec.n_obs_steps, *value.shape), dtype=np.uint8)
        else:
            obs[key] = np.stack([states[7 * row : 7 * row + policy.spec.n_obs_steps] for row in range(rows)])
    return obs


def exported(policy: DiffusionPolicy, folder: Path, **options) -> OnnxPolicy:
    bundles.save(folder / "bundle", policy, {"policy": {}}, golden_obs={k: v[0] for k, v in windows(policy, 1).items()})
    write(policy, {"policy": {}}, folder / "policy.onnx", {"in": str(folder / "bundle"), **options})
    return OnnxPolicy.load(folder / "policy.onnx")


def difference(policy: DiffusionPolicy, onnx: OnnxPolicy, rows: int) -> float:
    """The largest between both policies' chunks, over the action's range."""
    spec, random = policy.spec, np.random.default_rng(rows)
    obs = windows(policy, rows)
    noise = random.standard_normal((rows, spec.horizon, *spec.action.shape)).astype(np.float32)
    generators = [[torch.Generator().manual_seed(seed) for seed in range(rows)] for _ in range(2)]
    expected = policy.predict(obs, noise=noise, generator=generators[0])
    found = onnx.predict(obs, noise=noise, generator=generators[1])
    statistics = spec.normalizer["action"]
    span = np.subtract(statistics["max"], statistics["min"])
    assert found["action"].shape == expected["action"].shape
    return float((np.abs(found["action_pred"] - expected["action_pred"]) / span).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_chunks_are_those_of_torch(name: str, tmp_path: Path) -> None:
    policy = tiny_policy(demonstrations(), **POLICIES[name])
    onnx = exported(policy, tmp_path)
    assert [difference(policy, onnx, rows) < 1e-4 for rows in (1, 3)] == [True, True]
    draws = policy.sampler.draw_step_noise(torch.zeros(1, 8, 2), None) is not None
    assert (STEP_NOISE in onnx._file.inputs) == draws
