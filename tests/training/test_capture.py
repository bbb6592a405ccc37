"""Training steps as CUDA graphs: the same losses and weights as step by step, and a clear word where that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from action_diffusion.datasets.batches.loader import BatchSource, ObsKey
from action_diffusion.datasets.batches.windows import make_windows
from action_diffusion.errors import InputError
from action_diffusion.options import TrainSettings
from action_diffusion.training.capture import check_capturable
from action_diffusion.training.data import StepBatches
from action_diffusion.training.trainer import Trainer


@pytest.fixture(autouse=True)
def another_precision():
    """accelerate keeps the first precision of a process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


FITS: dict[str, Any] = {"device": torch.device("cuda"), "processes": 1, "accumulation": 1, "mixed_precision": "bf16"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": torch.device("cpu")}, "needs a CUDA device, this run is on cpu"),
        ({"processes": 2}, "train.num_processes=2"),
        ({"accumulation": 4}, "train.gradient_accumulation_steps=4"),
        ({"mixed_precision": "fp16"}, "use bf16"),
    ],
)
def test_what_cannot_be_captured_is_said(change, message):
    check_capturable(**FITS)
    with pytest.raises(InputError, match=f"train.cuda_graph=true .*{message}"):
        check_capturable(**(FITS | change))


def test_a_run_on_a_cpu_says_so(tmp_path, policy, buffer):
    with pytest.raises(InputError, match=r"train\.cuda_graph=true needs a CUDA device, this run is on cpu"):
        trainer(tmp_path, policy, buffer, "cpu", cuda_graph=True)


def trainer(folder: Path, policy, buffer, device: str, **changes) -> Trainer:
    source = BatchSource(
        buffer=buffer,
        windows=make_windows(buffer.episode_ends, horizon=8, n_obs_steps=2, n_action_steps=4),
        observations={"state": ObsKey("state", None, "state")},
        action_key="action",
        n_obs_steps=2,
        device=device,
    )
    settings: dict[str, Any] = {"max_steps": 12, "batch_size": 16, "warmup": 2, "validate_every": 0, "rollout_every": 0}
    mixed_precision = changes.get("mixed_precision", "no")
    return Trainer(
        policy=policy,
        source=StepBatches(source, seed=0),
        settings=TrainSettings(**settings, checkpoint_every=0, **changes),
        accelerator=Accelerator(cpu=device == "cpu", mixed_precision=mixed_precision),
        output_dir=folder,
        seed=0,
        metrics=None,
        write_bundle=lambda path, weights: path.mkdir(parents=True),
        show_progress=False,
    )


def trained(folder: Path, policy, buffer, **changes) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    AcceleratorState._reset_state()
    run = trainer(folder, policy, buffer, "cuda", **changes)
    losses, step = [], run._step
    run._step = lambda: losses.append(step()) or losses[-1]
    run.run()
    return torch.stack(losses), run.ema_state()


@pytest.mark.gpu
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_on_a_gpu_a_captured_run_learns_the_same(tmp_path, make_policy, buffer, mixed_precision):
    expected, weights = trained(tmp_path / "a", make_policy(), buffer, mixed_precision=mixed_precision)
    found, captured = trained(tmp_path / "b", make_policy(), buffer, mixed_precision=mixed_precision, cuda_graph=True)
    assert len(set(found.tolist())) == len(found)  # each step its own batch, times and noise
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(captured, weights, atol=1e-3, rtol=1e-2)


@pytest.mark.gpu
def test_on_a_gpu_the_loss_is_that_of_the_cpu(make_policy, buffer):
    """For given times and noise: the device's own layers compute the same function."""
    policy = make_policy().train()
    windows = make_windows(buffer.episode_ends, horizon=8, n_obs_steps=2, n_action_steps=4)
    rows = windows.rows(torch.arange(16).numpy())
    obs = {"state": torch.from_numpy(buffer["state"][:][rows[:, :2]])}
    action = torch.from_numpy(buffer["action"][:][rows])
    noise, times = torch.randn(action.shape, generator=torch.Generator().manual_seed(0)), torch.arange(16).float() * 6
    losses = []
    for device in ("cpu", "cuda"):
        policy.to(device)
        seen = policy.see({key: value.to(device) for key, value in obs.items()})
        x0 = policy.normalize_action(action.to(device), seen.obs)
        film = policy.denoiser.prepare(seen.condition, times.to(device))
        x = policy.process.add_noise(x0, noise.to(device), times.to(device))
        output = policy.denoiser(x, film.steps + film.condition)
        losses.append(policy.loss(output, policy.process.target(x0, noise.to(device), times.to(device))).cpu())
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-4)
