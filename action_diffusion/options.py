"""Every option of every command: its type, and what it may be. No torch is imported here.

A component's options are those of its constructor, in `COMPONENTS` by kind and name (`policy.registry` builds them; the
constructors of plugins check their own);
a test holds the two beside each other, as it does the defaults in `configs/`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from action_diffusion.errors import InputError
from action_diffusion.registry import ENVS, POLICY_PARTS
from action_diffusion.schema import Above, Between, ByName, FilePath, Matching, OneOf, Section, Sized, check
from action_diffusion.train_settings import TrainSettings

KINDS = ("state", "image")
"""Of observations."""
MOST_STEPS = 1024
"""Of a chunk, and of denoising: far beyond what robots use, and soon computed."""
SEEDS = 4_000_000_000
"""So that a seed and those counted up from it are numbers of 32 bits."""

Word = str | int
"""A name may be made of digits."""
Address = Annotated[str, Matching("an address, such as ws://HOST:8000", bool)]
Device = Annotated[
    Word,
    Matching(
        "a word, such as auto, cpu, cuda or cuda:1",
        lambda value: re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d{1,3})?|\d{1,3}", str(value)) is not None,
    ),
]
Port = Annotated[int, Matching("a whole number from 0 to 65535", lambda value: 0 <= value <= 65_535)]
Seed = Annotated[int, Between(0, SEEDS)]
Count = Annotated[int, Between(1, 100_000)]
Seconds = Annotated[float, Between(0, 1e6)]
Column = Annotated[int, Between(0, 1_000_000)]
Columns = Annotated[list[Column], Sized(1, 4096)]
Pose = Annotated[list[Column], Sized(3, 3)]
Side = Annotated[int, Between(1, 8192)]
Size = Annotated[list[Side], Sized(2, 2)]
Finite = Annotated[float, Between(-1e12, 1e12)]
Place = Annotated[list[Finite], Sized(2, 2)]
Places = Annotated[list[Place], Sized(0, 1000)]
Share = Annotated[float, Between(0, 1)]
Plugins = FilePath | list[FilePath] | None
"""Python files of the user's own that register parts, see `action_diffusion.registry`."""
Precision = Annotated[str, OneOf("fp32", "bf16", "fp16")]

# What a policy is made of.


@dataclass
class Encoder:
    """`policy.encoder`, see `policy.encoder.ObservationEncoder`."""

    backbone: Annotated[str, OneOf("resnet18", "resnet34", "resnet50")] = "resnet18"
    width: Annotated[float, Above(0, 8)] = 1.0
    stages: Annotated[int, Between(1, 4)] = 4
    pooling: Annotated[str, OneOf("spatial_softmax", "average")] = "spatial_softmax"
    keypoints: Annotated[int, Between(1, 4096)] = 32
    feature_dim: Annotated[int, Between(1, 8192)] = 64
    crop: Size | None = None
    resize: Size | None = None
    color_jitter: Share | dict[str, Share] = 0.0
    augment: list[Section] | None = None
    share: bool = False
    weights: FilePath | None = None
    channels_last: bool = True
    group_norm_channels: Annotated[int, Between(1, 1024)] = 16


@dataclass
class Unet1d:
    """`policy.denoiser`, see `policy.denoiser.ConditionalUnet1d`."""

    channels: Annotated[list[Annotated[int, Between(1, 8192)]], Sized(1, 8)]
    kernel_size: Annotated[int, Between(1, 63)] = 5
    n_groups: Annotated[int, Between(1, 1024)] = 8
    time_dim: Annotated[int, Between(4, 8192)] = 128
    activation: Annotated[str, OneOf("silu", "mish", "relu", "gelu")] = "silu"


@dataclass
class PlanarPose:
    """`policy.estimator`, see `policy.estimator.PlanarPose`."""

    state: str
    pose: Pose
    low: Finite
    high: Finite
    known: dict[str, Columns] | None = None
    hidden: Annotated[int, Between(1, 65_536)] = 256
    weight: Annotated[float, Above(0, 1e6)] = 1.0


