"""What lerobot's `config.json` says, checked: the options of `DiffusionConfig` of 0.4.4 and 0.6.1."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from action_diffusion.errors import InputError, unknown
from action_diffusion.options.words import MOST_STEPS
from action_diffusion.policy.reading import read_json
from action_diffusion.schema import Above, Between, OneOf, Sized, check, hints, needed, shown

VERSIONS = "lerobot 0.4.4 and 0.6.1"
STATE, ENVIRONMENT, ACTION = "observation.state", "observation.environment_state", "action"
MODES = ("MIN_MAX", "MEAN_STD", "IDENTITY", "QUANTILES", "QUANTILE10")
Mode = Annotated[str, OneOf(*MODES)]
Count = Annotated[int, Between(1, 8192)]
Steps = Annotated[int, Between(1, MOST_STEPS)]
Size = Annotated[list[Count], Sized(2, 2)]


@dataclass
class Feature:
    """What a key is. shape: of one step; pictures are [channels, height, width]."""

    type: Annotated[str, OneOf("STATE", "VISUAL", "ENV", "ACTION", "REWARD", "LANGUAGE")]
    shape: Annotated[list[Annotated[int, Between(1, 100_000)]], Sized(1, 4)]


@dataclass(kw_only=True)
class Config:
    """What shapes the policy. Without a default: what they always write, and may have other defaults for."""

    input_features: Annotated[dict[str, Feature], Sized(1, 256)]
    output_features: Annotated[dict[str, Feature], Sized(1, 16)]
    normalization_mapping: dict[str, Mode]
    n_obs_steps: Steps
    horizon: Steps
    n_action_steps: Steps
    vision_backbone: str
    crop_shape: Size | None
    crop_is_random: bool
    use_group_norm: bool
    spatial_softmax_num_keypoints: Count
    use_separate_rgb_encoder_per_camera: bool
    down_dims: Annotated[list[Count], Sized(1, 8)]
    kernel_size: Annotated[int, Between(1, 63)]
    n_groups: Annotated[int, Between(1, 1024)]
    diffusion_step_embed_dim: Annotated[int, Between(4, 8192)]
    use_film_scale_modulation: bool
    noise_scheduler_type: Annotated[str, OneOf("DDPM", "DDIM")]
    num_train_timesteps: Annotated[int, Between(1, 10_000)]
    beta_schedule: Annotated[str, OneOf("linear", "scaled_linear", "squaredcos_cap_v2")]
    beta_start: Annotated[float, Above(0, 0.999)]
    beta_end: Annotated[float, Above(0, 0.999)]
    prediction_type: Annotated[str, OneOf("epsilon", "sample")]
    clip_sample: bool
    clip_sample_range: Annotated[float, Between(1, 1e6)]
    num_inference_steps: Steps | None
    do_mask_loss_for_padding: bool
    resize_shape: Size | None = None
    crop_ratio: Annotated[float, Above(0, 1)] = 1.0

    @property
    def cameras(self) -> dict[str, Feature]:
        return {key: feature for key, feature in self.input_features.items() if feature.type == "VISUAL"}

    @property
    def crop(self) -> list[int] | None:
        """(h, w) that is cut, as `DiffusionConfig` works it out."""
        if self.resize_shape is None:
            return self.crop_shape
        cut = [int(side * self.crop_ratio) for side in self.resize_shape]
        return cut if self.crop_ratio < 1 else None


OTHERS = (
    *("type", "device", "use_amp", "use_peft", "push_to_hub", "repo_id", "private", "tags", "license"),
    *("pretrained_path", "pretrained_revision", "pretrained_backbone_weights", "drop_n_last_frames"),
    *("compile_model", "compile_mode", "gradient_checkpointing", "optimizer_lr", "optimizer_betas", "optimizer_eps"),
    *("optimizer_weight_decay", "scheduler_name", "scheduler_warmup_steps"),
)
"""Options that say how it is trained or run, and nothing of what it computes."""


def read_config(file: Path) -> Config:
    """`config.json`, checked. Raises `InputError` for another type of policy, an option that lacks or is unknown."""
    data = read_json(file)
    if "input_shapes" in data:
        raise InputError(f"{file} is of a lerobot before 0.2 (it has 'input_shapes'); {VERSIONS} are read here")
    if data.get("type") != "diffusion":
        raise InputError(
            f"{file} is of type {shown(data.get('type'))}: of lerobot's policies, 'diffusion' has a counterpart here"
        )
    if data.get("use_peft"):
        raise InputError(f"{file}: use_peft=true: its weights are a change to others; merge them before")
    known = hints(Config)
    for key in data:
        if key not in known and key not in OTHERS:
            raise unknown("option", key, (*known, *OTHERS), f"{file}, which {VERSIONS} do not have")
    for key in needed(Config):
        if key not in data:
            raise InputError(f"{file} lacks {key!r}, which {VERSIONS} write")
    config: Config = check({key: data[key] for key in known if key in data}, Config, str(file))
    _check(config, file)
    return config


def _check(config: Config, file: Path) -> None:
    """`InputError` for what lerobot itself would refuse, and for what has no counterpart here."""
    keys = config.input_features
    if STATE not in keys:
        raise InputError(f"{file}: no {STATE!r} among input_features, which lerobot's diffusion policy needs")
    if list(config.output_features) != [ACTION]:
        raise InputError(f"{file}: output_features are {', '.join(config.output_features)}, expected 'action' alone")
    for key in (STATE, ENVIRONMENT):
        if key in keys and len(keys[key].shape) != 1:
            raise InputError(f"{file}: {key} has shape {keys[key].shape}, expected one axis")
    if len(config.output_features[ACTION].shape) != 1:
        raise InputError(f"{file}: action has shape {config.output_features[ACTION].shape}, expected one axis")
    if not config.cameras and ENVIRONMENT not in keys:
        raise InputError(f"{file}: neither a picture nor {ENVIRONMENT!r} among input_features")
    shapes = [feature.shape for feature in config.cameras.values()]
    for key, feature in config.cameras.items():
        if len(feature.shape) != 3 or feature.shape[0] != 3:
            raise InputError(
                f"{file}: {key} has shape {feature.shape}: [3, height, width] is expected, here [height, width, 3]"
            )
        if feature.shape != shapes[0]:
            raise InputError(
                f"{file}: pictures of shapes {shapes[0]} and {feature.shape}; lerobot takes equal ones only"
            )
    if config.n_groups != 8:
        raise InputError(
            f"{file}: n_groups={config.n_groups}: the last block of lerobot's U-Net has 8 groups whatever that says, "
            "here it has as many as the others"
        )


def encoded(options: dict[str, Any]) -> dict[str, Any]:
    """`config.json` that both versions load, of the options of `Config` that are given.

    Training goes on from here with their own defaults; nothing is fetched from elsewhere.
    """
    return {"type": "diffusion", **options, "pretrained_backbone_weights": None, "device": "cpu", "push_to_hub": False}
