"""The configuration of a diffusion_policy checkpoint, of which the parts that make its policy, typed.

    omegaconf's nodes (`unpickling.Made`) ─▶ plain ─▶ ${…} replaced ─▶ one of `POLICIES`

Where the options of their constructors have defaults, these are theirs. What is not listed is refused: some options of
theirs go on to the scheduler, and would be missed silently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from action_diffusion.errors import InputError, unknown
from action_diffusion.options import Steps
from action_diffusion.policy.interchange.unpickling import Made
from action_diffusion.schema import Above, Between, OneOf, Section, Sized, check, shown

DEEPEST, MOST_VALUES = 32, 100_000
"""Of a configuration: lists in one another, and values."""
Whole = Annotated[int, Between(1, 100_000)]
Sides = Annotated[list[Annotated[int, Between(1, 8192)]], Sized(2, 2)]


@dataclass(kw_only=True)
class Scheduler:
    """`policy.noise_scheduler`, of diffusers. The last ones came after the version that they use."""

    num_train_timesteps: Annotated[int, Between(1, 10_000)] = 1000
    beta_start: Annotated[float, Above(0, 0.999)] = 1e-4
    beta_end: Annotated[float, Above(0, 0.999)] = 0.02
    beta_schedule: str = "linear"
    variance_type: str = "fixed_small"
    clip_sample: bool = True
    prediction_type: str = "epsilon"
    set_alpha_to_one: bool = True
    steps_offset: Annotated[int, Between(0, 10_000)] = 0
    clip_sample_range: Annotated[float, Above(0, 1e6)] = 1.0
    timestep_spacing: Annotated[str, OneOf("leading", "trailing", "linspace")] = "leading"


@dataclass(kw_only=True)
class Attr:
    """`shape_meta.obs.KEY`, `shape_meta.action`."""

    shape: Annotated[list[Whole], Sized(1, 3)]
    type: Annotated[str, OneOf("rgb", "low_dim")] = "low_dim"


@dataclass(kw_only=True)
class ShapeMeta:
    """`policy.shape_meta`: what is observed, in order; images are [3, H, W]."""

    obs: Annotated[dict[str, Attr], Sized(1, 256)]
    action: Attr


@dataclass(kw_only=True)
class Unet:
    """A U-Net, as policies of images give its options. cond_predict_scale shows in its weights."""

    diffusion_step_embed_dim: Whole = 256
    down_dims: Annotated[list[Whole], Sized(1, 8)] = field(default_factory=lambda: [256, 512, 1024])
    kernel_size: Whole = 5
    n_groups: Whole = 8
    cond_predict_scale: bool = True


@dataclass(kw_only=True)
class UnetModel(Unet):
    """ConditionalUnet1D; dimensions show in its weights."""

    input_dim: Any = None
    local_cond_dim: Any = None
    global_cond_dim: Any = None
    kernel_size: Whole = 3
    cond_predict_scale: bool = False


@dataclass(kw_only=True)
class Transformer:
    """A transformer, as the policy of images gives its options."""

    n_layer: Annotated[int, Between(1, 64)] = 8
    n_cond_layers: int = 0
    n_head: Annotated[int, Between(1, 256)] = 4
    n_emb: Whole = 256
    p_drop_emb: float = 0.0
    p_drop_attn: Annotated[float, Between(0, below=1)] = 0.3
    causal_attn: bool = True
    time_as_cond: bool = True


@dataclass(kw_only=True)
class TransformerModel(Transformer):
    """TransformerForDiffusion; dimensions show in its weights, and whether observations are its condition."""

    input_dim: Any = None
    output_dim: Any = None
    horizon: Any = None
    n_obs_steps: Any = None
    cond_dim: Any = None
    obs_as_cond: Any = None
    n_layer: Annotated[int, Between(1, 64)] = 12
    n_head: Annotated[int, Between(1, 256)] = 12
    n_emb: Whole = 768
    p_drop_emb: float = 0.1
    p_drop_attn: Annotated[float, Between(0, below=1)] = 0.1
    causal_attn: bool = False


@dataclass(kw_only=True)
class Backbone:
    """`obs_encoder.rgb_model`, of get_resnet."""

    name: Annotated[str, OneOf("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")]
    weights: Any = None


@dataclass(kw_only=True)
class ImageEncoder:
    """MultiImageObsEncoder."""

    shape_meta: Any
    rgb_model: Section
    resize_shape: Sides | dict[str, Sides] | None = None
    crop_shape: Sides | dict[str, Sides] | None = None
    random_crop: bool = True
    use_group_norm: bool = False
    share_rgb_model: bool = False
    imagenet_norm: bool = False


@dataclass(kw_only=True)
class TheirPolicy:
    """What all policies have. eta, use_clipped_model_output: theirs pass these on to the scheduler."""

    noise_scheduler: Section
    horizon: Steps
    n_action_steps: Steps
    n_obs_steps: Steps
    num_inference_steps: Annotated[int, Between(1, 10_000)] | None = None
    eta: Annotated[float, Between(0, 1)] = 0.0
    use_clipped_model_output: bool = False


@dataclass(kw_only=True)
class Lowdim(TheirPolicy):
    """Policies of states, one vector of them: the observation `obs`."""

    model: Section
    obs_dim: Whole
    action_dim: Whole
    pred_action_steps_only: bool = False


@dataclass(kw_only=True)
class UnetLowdim(Lowdim):
    """DiffusionUnetLowdimPolicy."""

    obs_as_local_cond: bool = False
    obs_as_global_cond: bool = False
    oa_step_convention: bool = False


@dataclass(kw_only=True)
class TransformerLowdim(Lowdim):
    """DiffusionTransformerLowdimPolicy."""

    obs_as_cond: bool = False


@dataclass(kw_only=True)
class Image(TheirPolicy):
    """Policies of images."""

    shape_meta: ShapeMeta


@dataclass(kw_only=True)
class UnetImage(Image, Unet):
    """DiffusionUnetImagePolicy."""

    obs_encoder: Section
    obs_as_global_cond: bool = True


@dataclass(kw_only=True)
class Hybrid(Image):
    """Policies with robomimic's encoder."""

    crop_shape: Sides | None = field(default_factory=lambda: [76, 76])
    obs_encoder_group_norm: bool = False
    eval_fixed_crop: bool = False