@dataclass
class Diffusion:
    """`policy.process`, see `policy.process.Diffusion`."""

    prediction: str = "epsilon"
    num_train_timesteps: Annotated[int, Between(1, 10_000)] = 100
    beta_schedule: Annotated[str, OneOf("linear", "scaled_linear", "squaredcos_cap_v2")] = "squaredcos_cap_v2"
    beta_start: Annotated[float, Above(0, 0.999)] = 1e-4
    beta_end: Annotated[float, Above(0, 0.999)] = 0.02


@dataclass
class Flow:
    """`policy.process`, see `policy.process.Flow`."""

    prediction: str = "velocity"


@dataclass
class SinCos:
    """`policy.features.KEY`, see `policy.features`."""

    columns: Columns


@dataclass
class Magnified:
    """`policy.features.KEY`, see `policy.features`."""

    columns: Columns
    scale: Annotated[float, Above(0, 1e12)]


@dataclass
class PlanarObject:
    """`policy.features.KEY`, see `policy.features`."""

    pose: Pose
    points: Places
    relative: Annotated[list[Column], Sized(0, 4096)] = ()  # type: ignore[assignment]
    landmarks: Places = ()  # type: ignore[assignment]


@dataclass
class PositionFrame:
    """`policy.action_frame`, see `policy.frames.Position`."""

    observation: str
    columns: Columns
    action_columns: Columns


@dataclass
class PlanarObjectFrame:
    """`policy.action_frame`, see `policy.frames.PlanarObject`."""

    observation: str
    pose: Pose


COMPONENTS: dict[str, dict[str, type]] = {
    "encoder": {"observation": Encoder},
    "denoiser": {"unet1d": Unet1d},
    "estimator": {"planar_pose": PlanarPose},
    "process": {"diffusion": Diffusion, "flow": Flow},
    "features": {"sin_cos": SinCos, "magnified": Magnified, "planar_object": PlanarObject},
    "action_frame": {"planar_object": PlanarObjectFrame, "position": PositionFrame},
}


@dataclass(kw_only=True)
class AnySampler:
    """`sampler` of a command: null keeps what the bundle says. Which go with a scheduler: `SCHEDULERS`."""

    scheduler: Annotated[str, Matching("a word", lambda _: True)] | None = None
    num_inference_steps: Annotated[int, Between(1, MOST_STEPS)] | None = None
    clip: Annotated[str, OneOf("x0", "x")] | None = None
    clip_range: Annotated[float, Between(1, 1e6)] | None = None
    timestep_spacing: Annotated[str, OneOf("leading", "trailing", "linspace")] | None = None
    steps_offset: Annotated[int, Between(0, 10_000)] | None = None
    eta: Share | None = None
    set_alpha_to_one: bool | None = None
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
    "ddim": (*SPACED, "eta", "set_alpha_to_one"),
    "dpm_solver++": (
        *SPACED,
        *("solver_order", "solver_type", "lower_order_final", "euler_at_final", "final_sigmas_type"),
        *("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas"),
    ),
    "flow": ("shift", "stochastic_sampling"),
}
"""The options of each scheduler, beside what `policy.sampler.Sampler` takes for all of them."""


@dataclass(kw_only=True)
class Sampler(AnySampler):
    """`policy.sampler`."""

    scheduler: str = field()
    num_inference_steps: Annotated[int, Between(1, MOST_STEPS)] = field()


@dataclass
class Objective:
    """`policy.objective`, see `policy.policy.DiffusionPolicy`."""

    loss: Annotated[str, OneOf("mse", "l1", "huber")] | None = "mse"
    noise_draws: Annotated[int, Between(1, 1024)] = 1
    loss_on_padding: bool = True
    max_delay: Annotated[int, Between(0, MOST_STEPS)] = 0


