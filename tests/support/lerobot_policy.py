"""lerobot's diffusion policy as its code and files describe it, without lerobot: to import, and to compare with.

Modules have lerobot's names, so a `state_dict` is its model.safetensors. Each step calls diffusers as lerobot does.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from diffusers import DDIMScheduler, DDPMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

STATE, ENVIRONMENT, ACTION = "observation.state", "observation.environment_state", "action"
Config = dict[str, Any]
CONFIG: Config = {
    "type": "diffusion",
    "n_obs_steps": 2,
    "horizon": 16,
    "n_action_steps": 8,
    "drop_n_last_frames": 7,
    "normalization_mapping": {"VISUAL": "MEAN_STD", "STATE": "MIN_MAX", "ENV": "MIN_MAX", "ACTION": "MIN_MAX"},
    "vision_backbone": "resnet18",
    "resize_shape": None,
    "crop_ratio": 1.0,
    "crop_shape": None,
    "crop_is_random": True,
    "pretrained_backbone_weights": None,
    "use_group_norm": True,
    "spatial_softmax_num_keypoints": 4,
    "use_separate_rgb_encoder_per_camera": False,
    "down_dims": [32, 64],
    "kernel_size": 3,
    "n_groups": 8,
    "diffusion_step_embed_dim": 16,
    "use_film_scale_modulation": True,
    "noise_scheduler_type": "DDIM",
    "num_train_timesteps": 50,
    "beta_schedule": "squaredcos_cap_v2",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "num_inference_steps": 10,
    "do_mask_loss_for_padding": False,
    "device": "cpu",
}


def features(*, state: int = 2, environment: int = 0, cameras: int = 0, size: tuple[int, int] = (40, 48)) -> Config:
    """`input_features` and `output_features` of a policy that commands two values."""
    seen: dict[str, Any] = {STATE: {"type": "STATE", "shape": [state]}}
    for i in range(cameras):
        seen["observation.image" if cameras == 1 else f"observation.images.c{i}"] = {
            "type": "VISUAL",
            "shape": [3, *size],
        }
    if environment:
        seen[ENVIRONMENT] = {"type": "ENV", "shape": [environment]}
    return {"input_features": seen, "output_features": {ACTION: {"type": "ACTION", "shape": [2]}}}


class Block(nn.Module):
    def __init__(self, n_in: int, n_out: int, condition: int, config: Config):
        super().__init__()
        self.conv1, self.conv2 = Conv(n_in, n_out, config), Conv(n_out, n_out, config)
        self.scales = config["use_film_scale_modulation"]
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(condition, n_out * (2 if self.scales else 1)))
        self.residual_conv = nn.Conv1d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        out, film = self.conv1(x), self.cond_encoder(condition).unsqueeze(-1)
        if self.scales:
            scale, shift = film.chunk(2, dim=1)
            out = scale * out + shift
        else:
            out = out + film
        return self.conv2(out) + self.residual_conv(x)


class Conv(nn.Module):
    def __init__(self, n_in: int, n_out: int, config: Config):
        super().__init__()
        k = config["kernel_size"]
        self.block = nn.Sequential(nn.Conv1d(n_in, n_out, k, padding=k // 2), nn.GroupNorm(8, n_out), nn.Mish())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Times(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.n_rates = dim // 2

    def forward(self, times: Tensor) -> Tensor:
        rates = torch.exp(torch.arange(self.n_rates) * -(math.log(10000) / (self.n_rates - 1)))
        angles = times.unsqueeze(-1) * rates
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Unet(nn.Module):
    def __init__(self, config: Config, n_action: int, embedding: int):
        super().__init__()
        time, widths = config["diffusion_step_embed_dim"], config["down_dims"]
        self.diffusion_step_encoder = nn.Sequential(
            Times(time), nn.Linear(time, 4 * time), nn.Mish(), nn.Linear(4 * time, time)
        )
        pairs = list(zip([n_action, *widths[:-1]], widths, strict=True))
        condition = time + embedding

        def two(n_in: int, n_out: int) -> list[nn.Module]:
            return [Block(n_in, n_out, condition, config), Block(n_out, n_out, condition, config)]

        self.down_modules = nn.ModuleList(
            nn.ModuleList([*two(a, b), nn.Conv1d(b, b, 3, 2, 1) if b is not widths[-1] else nn.Identity()])
            for a, b in pairs
        )
        self.mid_modules = nn.ModuleList(two(widths[-1], widths[-1]))
        self.up_modules = nn.ModuleList(
            nn.ModuleList([*two(2 * b, a), nn.ConvTranspose1d(a, a, 4, 2, 1)]) for a, b in reversed(pairs[1:])
        )
        self.final_conv = nn.Sequential(Conv(widths[0], widths[0], config), nn.Conv1d(widths[0], n_action, 1))

    def forward(self, x: Tensor, times: Tensor, embedding: Tensor) -> Tensor:
        condition = torch.cat([self.diffusion_step_encoder(times), embedding], dim=-1)
        x, skipped = x.transpose(1, 2), []
        for first, second, resize in map(_three, self.down_modules):
            x = second(first(x, condition), condition)
            skipped.append(x)
            x = resize(x)
        for block in self.mid_modules:
            x = block(x, condition)
        for first, second, resize in map(_three, self.up_modules):
            x = resize(second(first(torch.cat([x, skipped.pop()], dim=1), condition), condition))
        return self.final_conv(x).transpose(1, 2)


def _three(level: nn.Module) -> Any:
    return level


class Softmax(nn.Module):
    def __init__(self, channels: int, height: int, width: int, keypoints: int):
        super().__init__()
        self.nets = nn.Conv2d(channels, keypoints, 1)
        x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
        self.register_buffer("pos_grid", torch.from_numpy(np.stack([x.ravel(), y.ravel()], axis=1)).float())

    def forward(self, maps: Tensor) -> Tensor:
        return self.nets(maps).flatten(2).softmax(dim=-1) @ self.pos_grid


class Encoder(nn.Module):
    def __init__(self, config: Config, size: list[int]):
        super().__init__()
        groups = (lambda n: nn.GroupNorm(n // 16, n)) if config["use_group_norm"] else None
        network = torchvision.models.resnet18(weights=None, norm_layer=groups)
        self.backbone = nn.Sequential(*list(network.children())[:-2])
        self.changes = nn.Sequential()
        crop = config["crop_shape"]
        if (resize := config["resize_shape"]) is not None:
            self.changes.append(torchvision.transforms.Resize(resize))
            crop, size = (
                [int(side * config["crop_ratio"]) for side in resize] if config["crop_ratio"] < 1 else None,
                resize,
            )
        if crop is not None:
            self.changes.append(torchvision.transforms.CenterCrop(crop))
            size = crop
        k = config["spatial_softmax_num_keypoints"]
        self.pool, self.out = Softmax(512, math.ceil(size[0] / 32), math.ceil(size[1] / 32), k), nn.Linear(2 * k, 2 * k)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.pool(self.backbone(self.changes(images))).flatten(1)).relu()


class Model(nn.Module):
    """`policy.diffusion`."""

    def __init__(self, config: Config):
        super().__init__()
        seen = config["input_features"]
        self.config, self.cameras = config, [key for key in seen if seen[key]["type"] == "VISUAL"]
        dim = sum(seen[key]["shape"][0] for key in (STATE, ENVIRONMENT) if key in seen)
        if self.cameras:
            size = seen[self.cameras[0]]["shape"][1:]
            separate = config["use_separate_rgb_encoder_per_camera"]
            self.rgb_encoder: Any = (
                nn.ModuleList(Encoder(config, size) for _ in self.cameras) if separate else Encoder(config, size)
            )
            dim += 2 * config["spatial_softmax_num_keypoints"] * len(self.cameras)
        self.unet = Unet(config, config["output_features"][ACTION]["shape"][0], dim * config["n_obs_steps"])

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """Normalised observations [To, …] → [1, To · D]."""
        parts = [batch[STATE]]
        for i, key in enumerate(self.cameras):
            several = isinstance(self.rgb_encoder, nn.ModuleList)
            parts.append((self.rgb_encoder[i] if several else self.rgb_encoder)(batch[key]))
        parts += [batch[ENVIRONMENT]] if ENVIRONMENT in batch else []
        return torch.cat(parts, dim=-1).flatten().unsqueeze(0)

    def sample(self, embedding: Tensor, noise: Tensor) -> Tensor:
        config = self.config
        kind: Any = DDIMScheduler if config["noise_scheduler_type"] == "DDIM" else DDPMScheduler
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "clip_sample", "clip_sample_range")
        scheduler = kind(**{name: config[name] for name in names}, prediction_type=config["prediction_type"])
        scheduler.set_timesteps(config["num_inference_steps"] or config["num_train_timesteps"])
        for time in scheduler.timesteps:
            output = self.unet(noise, time.expand(1).to(noise.dtype), embedding)
            noise = scheduler.step(output, time, noise).prev_sample
        return noise


class LeRobotPolicy(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.diffusion = Model(config)

    @torch.no_grad()
    def chunk(self, obs: dict[str, Tensor], noise: Tensor, norm: Any) -> Tensor:
        """The chunk [Ta, A] that is executed. obs: by lerobot's names, pictures uint8. norm: of `normalisations`."""
        config = self.diffusion.config
        batch = {}
        for key, value in obs.items():
            if value.dtype == torch.uint8:
                value = value.permute(0, 3, 1, 2).float() / 255
            batch[key] = norm(key, value)
        torch.manual_seed(0)
        actions = self.diffusion.sample(self.diffusion.embed(batch), noise)[0]
        now = config["n_obs_steps"] - 1
        return norm(ACTION, actions[now : now + config["n_action_steps"]], inverse=True)


