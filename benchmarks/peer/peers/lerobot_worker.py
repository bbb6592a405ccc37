"""lerobot's side of the comparison, run by the Python of its own environment.

It builds lerobot's diffusion policy with random weights, leaves them in the row's folder for the other side to copy,
and measures lerobot's own functions: `generate_actions`, `update_policy` of its training script, `eval_policy` of its
evaluation script, `LeRobotDataset` behind a `DataLoader`.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from safetensors.torch import load_file, save_file
from serving import Say, Work, instructions, serve
from torch import Tensor

STATE, IMAGE, KEYPOINTS, ACTION = "observation.state", "observation.image", "observation.environment_state", "action"
FPS = 10


def build(settings: dict[str, Any], folder: Path) -> DiffusionPolicy:
    """A policy with random weights, which go to weights.safetensors.

    settings: image (whether there is a camera, or key points), channels, steps (DDIM). Vectors (biases, scales of
    normalisations) are moved from where they start, and the last layer is scaled so that its outputs spread over
    [-1, 1]: else two weights in each other's place could go unnoticed.
    """
    torch.manual_seed(0)
    features = {STATE: PolicyFeature(FeatureType.STATE, (2,))}
    if settings["image"]:
        features[IMAGE] = PolicyFeature(FeatureType.VISUAL, (3, 96, 96))
    else:
        features[KEYPOINTS] = PolicyFeature(FeatureType.ENV, (16,))
    config = DiffusionConfig(
        input_features=features,
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (2,))},
        crop_shape=(84, 84) if settings["image"] else None,
        down_dims=tuple(settings["channels"]),
        noise_scheduler_type="DDIM",
        num_inference_steps=settings.get("steps", 10),
        prediction_type="sample",
        # The defaults of 0.4.4, which are the paper's; later ones have others.
        horizon=16,
        n_action_steps=8,
        use_group_norm=True,
        use_separate_rgb_encoder_per_camera=False,
        pretrained_backbone_weights=None,
        device="cpu",
        push_to_hub=False,
    )
    policy = DiffusionPolicy(config).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        last = policy.diffusion.unet.final_conv[1]
        inputs = torch.randn(8, config.horizon, 2), torch.full((8,), 50)
        condition = torch.randn(8, policy.diffusion.unet.mid_modules[0].cond_encoder[1].in_features - 128)
        spread = policy.diffusion.unet(*inputs, global_cond=condition).std()
        for parameter in last.parameters():
            parameter.mul_(0.5 / spread)
    save_file(policy.state_dict(), folder / "weights.safetensors")
    # Where an estimate is clipped, diffusers goes on with the noise of the unclipped one unless told otherwise.
    scheduler = policy.diffusion.noise_scheduler
    scheduler.step = functools.partial(scheduler.step, use_clipped_model_output=True)
    return policy


def load_inputs(settings: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """The row's inputs as lerobot's preprocessor would hand them over: normalised, images as floats."""
    given = load_file(folder / "inputs.safetensors")
    batch = {STATE: given["agent_pos"] / 256 - 1, ACTION: given["action"] / 256 - 1}
    if settings["image"]:
        batch[IMAGE] = given["image"].permute(0, 1, 4, 2, 3).float().div(127.5).sub(1).contiguous()
    else:
        batch[KEYPOINTS] = given["keypoint"] / 256 - 1
    return batch | {name: given[name] for name in ("noise", "times")}


def observations(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `generate_actions` takes: cameras stacked."""
    found = {key: batch[key] for key in (STATE, KEYPOINTS) if key in batch}
    if IMAGE in batch:
        found["observation.images"] = batch[IMAGE].unsqueeze(2)
    return found


class Chunk(Work):
    """One chunk for each row of the inputs, with the encoder or (part: denoise) without, or the encoder alone.

    One call of `denoise` is a whole chunk, and counts for its steps.
    """

    def __init__(self, settings: dict[str, Any], folder: Path, say: Say) -> None:
        self._policy = build(settings, folder)
        batch = load_inputs(settings, folder)
        self._noise, self._obs = batch["noise"], observations(batch)
        self._part = settings.get("part", "chunk")
        self.units = settings["steps"] if self._part == "denoise" else 1
        self._condition = self._embed()

    @torch.no_grad()
    def outputs(self) -> dict[str, Tensor]:
        model = self._policy.diffusion
        times = torch.full((len(self._noise),), 50)
        return {
            "embedding": self._condition,
            "output": model.unet(self._noise, times, global_cond=self._condition),
            "chunk": self._denoise(),
        }

    @torch.no_grad()
    def _embed(self) -> Tensor:
        return self._policy.diffusion._prepare_global_conditioning(self._obs)

    @torch.no_grad()
    def _denoise(self) -> Tensor:
        return self._policy.diffusion.conditional_sample(
            len(self._noise), global_cond=self._condition, noise=self._noise
        )

    @torch.no_grad()
    def call(self) -> None:
        if self._part == "chunk":
            self._policy.diffusion.generate_actions(self._obs, noise=self._noise)
        elif self._part == "denoise":
            self._denoise()
        else:
            self._embed()


