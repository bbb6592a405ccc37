"""Our side of the comparison: the same works as `peers/lerobot_worker.py`, by what a user of this package runs.

Its timed calls do more than the peer's: they begin at uint8 images and end in pixels, where lerobot's begin and end
at normalised tensors.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from action_diffusion import choice, envs
from action_diffusion.datasets.batches import pixels
from action_diffusion.datasets.batches.loader import Batch, BatchSource, ObsKey
from action_diffusion.datasets.batches.windows import batch_indices, make_windows
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.envs.rollout import rollout
from action_diffusion.errors import InputError
from action_diffusion.memory import keep_freed_memory
from action_diffusion.options import TrainSettings
from action_diffusion.policy.build import build_policy
from action_diffusion.policy.bundle import versions
from action_diffusion.policy.inference import choose_threads
from action_diffusion.policy.interchange.contract import made_up
from action_diffusion.policy.interchange.lerobot.weights import from_lerobot
from action_diffusion.policy.kernels import accelerate, check_precision, cpu_unet
from action_diffusion.policy.model import normalizer
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.runtime.onnx_file import observation_name
from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec
from action_diffusion.training.trainer import Trainer
from benchmarks.peer.peers.serving import Say, Work, instructions, serve

THREADS = torch.get_num_threads()
FRAME, N_KEYPOINTS = (96, 96, 3), 16
PIXELS = {"agent_pos": 2, "keypoint": N_KEYPOINTS, "action": 2}
"""Vectors in pixels, 0 to 512, and their sizes."""


def build(settings: dict[str, Any], folder: Path, *, weights: bool = True) -> DiffusionPolicy:
    """The policy that lerobot's worker built, with its weights; `weights=False`: with weights of its own.

    settings: image, channels, steps as there; activation of the denoiser (lerobot has Mish).
    """
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)  # a work before this one may have chosen fewer
    other = (
        {"image": ObservationSpec(shape=FRAME, dtype="uint8", unit="0-255", kind="image")}
        if settings["image"]
        else {"keypoint": ObservationSpec(shape=(N_KEYPOINTS,), unit="px")}
    )
    spec = PolicySpec(
        observations={"agent_pos": ObservationSpec(shape=(2,), unit="px"), **other},
        action=ActionSpec(shape=(2,), unit="px"),
        n_obs_steps=2,
        horizon=16,
        n_action_steps=8,
        control_rate=10.0,
        normalizer={key: normalizer.fit(np.array([[0.0] * n, [512.0] * n])) for key, n in PIXELS.items()},
    )
    config = {
        "normalizer": {"default": "minmax"},
        "encoder": {"name": "observation", **({"backbone": "resnet18", "crop": [84, 84]} if settings["image"] else {})},
        "denoiser": {
            "name": "unet1d",
            "channels": settings["channels"],
            "activation": settings.get("activation", "mish"),
        },
        "process": {"name": "diffusion", "prediction": "sample"},
        "sampler": {
            "scheduler": "ddim",
            "num_inference_steps": settings.get("steps", 10),
            "timestep_spacing": "leading",  # as lerobot
            "eta": 0.0,
            "clip": "x0",
        },
        "objective": {"loss": "mse"},
    }
    policy = build_policy(config, spec).eval()
    if weights:
        policy.load_state_dict(from_lerobot(load_file(folder / "weights.safetensors")))
    return policy


def load_inputs(policy: DiffusionPolicy, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The row's observations, in the data's units, and its other inputs: action, noise, times."""
    given = load_file(folder / "inputs.safetensors")
    return {key: given.pop(key) for key in policy.spec.observations}, given


class Chunk(Work):
    """One chunk for each row of the inputs by `predict`; part: denoise (without the encoder) or encode (it alone).

    precisions: of the denoiser's weights; the first of them that this machine has kernels for. compile: the denoiser,
    where there is a C++ compiler.
    """

    def __init__(self, settings: dict[str, Any], folder: Path, say: Say) -> None:
        self._policy = build(settings, folder, weights=settings.get("activation", "mish") == "mish")
        precision = offered(settings["precisions"], self._policy.device)
        compiled = bool(settings.get("compile")) and shutil.which("g++") is not None
        accelerate(self._policy, precision=precision, compile=compiled)
        self.note = f"precision={precision}, compile={compiled}, threads: {choose_threads(self._policy)}"
        self._obs, given = load_inputs(self._policy, folder)
        self._noise = given["noise"]
        self._arrays = {key: value.numpy() for key, value in self._obs.items()}
        self._part = settings.get("part", "chunk")
        self.units = settings["steps"] if self._part == "denoise" else 1
        with torch.no_grad():
            self._condition = self._policy.encode(self._obs)
        if self._part == "denoise":
            self._policy.encode = lambda *_, **__: self._condition  # type: ignore[method-assign]

    @torch.no_grad()
    def outputs(self) -> dict[str, Tensor]:
        film = self._policy.denoiser.prepare(self._condition, torch.tensor([50.0]))
        return {
            "embedding": self._condition,
            "output": self._policy.denoiser(self._noise, film.at(0)),
            "chunk": self._policy.normalize_action(torch.from_numpy(self._chunk()), self._obs),
        }

    def _chunk(self) -> np.ndarray:
        return self._policy.predict(self._arrays, noise=self._noise.numpy())["action_pred"]

    def call(self) -> None:
        if self._part == "chunk":
            self._chunk()
            return
        with torch.no_grad():
            if self._part == "denoise":
                self._policy.sample(self._obs, noise=self._noise)
            else:
                self._policy.encode(self._obs)