def made(config: Config, seed: int = 0) -> LeRobotPolicy:
    """With random weights, of which none are 0 or 1 by rule."""
    torch.manual_seed(seed)
    policy = LeRobotPolicy(config).eval()
    with torch.no_grad():
        for name, value in (*policy.named_parameters(), *policy.named_buffers()):
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.ndim == 1:
                value.add_(0.1 * torch.randn_like(value))
    return policy


def statistics(config: Config, seed: int = 1) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(seed)
    found = {}
    for key, feature in {**config["input_features"], **config["output_features"]}.items():
        shape = (feature["shape"][0], *(() if feature["type"] != "VISUAL" else (1, 1)))
        low, spread = 0.3 * torch.rand(shape), 0.2 + torch.rand(shape)
        found[key] = {"min": low, "max": low + spread, "mean": low + spread / 2, "std": spread / 3}
        found[key] |= {"q01": low + spread / 9, "q99": low + spread / 2}
    return found


def write(folder: Path, policy: LeRobotPolicy, stats: dict[str, dict[str, Tensor]], *, before_04: bool = False) -> None:
    """A folder of lerobot's, with the normalisation in files of the processors, or among the weights."""
    config, weights = policy.diffusion.config, policy.state_dict()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if before_04:
        for key, numbers in stats.items():
            for start in ("normalize_targets", "unnormalize_outputs") if key == ACTION else ("normalize_inputs",):
                for name, value in numbers.items():
                    weights[f"{start}.buffer_{key.replace('.', '_')}.{name}"] = value.clone()
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    if before_04:
        return
    known = {**config["input_features"], **config["output_features"]}
    state = {f"{key}.{name}": value for key, numbers in stats.items() for name, value in numbers.items()}
    common = {"eps": 1e-8, "norm_map": config["normalization_mapping"]}
    for side, name, steps, keys in (
        ("policy_preprocessor", "normalizer_processor", ["rename_observations_processor", "to_batch_processor"], known),
        ("policy_postprocessor", "unnormalizer_processor", [], config["output_features"]),
    ):
        save_file({key: value.clone() for key, value in state.items()}, folder / f"{side}.safetensors")
        described = {"registry_name": name, "config": {**common, "features": keys}, "state_file": f"{side}.safetensors"}
        plain: list[Config] = [{"registry_name": step, "config": {}} for step in steps]
        (folder / f"{side}.json").write_text(json.dumps({"name": side, "steps": [*plain, described]}))