class Train(Work):
    """A step of lerobot's training script on a batch that lies ready: loss, gradient, clipping, Adam, learning rate."""

    def __init__(self, settings: dict[str, Any], folder: Path, say: Say) -> None:
        from accelerate import Accelerator
        from lerobot.scripts.lerobot_train import update_policy
        from lerobot.utils.logging_utils import AverageMeter, MetricsTracker

        policy = build(settings, folder)
        batch = load_inputs(settings, folder)
        self._noise, self._times = batch.pop("noise"), batch.pop("times")
        self._batch = batch | {"action_is_pad": torch.zeros(batch[ACTION].shape[:2], dtype=torch.bool)}
        self._policy, size = policy, len(batch[ACTION])
        accelerator = Accelerator(cpu=True)
        preset = policy.config.get_optimizer_preset()
        optimizer = preset.build(policy.get_optim_params())
        scheduler = policy.config.get_scheduler_preset().build(optimizer, num_training_steps=100_000)
        meters = {name: AverageMeter(name) for name in ("loss", "grad_norm", "lr", "update_s")}
        tracker = MetricsTracker(size, size, 1, meters, accelerator=accelerator)
        prepared, optimizer, scheduler = accelerator.prepare(policy, optimizer, scheduler)
        self._step = functools.partial(
            update_policy,
            tracker,
            prepared,
            optimizer=optimizer,
            grad_clip_norm=preset.grad_clip_norm,
            accelerator=accelerator,
            lr_scheduler=scheduler,
        )

    def outputs(self) -> dict[str, Tensor]:
        """The loss for given noise and times, with the centre crop."""
        self._policy.eval()
        noise = mock.patch.object(torch, "randn", return_value=self._noise)
        with torch.no_grad(), noise, mock.patch.object(torch, "randint", return_value=self._times):
            loss, _ = self._policy.forward(self._batch)
        return {"loss": loss.reshape(1)}

    def call(self) -> None:
        self._step(batch=self._batch)


class Evaluate(Work):
    """lerobot's evaluation of `episodes` PushT episodes from images, `max_steps` steps at most, all at once."""

    def __init__(self, settings: dict[str, Any], folder: Path, say: Say) -> None:
        from lerobot.envs.configs import PushtEnv
        from lerobot.envs.factory import make_env, make_env_pre_post_processors
        from lerobot.policies.factory import make_pre_post_processors
        from lerobot.scripts.lerobot_eval import eval_policy

        self._policy = build(settings, folder)
        self._batch = load_inputs(settings, folder)
        config = PushtEnv(episode_length=settings["max_steps"])
        self._env = make_env(config, n_envs=settings["episodes"])["pusht"][0]
        span = {"min": torch.zeros(2), "max": torch.full((2,), 512.0)}
        half = torch.full((3, 1, 1), 0.5)
        before, after = make_pre_post_processors(
            self._policy.config, dataset_stats={STATE: span, ACTION: span, IMAGE: {"mean": half, "std": half}}
        )
        env_before, env_after = make_env_pre_post_processors(env_cfg=config, policy_cfg=self._policy.config)
        self._evaluate = functools.partial(
            eval_policy,
            env=self._env,
            policy=self._policy,
            env_preprocessor=env_before,
            env_postprocessor=env_after,
            preprocessor=before,
            postprocessor=after,
            n_episodes=settings["episodes"],
            start_seed=settings["seed"],
        )

    @torch.no_grad()
    def outputs(self) -> dict[str, Tensor]:
        noise, obs = self._batch["noise"], observations(self._batch)
        condition = self._policy.diffusion._prepare_global_conditioning(obs)
        chunk = self._policy.diffusion.conditional_sample(len(noise), global_cond=condition, noise=noise)
        return {"chunk": chunk}

    def call(self) -> None:
        self._evaluate()

    def close(self) -> None:
        self._env.close()