def network(settings: dict[str, Any], *, prepared: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    """A network of an image policy with random weights, the same in every process, and its inputs by name.

    settings: channels; part: "step" (the denoiser: a chunk and what it is modulated by), "encoder" (of the camera: two
    frames, cropped and centred) or "chunk" (all of it, from observations in the data's units; image and steps as
    `build`'s). prepared: as `deploy` and `serve` run it.
    """
    policy = build({"image": True, "activation": "silu", **settings}, Path(), weights=False)
    if prepared:
        accelerate(policy, precision="fp32")
    torch.manual_seed(1)
    if settings["part"] == "chunk":
        return WholeChunk(policy), {"noise": torch.randn(1, 16, 2)} | _observed(policy)
    if settings["part"] == "encoder":
        return policy.encoder.get_submodule("cameras.0"), {"images": torch.rand(2, 3, 84, 84) * 2 - 1}
    denoiser = policy.denoiser
    with torch.no_grad():
        film = denoiser.prepare(torch.randn(1, denoiser.condition_film.in_features), torch.tensor([50.0])).at(0)
    return denoiser, {"x": torch.randn(1, 16, 2), "film": film}


class WholeChunk(nn.Module):
    """noise [B, H, A] and the observations, in order → chunks [B, H, A] in the data's units."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        super().__init__()
        self.policy = policy

    @torch.inference_mode()
    def forward(self, noise: Tensor, *obs: Tensor) -> Tensor:
        return self.policy.chunk(noise, *obs)[0]


def _observed(policy: DiffusionPolicy) -> dict[str, Tensor]:
    """An observation by the names that it has in an ONNX file of ours."""
    obs = made_up(policy.spec)
    return {observation_name(key): torch.from_numpy(obs[key][None]) for key in policy.spec.observations}


class Network(Work):
    """One call of the denoiser at batch 1, or of the camera's encoder, alone, or a chunk. settings: as `network`'s."""

    clock = staticmethod(time.process_time if THREADS == 1 else time.perf_counter)

    def __init__(self, settings: dict[str, Any], folder: Path, say: Say) -> None:
        self._layers, inputs = network(settings, prepared=True)
        self._inputs = list(inputs.values())
        if settings["part"] == "encoder":  # as `ObservationEncoder` hands them over
            self._inputs = [self._inputs[0].to(memory_format=torch.channels_last)]

    @torch.no_grad()
    def outputs(self) -> dict[str, Tensor]:
        return {"output": self._layers(*self._inputs)}

    @torch.no_grad()
    def call(self) -> None:
        self._layers(*self._inputs)


def offered(precisions: Sequence[str], device: torch.device) -> str:
    """The first of `precisions` that `device` has kernels for. Raises `InputError` where it has for none."""
    for precision in precisions[:-1]:
        with contextlib.suppress(InputError):
            check_precision(precision, device)
            return precision
    check_precision(precisions[-1], device)
    return precisions[-1]


class Train(Work):
    """A step of our training loop on a batch that lies ready: loss, gradient, clipping, AdamW, learning rate, EMA."""

    def __init__(self, settings: dict[str, Any], folder: Path, say: Say) -> None:
        self._policy = build(settings, folder, weights=settings.get("activation", "mish") == "mish")
        obs, given = load_inputs(self._policy, folder)
        mask = torch.ones(given["action"].shape[:2], dtype=torch.bool)
        self._batch = Batch(obs=obs, action=given["action"], mask=mask)
        self._noise, self._times = given["noise"], given["times"]
        n = len(given["action"])
        self._trainer = _Steps(
            policy=self._policy,
            source=_Same(self._batch),
            settings=TrainSettings(max_steps=1, batch_size=n, checkpoint_every=0, rollout_every=0, validate_every=0),
            accelerator=Accelerator(cpu=True),
            output_dir=folder,
            seed=0,
            metrics=None,
            write_bundle=lambda path, weights: None,
            show_progress=False,
        )

    def outputs(self) -> dict[str, Tensor]:
        """The loss for given noise and times, with the centre crop."""
        policy = self._policy.eval()
        times = mock.patch.object(policy.process, "draw_times", return_value=self._times.float())
        with torch.no_grad(), times, mock.patch.object(torch, "randn", return_value=self._noise):
            return {"loss": policy(self._batch.obs, self._batch.action, self._batch.mask).reshape(1)}

    def call(self) -> None:
        self.time(1)

    def time(self, calls: int) -> float:
        self._trainer.settings.max_steps = self._trainer.progress.step + calls
        began = time.perf_counter()
        self._trainer.run()
        return time.perf_counter() - began


class _Steps(Trainer):
    """The training loop without its checkpoint at the end."""

    def save(self) -> None:
        pass


class _Same:
    """A source that has one batch, always at hand."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return len(self._batch.action)

    def batch(self, step: int, batch_size: int, generator: torch.Generator) -> Batch:
        return self._batch


class Evaluate(Work):
    """Our evaluation of `episodes` PushT episodes from images, `max_steps` steps at most, all at once as the peer's."""

    def __init__(self, settings: dict[str, Any], folder: Path, say: Say) -> None:
        self._policy, self._settings = build(settings, folder), settings
        accelerate(self._policy, precision="fp32")  # as `action-diffusion evaluate` does
        self._obs, given = load_inputs(self._policy, folder)
        self._noise = given["noise"]

    @torch.no_grad()
    def outputs(self) -> dict[str, Tensor]:
        return {"chunk": self._policy.sample(self._obs, noise=self._noise).normalized}

    def call(self) -> None:
        first = self._settings["seed"]
        rollout(
            policy=self._policy,
            make_env=functools.partial(envs.make, "pusht", max_steps=self._settings["max_steps"]),
            seeds=range(first, first + self._settings["episodes"]),
            keys=list(self._policy.spec.observations),
            n_envs=self._settings["episodes"],
            policy_batch=self._settings["episodes"],
        )


class Gather(Work):
    """Batches from a `BatchSource`: two frames, cropped at random, as floats in [0, 1], and a chunk of actions."""

    def __init__(self, settings: dict[str, Any], folder: Path, say: Say) -> None:
        torch.set_num_threads(THREADS)
        data = Path(settings["data"])
        arrays = {name: np.load(data / f"{name}.npy") for name in ("image", "action")}
        buffer = ReplayBuffer.from_arrays(arrays, np.load(data / "episode_ends.npy"))
        self._crop, self.units = (settings["crop"][0], settings["crop"][1]), settings["batch"]
        n_obs_steps = settings["n_obs_steps"]
        self._source = BatchSource(
            buffer=buffer,
            windows=make_windows(
                buffer.episode_ends, horizon=settings["horizon"], n_obs_steps=n_obs_steps, n_action_steps=8
            ),
            observations={"image": ObsKey("image", None, "image")},
            action_key="action",
            n_obs_steps=n_obs_steps,
        )
        self._whole = settings["whole_frames"]
        self._inputs = load_file(folder / "inputs.safetensors")
        self._step = 0

    def outputs(self) -> dict[str, Tensor]:
        """Frames (whole, or cropped at the corners in the inputs) and actions of the windows `checked`."""
        windows = np.searchsorted(
            self._source.windows.now(np.arange(len(self._source))), self._inputs["checked"].numpy()
        )
        if self._whole:
            batch = self._source.gather(windows)
        else:
            offsets = self._inputs["corners"].numpy()[windows]
            batch = self._source.gather(windows, crop=self._crop, offsets=offsets)
        return {"image": _images(batch), "action": batch.action}

    def call(self) -> None:
        indices = batch_indices(len(self._source), self.units, 0, self._step)
        self._step += 1
        offsets = self._inputs["corners"].numpy()[indices]
        _images(self._source.gather(indices, crop=self._crop, offsets=offsets))


def _images(batch: Batch) -> Tensor:
    """float32 [B, To, 3, h, w], 0 to 1, as the encoder makes them."""
    return pixels.to_float(batch.obs["image"]).movedim(-1, -3)


def alone(work: Callable[[dict[str, Any], Path, Say], Work], settings: dict[str, Any], folder: Path, say: Say) -> Work:
    """As in a process of its own, as users have it: with the whole budget for finding the fastest ways of its own
    operations, of which the rows before have spent nothing."""
    choice.forget()
    return work(settings, folder, say)


def about() -> dict[str, Any]:
    """Versions, threads, device, and the instructions that torch and our code in C may use."""
    code, used = cpu_unet.library(), {instructions()}
    if code is not None and code.instruction_set.startswith("avx"):  # torch has other names for what else there is
        used.add(code.instruction_set)
    return {
        **versions(),
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "instructions": " and ".join(sorted(used)),
    }


if __name__ == "__main__":
    keep_freed_memory()  # as `action-diffusion` does
    works = {"chunk": Chunk, "train": Train, "evaluate": Evaluate, "gather": Gather, "network": Network}
    serve({name: functools.partial(alone, work) for name, work in works.items()}, about)
