"""A folder of lerobot's as a bundle, and a bundle as such a folder.

config.json                    what the policy is made of
model.safetensors              its weights (and before 0.4 its normalisation)
policy_preprocessor.json, policy_postprocessor.json, and the .safetensors that they name: its normalisation
train_config.json              of a checkpoint: may say at what rate it acts in its simulator
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from action_diffusion.datasets.formats.lerobot.names import keys_for
from action_diffusion.errors import InputError
from action_diffusion.policy.bundle import versions
from action_diffusion.policy.interchange.contract import UNKNOWN_RATE, Foreign, PolicyFormat
from action_diffusion.policy.interchange.lerobot.export import write
from action_diffusion.policy.interchange.lerobot.statistics import (
    BEFORE,
    Normalisation,
    Pipeline,
    of_pixels,
    of_vector,
    read_pipelines,
)
from action_diffusion.policy.interchange.lerobot.theirs import ACTION, ENVIRONMENT, STATE, Config, read_config
from action_diffusion.policy.interchange.lerobot.weights import from_lerobot, order
from action_diffusion.policy.reading import read_json
from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec

INSIDE = "pretrained_model"
"""Where a checkpoint of lerobot's training has the policy."""
PLAIN = {"mean": [0.5] * 3, "std": [0.5] * 3}
"""Of pixels, what the encoder does to those that nothing is said of: [0, 1] to [−1, 1]."""


def holds(path: Path) -> bool:
    """Whether a policy of lerobot's lies at `path`: a config.json that says of what type it is."""
    file = _folder(path) / "config.json"
    try:
        data = read_json(file) if file.is_file() else {}
    except InputError:
        return False
    return "input_features" in data or "input_shapes" in data


def read(path: Path) -> Foreign:
    """See `PolicyFormat.read`."""
    folder = _folder(path)
    config = read_config(folder / "config.json")
    weights = _weights(folder / "model.safetensors")
    pipeline = read_pipelines(folder, config, weights)
    names = _names(config, pipeline)
    spec = _spec(config, pipeline, names, _rate(folder))
    parts = [(key, value.shape[0]) for key, value in spec.observations.items() if value.kind == "state"]
    parts += [(key, 2 * config.spatial_softmax_num_keypoints) for key in spec.camera_order]
    there = sorted(parts, key=lambda part: [STATE, *config.cameras, ENVIRONMENT].index(names[part[0]]))
    columns = order(parts, there, config.n_obs_steps)
    try:
        ours = from_lerobot({name: value for name, value in weights.items() if not name.startswith(BEFORE)}, columns)
    except InputError as error:
        raise InputError(f"{folder / 'model.safetensors'}: {error}") from None
    policy = _policy(config, pipeline, names, batch_norm=any(name.endswith("running_var") for name in ours))
    kept = {"policy": policy, "imported": {"format": LEROBOT.name, "names": names}}
    return Foreign(spec, kept, ours, (*_said(config, spec, names), *pipeline.said))


def _folder(path: Path) -> Path:
    inside = path / INSIDE
    return inside if inside.is_dir() and not (path / "config.json").is_file() else path