class Gather(Work):
    """Batches from a LeRobotDataset of H.264 video, by its faster decoder, through a DataLoader with two workers.

    A batch ends as the encoder takes it: two cropped frames and a chunk of actions. settings: data (folder of the
    arrays), batch, horizon, n_obs_steps, crop.
    """

    AHEAD = 2 * 2  # batches that two workers have ready after a pause
    least = 8

    def __init__(self, settings: dict[str, Any], folder: Path, say: Say) -> None:
        from torchvision.transforms import RandomCrop

        self.units, self._settings = settings["batch"], settings
        self._root = convert(Path(settings["data"]), say)
        self._crop = RandomCrop(settings["crop"])
        self._inputs = load_file(folder / "inputs.safetensors")
        rates = {}
        for decoder in ("torchcodec", "pyav"):
            self._start(decoder)
            try:
                self._next()
                rates[decoder] = 4 / self.time(4)
            except Exception as error:
                say(f"lerobot cannot decode with {decoder}: {error}")
            self.close()
        best = max(rates, key=lambda decoder: rates[decoder])
        self.note = f"lerobot decodes with {best}" + "".join(
            f" ({decoder}: {rate / rates[best]:.2f} of its rate)" for decoder, rate in rates.items() if decoder != best
        )
        self._start(best)

    def _start(self, decoder: str) -> None:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        past = 1 - self._settings["n_obs_steps"]
        self._dataset = LeRobotDataset(
            "local/benchmark",
            root=self._root,
            video_backend=decoder,
            delta_timestamps={
                **{key: [step / FPS for step in range(past, 1)] for key in (IMAGE, STATE)},
                ACTION: [step / FPS for step in range(past, past + self._settings["horizon"])],
            },
        )
        self._batches = self._loader(self._order())

    def _order(self) -> list[int]:
        """Rows to act at, in random order, more of them than are ever taken."""
        now = self._inputs["now"]
        return now[torch.randint(len(now), (1_000_000,), generator=torch.Generator().manual_seed(0))].tolist()

    def _loader(self, order: list[int]) -> Iterator[dict[str, Any]]:
        loader = torch.utils.data.DataLoader(
            self._dataset, batch_size=self.units, sampler=order, num_workers=2, prefetch_factor=2
        )
        return iter(loader)

    def _next(self) -> tuple[Tensor, Tensor]:
        batch = next(self._batches)
        return self._crop(batch[IMAGE]), batch[ACTION]

    def outputs(self) -> dict[str, Tensor]:
        """Frames (whole) and actions of the rows `checked`."""
        items = next(self._loader(self._inputs["checked"].tolist()))
        return {"image": items[IMAGE], "action": items[ACTION]}

    def time(self, calls: int) -> float:
        """Seconds for `calls` batches, beside those that were read ahead while nobody asked."""
        for _ in range(self.AHEAD):
            self._next()
        began = time.perf_counter()
        for _ in range(calls):
            self._next()
        return time.perf_counter() - began

    def close(self) -> None:
        self._batches = iter(())  # ends the loader's processes


def convert(data: Path, say: Say) -> Path:
    """The arrays in `data` as a LeRobotDataset beside them, made once."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = data / f"lerobot-{metadata.version('lerobot')}"
    if root.exists():
        return root
    partial = data / f".{root.name}.{os.getpid()}.partial"
    images, state, action = (np.load(data / f"{name}.npy", mmap_mode="r") for name in ("image", "state", "action"))
    ends = np.load(data / "episode_ends.npy").tolist()
    features = {
        IMAGE: {"dtype": "video", "shape": images.shape[1:], "names": ["height", "width", "channels"]},
        STATE: {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
        ACTION: {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
    }
    dataset = LeRobotDataset.create(
        "local/benchmark", fps=FPS, features=features, root=partial, streaming_encoding=True, **_h264()
    )
    said = time.monotonic()
    for episode, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
        for row in range(first, end):
            frame = {IMAGE: images[row], STATE: state[row, :2], ACTION: action[row]}
            dataset.add_frame({key: np.array(value) for key, value in frame.items()} | {"task": "push the T"})
        dataset.save_episode()
        if time.monotonic() - said > 10:
            said = time.monotonic()
            say(f"converting to lerobot's format, once: {math.floor(100 * (episode + 1) / len(ends))} %")
    dataset.finalize()
    partial.rename(root)
    return root


def _h264() -> dict[str, Any]:
    """How `LeRobotDataset.create` is told to encode H.264."""
    try:
        from lerobot.configs.video import RGBEncoderConfig  # since 0.6
    except ImportError:
        return {"vcodec": "h264"}
    return {"rgb_encoder": RGBEncoderConfig(vcodec="h264")}


def about() -> dict[str, Any]:
    """Versions, threads, device, and the instructions that torch may use."""
    names = ("lerobot", "torch", "torchvision", "diffusers", "torchcodec", "av", "numpy", "gym-pusht", "pymunk")
    versions = {name: metadata.version(name) for name in names}
    threads = {"threads": torch.get_num_threads(), "device": "cpu", "instructions": instructions()}
    return {"python": platform.python_version(), **versions, **threads}


if __name__ == "__main__":
    json.dumps(about())  # what is missing is said before the first order
    serve({"chunk": Chunk, "train": Train, "evaluate": Evaluate, "gather": Gather}, about)