@dataclass(kw_only=True)
class UnetHybrid(Hybrid, Unet):
    """DiffusionUnetHybridImagePolicy."""

    obs_as_global_cond: bool = True


@dataclass(kw_only=True)
class TransformerHybrid(Hybrid, Transformer):
    """DiffusionTransformerHybridImagePolicy."""

    obs_as_cond: bool = True
    pred_action_steps_only: bool = False


POLICIES: dict[str, type[TheirPolicy]] = {
    "DiffusionUnetLowdimPolicy": UnetLowdim,
    "DiffusionTransformerLowdimPolicy": TransformerLowdim,
    "DiffusionUnetImagePolicy": UnetImage,
    "DiffusionUnetHybridImagePolicy": UnetHybrid,
    "DiffusionTransformerHybridImagePolicy": TransformerHybrid,
}

MODELS = {
    UnetLowdim: ("ConditionalUnet1D", UnetModel),
    TransformerLowdim: ("TransformerForDiffusion", TransformerModel),
}
"""Of policies that are given a network: its class, and its options."""


def policy_options(config: Mapping[str, Any]) -> TheirPolicy:
    """The options of the policy that `config` (`plain`) describes. Raises `InputError` for one that is not known."""
    options = config.get("policy")
    name, rest = targeted(options, "cfg.policy")
    if name not in POLICIES:
        raise unknown("policy", name, POLICIES, "cfg.policy._target_")
    found: TheirPolicy = check(rest, POLICIES[name], "cfg.policy")
    return found


