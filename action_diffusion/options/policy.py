"""`policy.*`: what a policy is made of. A component's options are those of its constructor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from action_diffusion.errors import InputError, unknown
from action_diffusion.options.words import MOST_STEPS, Column, Columns, Finite, Places, Pose, Share, Size
from action_diffusion.registry import POLICY_PARTS
from action_diffusion.schema import Above, Between, ByName, FilePath, Matching, OneOf, Section, Sized, check

Keys = str | Annotated[list[str], Sized(1, 16)]
"""Of observations, one for each gripper."""


@dataclass
class ContextOptions:
    """`policy.encoder.context`, see `policy.context.Context`."""

    size: Annotated[int, Between(1, 4096)] = 16
    recent: Annotated[int, Between(1, MOST_STEPS)] = 2
    hidden: Annotated[int, Between(1, 4096)] = 64


Channels = Annotated[list[Annotated[float, Between(-1e6, 1e6)]], Sized(3, 3)]


@dataclass
class PixelOptions:
    """`policy.encoder.pixels.CAMERA`: mean and standard deviation of red, green and blue in [0, 1]."""

    mean: Channels
    std: Annotated[list[Annotated[float, Above(0, 1e6)]], Sized(3, 3)]


@dataclass
class SeriesOptions:
    """`policy.encoder.series.KEY`, see `policy.series.Series`."""

    channels: Annotated[int, Between(1, 4096)]
    hidden: Annotated[int, Between(1, 4096)] = 32
    feature_dim: Annotated[int, Between(1, 8192)] = 32


@dataclass
class PointEncoderOptions:
    """`policy.encoder.points`, see `policy.model.encoders.points.PointEncoder`."""

    hidden: Annotated[list[Annotated[int, Between(1, 8192)]], Sized(1, 8)] = field(
        default_factory=lambda: [64, 128, 256]
    )
    feature_dim: Annotated[int, Between(1, 8192)] = 64


@dataclass
class EncoderOptions:
    """`policy.encoder`, see `policy.encoder.ObservationEncoder`."""

    backbone: Annotated[str, OneOf("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")] = "resnet18"
    width: Annotated[float, Above(0, 8)] = 1.0
    stages: Annotated[int, Between(1, 4)] = 4
    pooling: Annotated[str, OneOf("spatial_softmax", "average")] = "spatial_softmax"
    keypoints: Annotated[int, Between(1, 4096)] = 32
    feature_dim: Annotated[int, Between(1, 8192)] = 64
    crop: Size | None = None
    crop_at: Annotated[list[Annotated[int, Between(0, 8192)]], Sized(2, 2)] | None = None
    resize: Size | None = None
    color_jitter: Share | dict[str, Share] = 0.0
    augment: list[Section] | None = None
    share: bool = False
    weights: FilePath | None = None
    channels_last: bool = True
    norm: Annotated[str, OneOf("group", "frozen_batch")] = "group"
    group_norm_channels: Annotated[int, Between(1, 1024)] = 16
    pixels: dict[str, PixelOptions] | None = None
    context: ContextOptions | None = None
    text_feature_dim: Annotated[int, Between(1, 8192)] = 32
    series: dict[str, SeriesOptions] | None = None
    points: PointEncoderOptions | None = None


def check_crop(key: str, size: Sequence[int], crop: Sequence[int] | None, corner: Sequence[int] | None = None) -> None:
    """Raises `InputError` for a crop (h, w), from `corner` (top, left) on where there is one, that leaves the frames of
    `key`, (H, W) when they are cut."""
    if corner is not None and crop is None:
        raise InputError(f"encoder.crop_at={list(corner)} needs encoder.crop")
    if crop is not None and (crop[0] > size[0] or crop[1] > size[1]):
        raise InputError(f"encoder.crop={list(crop)} is larger than the frames of {key!r}, {list(size)}")
    if crop is not None and corner is not None and (corner[0] + crop[0] > size[0] or corner[1] + crop[1] > size[1]):
        raise InputError(f"encoder.crop_at={list(corner)}: the crop leaves the frames of {key!r}, {list(size)}")


@dataclass
class Unet1dOptions:
    """`policy.denoiser`, see `policy.denoiser.ConditionalUnet1d`."""

    channels: Annotated[list[Annotated[int, Between(1, 8192)]], Sized(1, 8)]
    kernel_size: Annotated[int, Between(1, 63)] = 5
    n_groups: Annotated[int, Between(1, 1024)] = 8
    time_dim: Annotated[int, Between(4, 8192)] = 128
    activation: Annotated[str, OneOf("silu", "mish", "relu", "gelu")] = "silu"


@dataclass
class DiTOptions:
    """`policy.denoiser`, see `policy.dit.DiffusionTransformer`."""

    width: Annotated[int, Between(4, 8192)] = 96
    layers: Annotated[int, Between(1, 64)] = 3
    heads: Annotated[int, Between(1, 256)] = 4


@dataclass
class TransformerOptions(DiTOptions):
    """`policy.denoiser`, see `policy.transformer.TransformerDenoiser`."""

    causal: bool = True
    dropout: Annotated[float, Between(0, below=1)] = 0.0


@dataclass
class PlanarPoseOptions:
    """`policy.estimator`, see `policy.estimator.PlanarPose`."""

    state: str
    pose: Pose
    low: Finite
    high: Finite
    known: dict[str, Columns] | None = None
    hidden: Annotated[int, Between(1, 65_536)] = 256
    weight: Annotated[float, Above(0, 1e6)] = 1.0


@dataclass
class DiffusionOptions:
    """`policy.process`, see `policy.process.Diffusion`."""

    prediction: str = "epsilon"
    num_train_timesteps: Annotated[int, Between(1, 10_000)] = 100
    beta_schedule: Annotated[str, OneOf("linear", "scaled_linear", "squaredcos_cap_v2")] = "squaredcos_cap_v2"
    beta_start: Annotated[float, Above(0, 0.999)] = 1e-4
    beta_end: Annotated[float, Above(0, 0.999)] = 0.02


@dataclass
class FlowOptions:
    """`policy.process`, see `policy.process.Flow`."""

    prediction: str = "velocity"


@dataclass
class SinCosOptions:
    """`policy.features.KEY`, see `policy.features`."""

    columns: Columns


@dataclass
class MagnifiedOptions:
    """`policy.features.KEY`, see `policy.features`."""

    columns: Columns
    scale: Annotated[float, Above(0, 1e12)]


@dataclass
class PlanarObjectOptions:
    """`policy.features.KEY`, see `policy.features`."""

    pose: Pose
    points: Places
    relative: Annotated[list[Column], Sized(0, 4096)] = ()  # type: ignore[assignment]
    landmarks: Places = ()  # type: ignore[assignment]


@dataclass
class PositionFrameOptions:
    """`policy.action_frame`, see `policy.frames.Position`."""

    observation: str
    columns: Columns
    action_columns: Columns


@dataclass
class PoseFrameOptions:
    """`policy.action_frame`, see `policy.model.poses.Pose`."""

    position: Keys
    rotation: Keys | None = None
    action_positions: Columns | None = None
    observed: Annotated[str, OneOf("relative", "absolute")] = "relative"


@dataclass
class PlanarObjectFrameOptions:
    """`policy.action_frame`, see `policy.frames.PlanarObjectFrame`."""

    observation: str
    pose: Pose


@dataclass
class MaskedOptions:
    """`policy.process`, see `policy.diffusion.masked`."""

    prediction: str = "sample"


@dataclass
class MipOptions:
    """`policy.process`, see `policy.process.Mip`."""

    prediction: str = "sample"
    level: Annotated[float, Between(0.01, 0.99)] = 0.9


@dataclass
class DenoisingOptions:
    """`policy.objective`, see `policy.objectives`."""

    loss: Annotated[str, OneOf("mse", "l1", "huber")] | None = "mse"
    noise_draws: Annotated[int, Between(1, 1024)] = 1
    loss_on_padding: bool = True
    max_delay: Annotated[int, Between(0, MOST_STEPS)] = 0


@dataclass
class DistillationOptions(DenoisingOptions):
    """`policy.objective`, see `policy.objectives.distillation`."""

    teacher: FilePath | None = None


@dataclass
class FlowMapOptions(DenoisingOptions):
    """`policy.objective`, see `policy.objectives.flow_maps`."""

    distilled: Annotated[float, Above(0, 1)] = 0.5


@dataclass
class MeanFlowOptions(DenoisingOptions):
    """`policy.objective`, see `policy.objectives.flow_maps`."""

    distilled: Annotated[float, Above(0, 1)] = 0.25


@dataclass
class ShortcutOptions(MeanFlowOptions):
    """`policy.objective`, see `policy.objectives.flow_maps`."""

    finest: Annotated[int, Matching("a power of two, from 2 to 1024", lambda n: 2 <= n <= 1024 and not n & (n - 1))] = (
        128
    )


@dataclass
class ConsistencyOptions(FlowMapOptions):
    """`policy.objective`, see `policy.objectives.consistency`."""

    teacher: FilePath | None = None
    bins: Annotated[int, Between(2, 1024)] = 80
    solver_steps: Annotated[int, Between(1, 64)] = 4


@dataclass
class SobolevOptions(DenoisingOptions):
    """`policy.objective`, see `policy.objectives.sobolev`."""

    gain: str = "gain"
    weight: Annotated[float, Above(0, 1e6)] = 1.0


@dataclass
class DiffusionQlOptions(DenoisingOptions):
    """`policy.objective`, see `policy.offline.diffusion_ql`."""

    eta: Annotated[float, Between(0, 1e6)] = 1.0
    pessimism: Annotated[float, Between(0, 1e6)] = 1.0
    quantile: Annotated[float, Above(0, 1)] = 0.95
    spread: Annotated[float, Between(0, 100)] = 0.5
    temperature: Annotated[float, Above(0, 1e6)] | None = None
    warmup: Annotated[int, Between(0, 1_000_000_000)] = 1000
    follow: Annotated[float, Above(0, 1)] = 0.005
    reward: str | None = None
    counted: Annotated[str, OneOf("success", "dense", "given")] = "success"
    terminal: str | None = None
    gamma: Annotated[float, Above(0, 1)] = 0.99
    hidden: Annotated[list[Annotated[int, Between(1, 8192)]], Sized(1, 8)] = field(default_factory=lambda: [256, 256])
    octaves: Annotated[int, Between(0, 16)] = 4
    members: Annotated[int, Between(1, 64)] = 2


COMPONENTS: dict[str, dict[str, type]] = {
    "encoder": {"observation": EncoderOptions},
    "denoiser": {"dit": DiTOptions, "transformer": TransformerOptions, "unet1d": Unet1dOptions},
    "estimator": {"planar_pose": PlanarPoseOptions},
    "process": {"diffusion": DiffusionOptions, "flow": FlowOptions, "masked": MaskedOptions, "mip": MipOptions},
    "objective": {
        "consistency": ConsistencyOptions,
        "denoising": DenoisingOptions,
        "diffusion_ql": DiffusionQlOptions,
        "distillation": DistillationOptions,
        "flow_map": FlowMapOptions,
        "mean_flow": MeanFlowOptions,
        "mip": DenoisingOptions,
        "shortcut": ShortcutOptions,
        "sobolev": SobolevOptions,
    },
    "features": {"sin_cos": SinCosOptions, "magnified": MagnifiedOptions, "planar_object": PlanarObjectOptions},
    "action_frame": {
        "planar_object": PlanarObjectFrameOptions,
        "pose": PoseFrameOptions,
        "position": PositionFrameOptions,
    },
}


@dataclass(kw_only=True)
class AnySampler:
    """`sampler` of a command: null keeps what the bundle says. Which go with a scheduler: `SCHEDULERS`."""

    scheduler: Annotated[str, Matching("a word", lambda _: True)] | None = None
    num_inference_steps: Annotated[int, Between(1, MOST_STEPS)] | None = None
    clip: Annotated[str, OneOf("x0", "x")] | None = None
    clip_range: Annotated[float, Between(1, 1e6)] | None = None
    clip_to: Annotated[str, OneOf("demonstrated", "unit")] | None = None
    timestep_spacing: Annotated[str, OneOf("leading", "trailing", "linspace")] | None = None
    steps_offset: Annotated[int, Between(0, 10_000)] | None = None
    eta: Share | None = None
    set_alpha_to_one: bool | None = None
    use_clipped_model_output: bool | None = None
    thresholding: bool | None = None
    variance_type: str | None = None
    solver_order: Annotated[int, Between(1, 3)] | None = None
    solver_type: Annotated[str, OneOf("midpoint", "heun")] | None = None
    lower_order_final: bool | None = None
    euler_at_final: bool | None = None
    use_karras_sigmas: bool | None = None
    use_exponential_sigmas: bool | None = None
    use_lu_lambdas: bool | None = None
    final_sigmas_type: Annotated[str, OneOf("zero", "sigma_min")] | None = None
    shift: Annotated[float, Above(0, 1000)] | None = None
    stochastic_sampling: bool | None = None


SPACED = ("timestep_spacing", "steps_offset", "thresholding")
SCHEDULERS = {
    "ddpm": (*SPACED, "variance_type"),
    "ddim": (*SPACED, "eta", "set_alpha_to_one", "use_clipped_model_output"),
    "dpm_solver++": (
        *SPACED,
        *("solver_order", "solver_type", "lower_order_final", "euler_at_final", "final_sigmas_type"),
        *("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas"),
    ),
    "flow": ("shift", "stochastic_sampling"),
    "masked": (),
    "mip": (),
}
"""The options of each scheduler, beside what `policy.sampler.Sampler` takes for all of them."""
OF_ALL = ("scheduler", "num_inference_steps", "clip", "clip_range", "clip_to")
"""Options of a sampler that belong to no single scheduler."""
PROCESS_OF = {
    **dict.fromkeys(("ddpm", "ddim", "dpm_solver++"), "diffusion"),
    **{name: name for name in ("flow", "masked", "mip")},
}
"""The family of processes that each scheduler samples."""


@dataclass(kw_only=True)
class Sampler(AnySampler):
    """`policy.sampler`."""

    scheduler: str = field()
    num_inference_steps: Annotated[int, Between(1, MOST_STEPS)] = field()


EncoderSection = Annotated[Section, ByName(COMPONENTS["encoder"], POLICY_PARTS["encoder"])]
DenoiserSection = Annotated[Section, ByName(COMPONENTS["denoiser"], POLICY_PARTS["denoiser"])]
ProcessSection = Annotated[Section, ByName(COMPONENTS["process"], POLICY_PARTS["process"])]
ObjectiveSection = Annotated[Section, ByName(COMPONENTS["objective"], POLICY_PARTS["objective"], default="denoising")]
FeaturesSection = Annotated[Section, ByName(COMPONENTS["features"], POLICY_PARTS["features"])]
FrameSection = Annotated[Section, ByName(COMPONENTS["action_frame"], POLICY_PARTS["action_frame"])]
EstimatorSection = Annotated[Section, ByName(COMPONENTS["estimator"], POLICY_PARTS["estimator"])]


@dataclass
class Policy:
    """`policy.*`: what a bundle is built from."""

    encoder: EncoderSection
    denoiser: DenoiserSection
    process: ProcessSection
    sampler: Sampler
    objective: ObjectiveSection
    normalizer: dict[str, Annotated[str, OneOf("minmax", "gaussian", "identity")]]
    features: dict[str, FeaturesSection | None] | None = None
    action_frame: FrameSection | None = None
    estimator: EstimatorSection | None = None

    def __post_init__(self) -> None:
        name, process = str(self.objective.get("name")), COMPONENTS["process"].get(str(self.process.get("name")))
        if name in FAMILIES and process is not None:
            prediction = self.process.get("prediction", process().prediction)
            check_process(name, FAMILIES[name], str(self.process.get("name")), str(prediction))
        try:
            _check_sampling(vars(self.sampler), self.process, name)
        except InputError as error:
            raise InputError(f"policy.{error}") from None


FAMILIES = {"consistency": "flow", "flow_map": "flow", "mean_flow": "flow", "mip": "mip", "shortcut": "flow"}
"""Objectives that are for one kind of process."""
PREDICTED = {"flow": ("velocity", "sample"), "mip": ("sample",)}


def check_process(objective: str, family: str, found: str, prediction: str) -> None:
    """`InputError` where an objective that is for the processes of `family` is to learn from another one."""
    if found != family or prediction not in PREDICTED[family]:
        raise InputError(
            f"policy.objective: {objective} needs a {family} process that predicts the {PREDICTED[family][0]}, and "
            f"policy.process is a {found} process that predicts the {prediction}: use scheduler={family}"
        )


def check_policy(config: Any) -> None:
    """`InputError` for a `policy` section that no policy can be built from."""
    check(config, Policy, "policy")


def check_sampler(scheduler: str, options: Mapping[str, Any]) -> None:
    """`InputError` for an option that the scheduler does not have, and for a value that it cannot have."""
    for name in options:
        if name not in SCHEDULERS.get(scheduler, ()):
            accepted = ", ".join(SCHEDULERS.get(scheduler, ()))
            raise InputError(f"sampler option not known to {scheduler}: {name}; it takes {accepted}")
    check(dict(options), AnySampler, "sampler")


def check_member(family: str, name: str) -> None:
    """`InputError` for a scheduler that there is not, or that samples another family of processes."""
    if name not in PROCESS_OF:
        raise unknown("sampler.scheduler", name, PROCESS_OF)
    if PROCESS_OF[name] != family:
        fitting = ", ".join(key for key, value in PROCESS_OF.items() if value == family)
        raise InputError(
            f"sampler.scheduler={name} is of the {PROCESS_OF[name]} family, but the policy was trained as "
            f"{family}: choose from {fitting}"
        )


def check_n_inference(name: str, n_steps: int, most: int | None) -> None:
    """`InputError` for more denoising steps than `most`, and for none."""
    if not 1 <= n_steps <= (most := min(most or MOST_STEPS, MOST_STEPS)):
        raise InputError(f"sampler.num_inference_steps={n_steps} for {name} must be between 1 and {most}")


def check_trailing(n_steps: int, n_training: int) -> None:
    """`InputError` where trailing steps do not fall on steps of training: diffusers steps back by T // n whatever the
    rounded ones are, so the noise levels would drift."""
    if n_training % n_steps:
        raise InputError(
            f"sampler.num_inference_steps={n_steps} does not divide {n_training} training steps, as trailing spacing "
            f"needs: {accepted_steps(n_training)}"
        )


def accepted_steps(n_training: int) -> str:
    """What always goes, in words."""
    divisors = ", ".join(str(d) for d in range(1, n_training + 1) if n_training % d == 0)
    return (
        f"use timestep_spacing=trailing with num_inference_steps={divisors}, or scheduler=dpm_solver++ with that "
        "spacing in any number of steps"
    )


def with_sampler(policy: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The section `policy` of a bundle with other options of its sampler, where they are not null.

    Raises `InputError` for what it cannot be sampled with, as far as that shows without making the scheduler.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    own, process = policy["sampler"], policy["process"]
    if not given:
        return dict(policy)
    if given.get("scheduler", own["scheduler"]) != own["scheduler"]:  # others, such as eta, belong to one scheduler
        own = {key: own[key] for key in OF_ALL if key in own}
    sampler = {**own, **given}
    _check_sampling(sampler, process, str(policy["objective"].get("name")))
    return {**policy, "sampler": sampler}


def _check_sampling(sampler: Mapping[str, Any], process: Mapping[str, Any], objective: str) -> None:
    name, n_steps = sampler["scheduler"], sampler["num_inference_steps"]
    if objective == "distillation" and n_steps != 1:
        raise InputError(f"sampler.num_inference_steps={n_steps} must be 1: objective=distillation learns one step")
    if process["name"] not in COMPONENTS["process"]:
        return  # a plugin's says itself what goes
    options = {key: value for key, value in sampler.items() if key not in OF_ALL and value is not None}
    check_member(process["name"], name)
    check_sampler(name, options)
    n_training = process.get("num_train_timesteps", DiffusionOptions.num_train_timesteps)
    check_n_inference(name, n_steps, {"diffusion": n_training, "mip": 2}.get(process["name"]))
    if name in ("ddpm", "ddim") and options.get("timestep_spacing", "trailing") == "trailing":
        check_trailing(n_steps, n_training)