def _weights(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: not a readable safetensors file: {error}") from None


def _rate(folder: Path) -> float:
    """Hz, from the simulator that it was trained for, or from the `info.json` of its data where that lies here."""
    for name, section in (("train_config.json", "env"), ("meta/info.json", None), ("info.json", None)):
        if (folder / name).is_file():
            data = read_json(folder / name)
            said = data.get(section) if section else data
            rate = said.get("fps") if isinstance(said, dict) else None
            if isinstance(rate, int | float) and not isinstance(rate, bool) and rate > 0:
                return float(rate)
    return UNKNOWN_RATE


def _names(config: Config, pipeline: Pipeline) -> dict[str, str]:
    """Our key → the name that lerobot's policy has for it; keys as those of a data set that is converted."""
    seen = [name for name in (STATE, ENVIRONMENT, *config.cameras) if name in config.input_features]
    outside = {policy: data for data, policy in pipeline.renamed.items()}
    keys = keys_for(outside.get(name, name) for name in seen)
    return {keys[outside.get(name, name)]: name for name in seen}


def _spec(config: Config, pipeline: Pipeline, names: Mapping[str, str], rate: float) -> PolicySpec:
    observations, normalizer = {}, {}
    for key, name in names.items():
        feature = config.input_features[name]
        if feature.type == "VISUAL":
            shape = (*feature.shape[1:], 3)
            observations[key] = ObservationSpec(shape=shape, dtype="uint8", unit="0-255", kind="image", source=key)
        else:
            observations[key] = ObservationSpec(shape=tuple(feature.shape), source=key)
            normalizer[key] = of_vector(pipeline.keys[name], feature.shape[0], action=False)
    action = config.output_features[ACTION].shape
    normalizer[ACTION] = of_vector(pipeline.keys[ACTION], action[0], action=True)
    return PolicySpec(
        observations=observations,
        action=ActionSpec(shape=tuple(action)),
        n_obs_steps=config.n_obs_steps,
        horizon=config.horizon,
        n_action_steps=config.n_action_steps,
        control_rate=rate,
        normalizer=normalizer,
        versions=versions(),
    )


def _policy(config: Config, pipeline: Pipeline, names: Mapping[str, str], *, batch_norm: bool) -> dict[str, Any]:
    """The section `policy` of the bundle's configuration."""
    ddim = {"eta": 0.0, "use_clipped_model_output": False} if config.noise_scheduler_type == "DDIM" else {}
    kinds = {
        key: of_vector(pipeline.keys[name], 1, action=False)["kind"] for key, name in names.items() if name in VECTORS
    }
    return {
        "normalizer": {"default": "minmax", **kinds, ACTION: of_vector(pipeline.keys[ACTION], 1, action=True)["kind"]},
        "encoder": _encoder(config, pipeline.keys, names, batch_norm) if config.cameras else {"name": "observation"},
        "denoiser": {
            "name": "unet1d",
            "channels": config.down_dims,
            "kernel_size": config.kernel_size,
            "n_groups": config.n_groups,
            "time_dim": config.diffusion_step_embed_dim,
            "activation": "mish",
        },
        "process": {
            "name": "diffusion",
            "prediction": config.prediction_type,
            "num_train_timesteps": config.num_train_timesteps,
            "beta_schedule": config.beta_schedule,
            "beta_start": config.beta_start,
            "beta_end": config.beta_end,
        },
        "sampler": {
            "scheduler": config.noise_scheduler_type.lower(),
            "num_inference_steps": config.num_inference_steps or config.num_train_timesteps,
            "timestep_spacing": "leading",
            "clip": "x0" if config.clip_sample else None,
            "clip_range": config.clip_sample_range,
            "clip_to": "unit",
            **ddim,
        },
        "objective": {"name": "denoising", "loss": "mse", "loss_on_padding": not config.do_mask_loss_for_padding},
    }


VECTORS = (STATE, ENVIRONMENT)


def _encoder(
    config: Config, keys: Mapping[str, Normalisation], names: Mapping[str, str], batch_norm: bool
) -> dict[str, Any]:
    pixels = {key: of_pixels(keys[name]) for key, name in names.items() if name in config.cameras}
    size = config.resize_shape or next(iter(config.cameras.values())).shape[1:]
    crop, corner = config.crop, None
    if crop is not None:  # torchvision rounds halves to even, and half a pixel is left out below and right here
        middle = [round((side - cut) / 2) for side, cut in zip(size, crop, strict=True)]
        corner = None if middle == [(side - cut) // 2 for side, cut in zip(size, crop, strict=True)] else middle
    return {
        "name": "observation",
        "backbone": config.vision_backbone,
        "pooling": "spatial_softmax",
        "keypoints": config.spatial_softmax_num_keypoints,
        "feature_dim": 2 * config.spatial_softmax_num_keypoints,
        "resize": config.resize_shape,
        "crop": crop,
        "crop_at": corner,
        "share": not config.use_separate_rgb_encoder_per_camera,
        "norm": "frozen_batch" if batch_norm else "group",
        "group_norm_channels": 16,
        "pixels": {key: value for key, value in pixels.items() if value != PLAIN} or None,
    }


def _said(config: Config, spec: PolicySpec, names: Mapping[str, str]) -> tuple[str, ...]:
    said = [f"{name} there is {key} here" for key, name in names.items()]
    if config.cameras:
        said.append("pictures are [3, height, width] from 0 to 1 there, uint8 [height, width, 3] from 0 to 255 here")
        if not config.use_group_norm:
            said.append("BatchNorm is frozen: its statistics stay as they are, in further training as well")
        if config.crop is not None and not config.crop_is_random:
            said.append("crop_is_random=false has no counterpart: crops are random in further training")
    if not config.use_film_scale_modulation:
        said.append("FiLM only shifts there; here it also scales, by 1, and further training learns that as well")
    for key in config.input_features:
        if key not in names.values():
            said.append(f"{key} is among lerobot's inputs and not seen by its policy")
    for key, statistics in spec.normalizer.items():
        if statistics.get("min") is not None and any(map(float.__eq__, statistics["min"], statistics["max"])):
            said.append(f"{key} has dimensions that never changed: where they do, lerobot's numbers become very large")
    return tuple(said)


LEROBOT = PolicyFormat("lerobot", holds, read, write)