EncoderSection = Annotated[Section, ByName(COMPONENTS["encoder"], POLICY_PARTS["encoder"])]
DenoiserSection = Annotated[Section, ByName(COMPONENTS["denoiser"], POLICY_PARTS["denoiser"])]
ProcessSection = Annotated[Section, ByName(COMPONENTS["process"], POLICY_PARTS["process"])]
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
    objective: Objective
    normalizer: dict[str, Annotated[str, OneOf("minmax", "gaussian", "identity")]]
    features: dict[str, FeaturesSection | None] | None = None
    action_frame: FrameSection | None = None
    estimator: EstimatorSection | None = None


# Tasks.


@dataclass
class PushT:
    """`task.env` of PushT, see `envs.pusht.PushT`."""

    image_size: Annotated[int, Between(8, 2048)] = 96
    max_steps: Count = 300
    control_rate: Annotated[float, Above(0, 100)] = 10.0


@dataclass
class Manipulation:
    """`task.env` of robosuite's tasks, see `envs.manipulation.Manipulation`."""

    env_args: Section | None = None
    absolute: bool = False
    max_steps: Count | None = None


Environment = Annotated[Section, ByName({name: PushT if name == "pusht" else Manipulation for name in ENVS.own}, ENVS)]
Rate = Annotated[float, Above(0, 10_000)]
Rotation = Annotated[str, Matching("a rotation, such as quaternion_xyzw or rotation_vector@3", bool)]
"""Of a column of the buffer: its representation (`action_diffusion.rotations.SIZES`), and @ where it begins."""
Steps = Annotated[int, Between(1, MOST_STEPS)]


@dataclass
class Observation:
    """`task.observations.KEY`: which column of the buffer, and as what."""

    source: str | None = None
    kind: Annotated[str, OneOf(*KINDS)] | None = None
    unit: str | None = None
    columns: Columns | None = None


@dataclass
class Action:
    """`task.action`."""

    source: str | None = None
    unit: str | None = None


@dataclass
class Task:
    """`task.*`: what a policy looks at and does."""

    name: str
    n_obs_steps: Steps
    horizon: Steps
    n_action_steps: Steps
    action: Action
    control_rate: Rate | None = None  # the buffer's
    data: str | list[str] | None = None
    env: Environment | None = None
    observations: dict[str, Observation | None] | None = None  # null: not this one
    estimates: dict[str, Observation] | None = None
    rotations: dict[str, Rotation | Annotated[list[Rotation], Sized(1, 100)]] | None = None

    def __post_init__(self) -> None:
        check_steps(self.n_obs_steps, self.horizon, self.n_action_steps)

    @property
    def seen(self) -> dict[str, Observation]:
        """The observations that the task names."""
        return {key: value for key, value in (self.observations or {}).items() if value is not None}


# Commands.

MOST_BUFFERS = 64
"""Together."""
Data = FilePath | Annotated[list[FilePath], Sized(1, MOST_BUFFERS)]
"""What `data=` names, see `datasets.batches.sources`; several are trained on together."""
Drop = Annotated[list[Word], Matching("names in brackets, such as [wrist,front]", bool)]
"""Names of observations that are not learnt from."""


@dataclass
class Dataset:
    """`dataset.*` of train."""

    val_fraction: Annotated[float, Between(0, below=1)] = 0.05
    max_episodes: Annotated[int, Between(1)] | None = None
    subset: Word | None = None
    memory_gb: Annotated[float, Between(0, 1e6)] | None = None
    cache_dir: FilePath | None = None
    val_windows: Annotated[int, Between(1, 1_000_000)] = 128


@dataclass
class Evaluation:
    """`evaluation.*` of train: the final one."""

    n_episodes: Annotated[int, Between(0, 100_000)] = 50
    seed: Seed = 100_000
    n_envs: Annotated[int, Between(1, 4096)] | None = None
    policy_batch: Annotated[int, Between(1, 4096)] | None = None
    n_videos: Annotated[int, Between(0, 1000)] = 6


