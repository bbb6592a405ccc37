"""A bundle as a folder that lerobot 0.4.4 and 0.6.1 load, where their diffusion policy can compute the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path
from action_diffusion.policy.interchange.lerobot.statistics import (
    BATCH,
    DEVICE,
    EPS,
    NORMALIZE,
    POSTPROCESSOR,
    PREPROCESSOR,
    RENAME,
    UNNORMALIZE,
)
from action_diffusion.policy.interchange.lerobot.theirs import ACTION, ENVIRONMENT, STATE, VERSIONS, encoded
from action_diffusion.policy.interchange.lerobot.weights import order, to_lerobot
from action_diffusion.policy.model.denoisers.unet import ConditionalUnet1d
from action_diffusion.policy.model.encoders.encoder import ObservationEncoder
from action_diffusion.policy.policy import DiffusionPolicy

IMAGES = "observation.images."
TRAIN = "docs/interchange.md has the command that trains one for it"


class Features(NamedTuple):
    """lerobot's name → our keys, whose values are one after the other in it."""

    cameras: dict[str, str]
    vectors: dict[str, list[str]]


def write(
    policy: DiffusionPolicy, config: Mapping[str, Any], path: Path, options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """See `PolicyFormat.write`. Raises `InputError` naming the part that lerobot's diffusion policy does not have."""
    _require(policy, config["policy"])
    features = _features(policy, (config.get("imported") or {}).get("names") or {})
    modes, before, after = _statistics(policy, features, config["policy"]["encoder"])
    shapes = _shapes(policy, features)
    encoder = cast(ObservationEncoder, policy.encoder)
    separate = len(encoder.cameras) > 1
    wide = 2 * _keypoints(config["policy"]["encoder"])
    here = [*encoder.state_dims.items(), *((key, wide) for key in encoder.image_keys)]
    vectors = [
        [(key, encoder.state_dims[key]) for key in features.vectors.get(name, ())] for name in (STATE, ENVIRONMENT)
    ]
    there = [*vectors[0], *((key, wide) for key in features.cameras.values()), *vectors[1]]
    weights = to_lerobot(policy.state_dict(), order(here, there, policy.spec.n_obs_steps), separate=separate)
    described = encoded(
        {
            "input_features": {name: shapes[name] for name in shapes if name != ACTION},
            "output_features": {ACTION: shapes[ACTION]},
            "normalization_mapping": modes,
            "use_separate_rgb_encoder_per_camera": separate,
            **_network(policy, config["policy"]),
        }
    )
    with atomic_path(path) as folder:
        folder.mkdir()
        _json(folder / "config.json", described)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        _pipelines(folder, shapes, modes, before, after)
    return _told(path, features, config)


def _require(policy: DiffusionPolicy, config: Mapping[str, Any]) -> None:
    """`InputError` for the first part that computes what lerobot's policy cannot."""
    spec, sampler, encoder = policy.spec, policy.sampler, policy.encoder
    process, denoiser = config["process"], policy.denoiser
    shared: list[tuple[bool, str, str]] = [
        (not policy.features, "policy.features", "no features of states"),
        (policy.action_frame is None, "policy.action_frame", "actions in the data's own frame only"),
        (policy.estimator is None, "policy.estimator", "no estimated states"),
        (not spec.action.rotations, "the action's rotations", "no rotations that are kept valid"),
        (not any(value.rotations for value in spec.states.values()), "a state's rotations", "no such states"),
        (not spec.texts, "an observation that is words", "no words"),
        (not spec.depths, "an observation that is depth", "colours"),
        (not spec.points, "an observation that is points", "colours"),
        (not policy.objective.two_times, "policy.objective", "a denoiser that is told one time"),
        (not policy.max_delay, "policy.objective.max_delay", "no fixed steps"),
        (type(encoder) is ObservationEncoder, "policy.encoder", "its own encoder"),
        (type(denoiser) is ConditionalUnet1d, "policy.denoiser", "the U-Net"),
        (process["name"] == "diffusion", "policy.process", "diffusion"),
        (policy.process.prediction in ("epsilon", "sample"), "policy.process.prediction", "epsilon and sample"),
        (sampler.scheduler in ("ddpm", "ddim"), "sampler.scheduler", "ddpm and ddim"),
    ]
    for fits, part, has in shared:
        if not fits:
            raise InputError(f"{part} has no counterpart in lerobot's diffusion policy, which has {has}: {TRAIN}")
    _require_unet(cast(ConditionalUnet1d, denoiser), spec.horizon)
    _require_sampler(policy, config["sampler"], config["process"])
    if cast(ObservationEncoder, encoder).image_keys:
        _require_encoder(cast(ObservationEncoder, encoder), config["encoder"])
    elif cast(ObservationEncoder, encoder).context is not None:
        raise InputError("policy.encoder.context has no counterpart in lerobot's diffusion policy")
    if len(cast(ObservationEncoder, encoder).series):
        raise InputError("policy.encoder.series has no counterpart in lerobot's diffusion policy")


def _require_unet(unet: ConditionalUnet1d, horizon: int) -> None:
    if unet.activation != "mish":
        raise InputError(f"policy.denoiser.activation={unet.activation}: lerobot's U-Net has mish: {TRAIN}")
    if unet.n_groups != 8:
        raise InputError(f"policy.denoiser.n_groups={unet.n_groups}: the last block of lerobot's U-Net has 8")
    if horizon % 2 ** len(unet.channels):
        raise InputError(
            f"horizon={horizon}: lerobot takes multiples of {2 ** len(unet.channels)} for {len(unet.channels)} levels"
        )


def _require_sampler(policy: DiffusionPolicy, sampler: Mapping[str, Any], process: Mapping[str, Any]) -> None:
    own, total = policy.sampler, process.get("num_train_timesteps", 100)
    ratio = total // own.num_inference_steps
    leading = [float(ratio * i) for i in reversed(range(own.num_inference_steps))]
    if [step.time for step in own.steps] != leading:
        raise InputError(
            f"sampler.timestep_spacing={sampler.get('timestep_spacing') or 'trailing'}: lerobot's steps are others: "
            "sampler.timestep_spacing=leading"
        )
    if own.scheduler == "ddim" and own.options.get("eta"):
        raise InputError(f"sampler.eta={own.options['eta']}: lerobot has 0: sampler.eta=0")
    if own.scheduler == "ddpm" and (own.options.get("variance_type") or "fixed_small") != "fixed_small":
        raise InputError(f"sampler.variance_type={own.options['variance_type']}: lerobot has fixed_small")
    if own.clip == "x":
        raise InputError("sampler.clip=x: lerobot clips the estimate of the clean chunk: sampler.clip=x0")
    if own.clip == "x0" and own.scheduler == "ddim" and not own.solver.keeps_noise:
        raise InputError(
            "sampler.use_clipped_model_output=true: lerobot keeps the noise of the estimate before it is clipped: "
            "sampler.use_clipped_model_output=false"
        )
    if own.clip == "x0" and own.bounds is not None:
        raise InputError(
            "sampler.clip_to=demonstrated: lerobot clips all dimensions at one normalised value: sampler.clip_to=unit"
        )


def _require_encoder(encoder: ObservationEncoder, config: Mapping[str, Any]) -> None:
    wanted = {"width": 1.0, "stages": 4, "pooling": "spatial_softmax", "group_norm_channels": 16, "context": None}
    for option, value in wanted.items():
        if (found := config.get(option, value)) != value and not (option[:5] == "group" and _frozen(config)):
            raise InputError(f"policy.encoder.{option}={found}: lerobot's encoder has {value}")
    if config.get("feature_dim", 64) != 2 * _keypoints(config):
        raise InputError(
            f"policy.encoder.feature_dim={config.get('feature_dim', 64)}: lerobot's is twice encoder.keypoints="
            f"{_keypoints(config)}"
        )
    sizes = {shape[:2] for shape in encoder.image_shapes.values()}
    if len(sizes) > 1:
        raise InputError(f"cameras of {len(sizes)} sizes: lerobot takes pictures of one size")
    size = encoder.resize or sizes.pop()
    if encoder.crop is None:
        return
    gap = [side - cut for side, cut in zip(size, encoder.crop, strict=True)]
    corner = list(encoder.crop_at or [space // 2 for space in gap])
    if corner != [round(space / 2) for space in gap]:
        raise InputError(f"policy.encoder.crop is cut at {corner}, by lerobot at {[round(space / 2) for space in gap]}")
    if encoder.resize is not None and crop_ratio(size, encoder.crop) is None:
        raise InputError(
            f"policy.encoder.crop={list(encoder.crop)} of resize={list(size)}: lerobot cuts one share of both sides"
        )


def crop_ratio(size: Sequence[int], crop: Sequence[int]) -> float | None:
    """The share r of both sides for which int(r · side) is what is cut; None where there is none below 1."""
    low = max(cut / side for cut, side in zip(crop, size, strict=True))
    high = min((cut + 1) / side for cut, side in zip(crop, size, strict=True))
    ratio = (low + min(high, 1.0)) / 2
    fits = ratio < 1 and all(int(side * ratio) == cut for cut, side in zip(crop, size, strict=True))
    return ratio if fits else None


def _keypoints(config: Mapping[str, Any]) -> int:
    return int(config.get("keypoints", 32))


def _frozen(config: Mapping[str, Any]) -> bool:
    return bool(config.get("norm") == "frozen_batch")


def _features(policy: DiffusionPolicy, names: Mapping[str, str]) -> Features:
    """Names as they were where the policy was lerobot's; else states are `observation.state`, and those after the first
    `observation.environment_state` where there is no camera, which lerobot wants one or the other of."""
    keys = [key for key, value in policy.spec.observations.items() if value.kind == "state"]
    cameras = {names.get(key, IMAGES + key.replace("/", ".")): key for key in policy.spec.camera_order}
    vectors: dict[str, list[str]] = {}
    for i, key in enumerate(keys):
        beside = key == ENVIRONMENT.rpartition(".")[2] or (not cameras and i > 0)
        vectors.setdefault(names.get(key, ENVIRONMENT if beside else STATE), []).append(key)
    if STATE not in vectors:
        raise InputError(f"the policy sees no state: lerobot's needs {STATE}")
    if not cameras and ENVIRONMENT not in vectors:
        raise InputError(
            f"the policy sees {', '.join(keys)} alone: lerobot's needs a picture or {ENVIRONMENT} beside it"
        )
    return Features(cameras, vectors)


def _shapes(policy: DiffusionPolicy, features: Features) -> dict[str, dict[str, Any]]:
    """lerobot's features by name, in the order that it puts them in."""
    spec, sizes = policy.spec, cast(ObservationEncoder, policy.encoder).state_dims
    types = {STATE: "STATE", ENVIRONMENT: "ENV"}
    shapes: dict[str, dict[str, Any]] = {
        name: {"type": types[name], "shape": [sum(sizes[key] for key in keys)]}
        for name, keys in features.vectors.items()
    }
    for name, key in features.cameras.items():
        height, width, channels = spec.observations[key].shape
        shapes[name] = {"type": "VISUAL", "shape": [channels, height, width]}
    return {**shapes, ACTION: {"type": "ACTION", "shape": list(spec.action.shape)}}


def _statistics(
    policy: DiffusionPolicy, features: Features, encoder: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, Tensor], dict[str, Tensor]]:
    """Modes by type, and the statistics of both processors: for what goes in, and for the action that comes out."""
    statistics = policy.spec.normalizer
    modes, before, after = {"VISUAL": "MEAN_STD"}, dict[str, Tensor](), dict[str, Tensor]()
    keyed = {**features.vectors, ACTION: [ACTION]}
    for name, type_ in ((STATE, "STATE"), (ENVIRONMENT, "ENV"), (ACTION, "ACTION")):
        if name not in keyed:
            continue
        modes[type_], numbers = _vector([statistics[key] for key in keyed[name]])
        before |= {f"{name}.{key}": torch.tensor(value, dtype=torch.float32) for key, value in numbers.items()}
    value = policy.normalizer.unnormalize(ACTION, torch.zeros(policy.spec.action.shape, device=policy.device)).cpu()
    constant = value == policy.normalizer.unnormalize(ACTION, torch.ones_like(value).to(policy.device)).cpu()
    for name in [name for name in before if name.startswith(f"{ACTION}.")]:
        after[name] = torch.where(constant, 0.0 if name.endswith("std") else value, before[name])
    for name, key in features.cameras.items():
        pixels = (encoder.get("pixels") or {}).get(key) or {"mean": [0.5] * 3, "std": [0.5] * 3}
        for part in ("mean", "std"):
            constant = torch.tensor(pixels[part], dtype=torch.float64) - (EPS if part == "std" else 0.0)
            before[f"{name}.{part}"] = constant.float().view(3, 1, 1)
    return modes, before, after


def _vector(parts: Sequence[Mapping[str, Any]]) -> tuple[str, dict[str, np.ndarray]]:
    """The mode and the statistics that do what ours do, of several keys one after the other."""
    scale, offset = (
        np.concatenate([np.asarray(part[name], np.float64) for part in parts]) for name in ("scale", "offset")
    )
    kinds = {part.get("kind", "minmax") for part in parts}
    if kinds == {"minmax"}:
        return "MIN_MAX", {"min": (-1 - offset) / scale, "max": (1 - offset) / scale}
    return "IDENTITY" if kinds == {"identity"} else "MEAN_STD", {"mean": -offset / scale, "std": 1 / scale}


def _network(policy: DiffusionPolicy, config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of lerobot's that say what is computed."""
    spec, sampler = policy.spec, policy.sampler
    unet, encoder = cast(ConditionalUnet1d, policy.denoiser), cast(ObservationEncoder, policy.encoder)
    process, network = config["process"], config["encoder"]
    resized = encoder.resize is not None and bool(encoder.image_keys)
    shared = crop_ratio(encoder.resize, encoder.crop) if encoder.resize and encoder.crop and resized else 1.0
    return {
        "n_obs_steps": spec.n_obs_steps,
        "horizon": spec.horizon,
        "n_action_steps": spec.n_action_steps,
        "drop_n_last_frames": max(0, spec.horizon - spec.n_action_steps - spec.n_obs_steps + 1),
        "vision_backbone": network.get("backbone", "resnet18"),
        "resize_shape": list(encoder.resize) if encoder.resize is not None and resized else None,
        "crop_ratio": shared,
        "crop_shape": list(encoder.crop) if encoder.crop is not None and encoder.image_keys else None,
        "crop_is_random": True,
        "use_group_norm": not _frozen(network),
        "spatial_softmax_num_keypoints": _keypoints(network),
        "down_dims": list(unet.channels),
        "kernel_size": unet.kernel_size,
        "n_groups": unet.n_groups,
        "diffusion_step_embed_dim": unet.time_embedding[1].in_features,
        "use_film_scale_modulation": True,
        "noise_scheduler_type": sampler.scheduler.upper(),
        "num_train_timesteps": process.get("num_train_timesteps", 100),
        "beta_schedule": process.get("beta_schedule", "squaredcos_cap_v2"),
        "beta_start": process.get("beta_start", 1e-4),
        "beta_end": process.get("beta_end", 0.02),
        "prediction_type": policy.process.prediction,
        "clip_sample": sampler.clip == "x0",
        "clip_sample_range": sampler.clip_range,
        "num_inference_steps": sampler.num_inference_steps,
        "do_mask_loss_for_padding": not policy.objective.loss_on_padding,
    }


def _pipelines(
    folder: Path,
    shapes: Mapping[str, Mapping[str, Any]],
    modes: Mapping[str, str],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
) -> None:
    """The two processors and the statistics that they name, as both versions write them."""
    device = {"registry_name": DEVICE, "config": {"device": "cpu", "float_dtype": None}}

    def normalise(
        file: str, index: int, name: str, known: Mapping[str, Any], state: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        held = f"{file.removesuffix('.json')}_step_{index}_{name}.safetensors"
        save_file(dict(state), folder / held)
        return {
            "registry_name": name,
            "config": {"eps": EPS, "features": dict(known), "norm_map": dict(modes)},
            "state_file": held,
        }

    into = [
        {"registry_name": RENAME, "config": {"rename_map": {}}},
        {"registry_name": BATCH, "config": {}},
        device,
        normalise(PREPROCESSOR, 3, NORMALIZE, shapes, before),
    ]
    out = [normalise(POSTPROCESSOR, 0, UNNORMALIZE, {ACTION: shapes[ACTION]}, after), device]
    for file, steps in ((PREPROCESSOR, into), (POSTPROCESSOR, out)):
        _json(folder / file, {"name": file.removesuffix(".json"), "steps": steps})


def _json(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _told(path: Path, features: Features, config: Mapping[str, Any]) -> dict[str, Any]:
    told = {"folder": path, "loads in": VERSIONS}
    for name, keys in {**features.vectors, **{name: [key] for name, key in features.cameras.items()}}.items():
        told[name] = " and ".join(keys)
    if config.get("extensions"):
        told["not exported"] = "the extensions " + ", ".join(config["extensions"])
    return told