def network_options(options: TheirPolicy) -> Unet | Transformer:
    """Of the network that denoises."""
    if isinstance(options, Unet | Transformer):
        return options
    assert isinstance(options, Lowdim)
    expected, cls = MODELS[type(options)]
    found: Unet | Transformer = check(named(options.model, expected, "cfg.policy.model"), cls, "cfg.policy.model")
    return found


def named(section: Any, expected: str, where: str) -> dict[str, Any]:
    """The rest of a section that names the class which is expected. Raises `InputError` for another."""
    name, rest = targeted(section, where)
    if name != expected:
        raise unknown("class", name, [expected], f"{where}._target_")
    return rest


def targeted(section: Any, where: str) -> tuple[str, dict[str, Any]]:
    """The class that a section names, without its module, and the rest of the section."""
    if not isinstance(section, dict) or not isinstance(section.get("_target_"), str):
        raise InputError(f"{where} names no class (_target_)")
    rest = {key: value for key, value in section.items() if key != "_target_"}
    return section["_target_"].rpartition(".")[2], rest


def plain(nodes: Any) -> dict[str, Any]:
    """A configuration as plain data, with what it refers to in the place of references."""
    config = _unwrapped(nodes, _Budget(), 0)
    if not isinstance(config, dict):
        raise InputError("cfg is no mapping")
    resolved = _resolved(config, config, _Budget(), 0)
    assert isinstance(resolved, dict)
    return resolved


class _Budget:
    """What a configuration may take, where parts of it may be the same ones many times over."""

    def __init__(self) -> None:
        self._left = MOST_VALUES

    def spend(self, values: int, depth: int) -> None:
        self._left -= values
        if depth > DEEPEST or self._left < 0:
            raise InputError(f"cfg has more than {MOST_VALUES:,} values, or {DEEPEST} in one another")


def _unwrapped(node: Any, budget: _Budget, depth: int) -> Any:
    budget.spend(1, depth)
    if isinstance(node, Made):
        state = node.state if isinstance(node.state, dict) else {}
        kind = next((key for key in ("_content", "_val") if key in state), None)
        if not node.name.startswith("omegaconf.") or kind is None:
            raise InputError(f"cfg holds a {shown(node.name)}, which is no value")
        return _unwrapped(state[kind], budget, depth + 1)
    if isinstance(node, dict):
        return {str(key): _unwrapped(value, budget, depth + 1) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_unwrapped(value, budget, depth + 1) for value in node]
    if node is None or isinstance(node, str | bool | int | float):
        return node
    raise InputError(f"cfg holds a {type(node).__name__}, which is no value")


REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.\w+)*)\}")
SUM = re.compile(r"\$\{eval:\s*['\"]?\s*(\d{1,6}(?:\s*\+\s*\d{1,6})*)\s*['\"]?\s*\}")
"""Of their expressions the only one that a policy's options need; others stay as they are, as text."""


def _resolved(value: Any, root: Mapping[str, Any], budget: _Budget, depth: int) -> Any:
    budget.spend(1 + len(value) // 100 if isinstance(value, str) else 1, depth)
    if isinstance(value, dict):
        return {key: _resolved(inside, root, budget, depth + 1) for key, inside in value.items()}
    if isinstance(value, list):
        return [_resolved(inside, root, budget, depth + 1) for inside in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    if whole := REFERENCE.fullmatch(value):
        return _resolved(_looked_up(root, whole[1]), root, budget, depth + 1)
    text = REFERENCE.sub(lambda found: shown(_resolved(_looked_up(root, found[1]), root, budget, depth + 1)), value)
    added = SUM.fullmatch(text)
    return sum(int(part) for part in added[1].split("+")) if added else text


def _looked_up(root: Mapping[str, Any], path: str) -> Any:
    found: Any = root
    for name in path.split("."):
        if not isinstance(found, dict) or name not in found:
            raise InputError(f"cfg refers to {shown(path)}, which it does not have")
        found = found[name]
    return found