@dataclass(kw_only=True)
class Train:
    """`action-diffusion train`."""

    data: Data
    drop: Drop | None = None
    output_dir: FilePath | None = None
    seed: Seed = 0
    device: Device = "auto"
    plugins: Plugins = None
    resume: bool = False
    init: FilePath | None = None
    dataset: Dataset = field(default_factory=Dataset)
    train: TrainSettings
    policy: Policy
    evaluation: Evaluation = field(default_factory=Evaluation)
    task: Task


@dataclass(kw_only=True)
class BundleConfig:
    """What evaluation takes of a bundle's `config.yaml`, beside the policy: the data that it was trained on."""

    data: Data
    seed: Seed
    dataset: Dataset
    task: Task
    drop: Drop | None = None


@dataclass(kw_only=True)
class Evaluate:
    """`action-diffusion evaluate`."""

    bundle: FilePath | list[FilePath]
    compare: FilePath | None = None
    n_episodes: Count = 50
    seed: Seed = 100_000
    n_envs: Annotated[int, Between(1, 4096)] | None = None
    policy_batch: Annotated[int, Between(1, 4096)] | None = None
    n_videos: Annotated[int, Between(0, 1000)] = 6
    output_dir: FilePath | None = None
    device: Device = "auto"
    precision: Precision = "fp32"
    compile: bool = False
    cuda_graph: bool = False
    plugins: Plugins = None
    data: Data | None = None
    sampler: AnySampler = field(default_factory=AnySampler)


@dataclass(kw_only=True)
class Camera:
    """`simulated.camera`: how slow and unreliable a simulated one is."""

    rate: Annotated[float, Above(0, 1000)] = 20.0
    latency: Seconds = 0.0
    jitter: Seconds = 0.0
    drop: Share = 0.0
    die_after: Seconds = 0.0
    stamped: Annotated[str, OneOf("capture", "arrival")] = "capture"
    stamp_latency: Annotated[float, Between(-100, 100)] = 0.0


@dataclass(kw_only=True)
class Simulated:
    """`simulated.*`."""

    latency: Seconds = 0.0
    camera: Camera = field(default_factory=Camera)


@dataclass(kw_only=True)
class Collect:
    """`action-diffusion collect`. `policy` and `train` are of the task, and nothing here uses them."""

    agent: Annotated[str, OneOf("expert", "teleop", "corrections", kind="agent")] = "expert"
    episodes: Count = 20
    output: FilePath
    seed: Seed = 0
    min_score: Annotated[float, Between(-1e6, 1e6)] = 0.98
    visited_by: FilePath | None = None
    workers: Annotated[int, Between(1, 1024)] | None = None
    device: str = "browser"
    device_index: Annotated[int, Between(0, 100)] = 0
    clutch: bool = False
    script: FilePath | None = None
    countdown: Seconds = 3.0
    max_seconds: Annotated[float, Above(0, 1e6)] = 120.0
    speed: Annotated[float, Above(0, 100)] = 1.0
    video: bool = False
    gripper: Annotated[list[Finite], Sized(2, 2)] | None = None
    robot: str | None = None
    hardware: FilePath | None = None
    dry_run: bool = False
    limits: Section | None = None
    obstacles: Section | None = None
    simulated: Simulated = field(default_factory=Simulated)
    page: bool | Port | None = None
    page_host: str = "127.0.0.1"
    page_token_file: FilePath | None = None
    from_: FilePath | None = None
    plugins: Plugins = None
    min_steps: Count = 5
    task: Task
    policy: Section | None = None
    train: Section | None = None


@dataclass(kw_only=True)
class RealTimeChunking:
    """`rtc.*` of deploy, see `deploy.prediction.Guidance`."""

    method: str = "auto"
    mask: str = "exponential"
    beta: Annotated[float, Above(0, 1e6)] = 5.0
    overlap: Annotated[int, Between(0, MOST_STEPS)] | None = None
    pin: bool = True
    rounds: Annotated[int, Between(0, 1000)] = 0