def normalisation(modes: dict[str, str], known: dict[str, Config], stats: dict[str, dict[str, Tensor]]) -> Any:
    """lerobot's arithmetic. stats: for what goes in; those of the action for what comes out."""
    ends = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99")}

    def norm(key: str, value: Tensor, inverse: bool = False) -> Tensor:
        mode, numbers = modes.get(known[key]["type"], "IDENTITY"), stats.get(key, {})
        if mode == "IDENTITY" or not numbers:
            return value
        if mode == "MEAN_STD":
            mean, std = numbers["mean"], numbers["std"]
            return value * std + mean if inverse else (value - mean) / (std + 1e-8)
        low, high = (numbers[name] for name in ends[mode])
        span = torch.where(high == low, torch.full_like(high, 1e-8), high - low)
        return (value + 1) / 2 * span + low if inverse else 2 * (value - low) / span - 1

    return norm


def load(folder: Path) -> tuple[LeRobotPolicy, Any]:
    """A folder in today's layout, as lerobot reads it: the policy, and its normalisation."""
    config = json.loads((folder / "config.json").read_text())
    policy = LeRobotPolicy(CONFIG | config).eval()
    policy.load_state_dict(load_file(folder / "model.safetensors"))
    stats: dict[str, dict[str, Tensor]] = {}
    for side in ("policy_preprocessor", "policy_postprocessor"):
        step = next(s for s in json.loads((folder / f"{side}.json").read_text())["steps"] if "state_file" in s)
        found: dict[str, dict[str, Tensor]] = {}
        for name, value in load_file(folder / step["state_file"]).items():
            key, _, number = name.rpartition(".")
            found.setdefault(key, {})[number] = value
        stats |= found
    known = {**config["input_features"], **config["output_features"]}
    return policy, normalisation(config["normalization_mapping"], known, stats)