@dataclass(kw_only=True)
class Calibration:
    """`calibration.*` of deploy, see `deploy.calibrate_motion.Wanted`."""

    number: Annotated[int, Between(0, 1000)] = 0
    distance: Annotated[float, Above(0, 1e6)] | None = None
    period: Annotated[float, Above(0, 1e4)] = 1.719
    n_periods: Annotated[int, Between(4, 10_000)] = 6


@dataclass(kw_only=True)
class Safety:
    """`safety.*` of deploy."""

    margin: Annotated[float, Between(0, 1000)] = 0.1


@dataclass(kw_only=True)
class Deploy:
    """`action-diffusion deploy`."""

    bundle: FilePath | None = None
    server: Address | None = None
    server_timeout: Annotated[float, Above(0, 1e5)] = 5.0
    token_file: FilePath | None = None
    robot: str = "sim_pusht"
    hardware: FilePath | None = None
    dry_run: bool = False
    n_episodes: Count = 1
    seed: Seed = 100_000
    scheduling: str = "sync"
    delay: Annotated[int, Between(0, MOST_STEPS)] | None = None
    execution_horizon: Annotated[int, Between(1, MOST_STEPS)] | None = None
    rtc: RealTimeChunking = field(default_factory=RealTimeChunking)
    page: bool | Port | None = None
    page_host: str = "127.0.0.1"
    page_token_file: FilePath | None = None
    teleop: str | None = None
    wait: bool = False
    record: bool = True
    replay: FilePath | None = None
    calibrate: bool = False
    calibration: Calibration = field(default_factory=Calibration)
    plugins: Plugins = None
    output_dir: FilePath | None = None
    device: Device = "auto"
    precision: Precision = "fp32"
    compile: bool = False
    cuda_graph: bool = False
    limits: Section | None = None
    obstacles: Section | None = None
    simulated: Simulated = field(default_factory=Simulated)
    safety: Safety = field(default_factory=Safety)
    sampler: AnySampler = field(default_factory=AnySampler)


@dataclass(kw_only=True)
class Serve:
    """`action-diffusion serve`."""

    bundle: FilePath
    host: str = "127.0.0.1"
    port: Port = 8000
    token_file: FilePath | None = None
    max_connections: Annotated[int, Between(1, 10_000)] = 16
    max_message_mb: Annotated[float, Above(0, 4096)] = 16.0
    plugins: Plugins = None
    remember: bool = True
    seed: Annotated[int, Between(0, 2**63 - 1)] | None = None
    device: Device = "auto"
    precision: Precision = "fp32"
    compile: bool = False
    cuda_graph: bool = False
    sampler: AnySampler = field(default_factory=AnySampler)


COMMANDS: dict[str, type] = {
    "train": Train,
    "evaluate": Evaluate,
    "collect": Collect,
    "deploy": Deploy,
    "serve": Serve,
}


def check_steps(n_obs_steps: int, horizon: int, n_action_steps: int) -> None:
    """`InputError` for a chunk that cannot be, or that is over before what is to be executed of it."""
    for name, value in {"n_obs_steps": n_obs_steps, "horizon": horizon, "n_action_steps": n_action_steps}.items():
        check(value, Steps, name)
    if n_obs_steps - 1 + n_action_steps > horizon:
        raise InputError(
            f"n_action_steps={n_action_steps} does not fit: a chunk of horizon={horizon} that begins "
            f"{n_obs_steps - 1} steps before now has {horizon - n_obs_steps + 1} left to execute"
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


def plain(config: Train) -> dict[str, Any]:
    """A typed configuration as the command line would give it. Raises `InputError` for a value that cannot be."""
    data: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    sampler = data["policy"]["sampler"]
    data["policy"]["sampler"] = {name: value for name, value in sampler.items() if value is not None}
    check(data, Train)
    return data
