"""Options of the other commands, and all commands by name."""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated

from action_diffusion.errors import InputError
from action_diffusion.options.bundle import BundleExport, BundleImport, BundleInspect, BundlePull, BundlePush
from action_diffusion.options.data import Absolute, Augment, Convert, DataReport, Doctor, Edit, Inspect, View
from action_diffusion.options.extensions import FITS, Fit, Intending
from action_diffusion.options.finetune import Finetune
from action_diffusion.options.policy import AnySampler
from action_diffusion.options.task import Sentence, Task
from action_diffusion.options.train import Data, Train
from action_diffusion.options.words import (
    MOST_STEPS,
    Address,
    Count,
    Device,
    Extensions,
    Finite,
    Plugins,
    Port,
    Precision,
    Seconds,
    Seed,
    Share,
    Workers,
)
from action_diffusion.schema import Above, Between, FilePath, Matching, OneOf, Section, Sized


@dataclass(kw_only=True)
class CameraTiming:
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
    camera: CameraTiming = field(default_factory=CameraTiming)


@dataclass(kw_only=True)
class Collect:
    """`action-diffusion collect`. `policy` and `train` are of the task, and nothing here uses them."""

    agent: Annotated[str, OneOf("expert", "teleop", "corrections", kind="agent")] = "expert"
    episodes: Count = 20
    output: FilePath
    seed: Seed = 0
    min_score: Annotated[float, Between(-1e6, 1e6)] = 0.98
    visited_by: FilePath | None = None
    workers: Workers | None = None
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
class RtcSettings:
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
class GuardSettings:
    """`guard.*` of deploy, see `deploy.loop.guarding`."""

    action: Annotated[str, OneOf("warn", "slow", "hold", "takeover")] = "warn"


@dataclass(kw_only=True)
class OnRobot:
    """What `deploy`, and `evaluate robot=…`, say of a policy that runs on a robot."""

    hardware: FilePath | None = None
    dry_run: bool = False
    scheduling: str = "sync"
    execution_horizon: Annotated[int, Between(1, MOST_STEPS)] | None = None
    seed: Seed = 100_000
    page: bool | Port | None = None
    page_host: str = "127.0.0.1"
    page_token_file: FilePath | None = None
    extensions: Extensions | None = None
    intents: Intending = field(default_factory=Intending)
    plugins: Plugins = None
    output_dir: FilePath | None = None
    device: Device = "auto"
    precision: Precision = "fp32"
    compile: bool = False
    cuda_graph: bool = False
    limits: Section | None = None
    obstacles: Section | None = None
    safety: Safety = field(default_factory=Safety)
    sampler: AnySampler = field(default_factory=AnySampler)
    instruction: Sentence | None = None
    text_model: FilePath | None = None


@dataclass(kw_only=True)
class Deploy(OnRobot):
    """`action-diffusion deploy`."""

    bundle: FilePath | None = None
    server: Address | None = None
    server_timeout: Annotated[float, Above(0, 1e5)] = 5.0
    token_file: FilePath | None = None
    robot: str = "sim_pusht"
    n_episodes: Count = 1
    delay: Annotated[int, Between(0, MOST_STEPS)] | None = None
    rtc: RtcSettings = field(default_factory=RtcSettings)
    teleop: str | None = None
    wait: bool = False
    record: bool = True
    replay: FilePath | None = None
    calibrate: bool = False
    calibration: Calibration = field(default_factory=Calibration)
    simulated: Simulated = field(default_factory=Simulated)
    guard: GuardSettings = field(default_factory=GuardSettings)

    def __post_init__(self) -> None:
        chosen = [f"sampler.{name}" for name, value in vars(self.sampler).items() if value is not None]
        chosen += [f"intents.{name}" for name, value in vars(self.intents).items() if value is not None]
        chosen += [name for name in ("extensions", "compile", "cuda_graph") if getattr(self, name)]
        if self.server is not None and chosen:
            raise InputError(f"{chosen[0]} is for whoever predicts: give it to action-diffusion serve")


@dataclass(kw_only=True)
class Evaluate(OnRobot):
    """`action-diffusion evaluate`: in simulation, on held-out episodes, or, with `robot`, on a robot."""

    bundle: FilePath | list[FilePath] | None = None
    compare: FilePath | None = None
    n_episodes: Count = 50
    n_envs: Annotated[int, Between(1, 4096)] | None = None
    policy_batch: Annotated[int, Between(1, 4096)] | None = None
    workers: Workers | None = None
    n_videos: Annotated[int, Between(0, 1000)] = 6
    data: Data | None = None
    robot: str | None = None
    bundles: FilePath | list[FilePath] | None = None
    trials: Annotated[int, Between(1, 10_000)] = 20

    def __post_init__(self) -> None:
        if self.bundle is None and self.bundles is None:
            raise InputError("bundle is required: action-diffusion evaluate bundle=…")
        if self.bundle is not None and self.bundles is not None:
            raise InputError("bundle= and bundles= are the same: give one of them")
        defaults = {
            one.name: one.default if one.default_factory is MISSING else one.default_factory() for one in fields(self)
        }
        for name in ON_ROBOT if self.robot is None else NOT_ON_ROBOT:
            if getattr(self, name) != defaults[name]:
                raise InputError(
                    f"{name}= is for a robot: give robot=…"
                    if self.robot is None
                    else f"{name}= means nothing with robot=…"
                )

    @property
    def paths(self) -> list[str]:
        """The bundles, one or several."""
        given = self.bundle if self.bundles is None else self.bundles
        return [given] if isinstance(given, str) else list(given or ())

    def deployment(self, bundle: str) -> Deploy:
        """What runs `bundle` on the robot."""
        same = {one.name: getattr(self, one.name) for one in fields(OnRobot)}
        return Deploy(bundle=bundle, robot=self.robot or "", **same)


ON_ROBOT = (
    *("trials", "hardware", "dry_run", "scheduling", "execution_horizon", "limits", "obstacles", "safety"),
    *("page", "page_host", "page_token_file"),
)
NOT_ON_ROBOT = ("compare", "n_episodes", "n_envs", "policy_batch", "workers", "n_videos", "data")
"""Options of `Evaluate` that mean something only with `robot`, and only without."""


ONLY_SERVED = "default"
"""The name of a policy that was given none."""
ANSWERED = ("healthz", "readyz", "metrics")
"""What a server answers at itself, beside its policies by name."""
Served = Annotated[
    dict[str, FilePath],
    Matching(
        f"1 to 64 policies by name, {{a: DIR, b: DIR}}, by letters, digits, - and _, and not {' or '.join(ANSWERED)}",
        lambda bundles: (
            0 < len(bundles) <= 64
            and all(re.fullmatch(r"[\w-]{1,64}", name, re.ASCII) for name in bundles)
            and not bundles.keys() & set(ANSWERED)
        ),
    ),
]


@dataclass(kw_only=True)
class Serve:
    """`action-diffusion serve`."""

    bundle: FilePath | None = None
    bundles: Served | None = None
    host: str = "127.0.0.1"
    port: Port = 8000
    token_file: FilePath | None = None
    max_connections: Annotated[int, Between(1, 10_000)] = 16
    copies: Annotated[int, Between(1, 64)] = 1
    max_batch: Annotated[int, Between(1, 256)] | None = None
    batch_wait_ms: Annotated[float, Between(0, 1000)] = 2.0
    max_message_mb: Annotated[float, Above(0, 4096)] = 16.0
    extensions: Extensions | None = None
    intents: Intending = field(default_factory=Intending)
    plugins: Plugins = None
    remember: bool = True
    seed: Annotated[int, Between(0, 2**63 - 1)] | None = None
    device: Device = "auto"
    precision: Precision = "fp32"
    compile: bool = False
    cuda_graph: bool = False
    sampler: AnySampler = field(default_factory=AnySampler)
    instruction: Sentence | None = None
    text_model: FilePath | None = None

    @property
    def named(self) -> dict[str, str]:
        """Paths by the names that clients ask for. Raises `InputError` for none, and for both ways to give them."""
        if self.bundles is not None and self.bundle is not None:
            raise InputError("bundle= and bundles= are both given: give one bundle, or several by name")
        if self.bundles is not None:
            return self.bundles
        if self.bundle is None:
            raise InputError("bundle is required: action-diffusion serve bundle=…, or bundles={a: DIR, b: DIR}")
        return {ONLY_SERVED: self.bundle}

    @property
    def batch_of(self) -> int:
        """The most questions that are answered together: each number of them is compiled on its own."""
        return self.max_batch or (1 if self.compile else 8)


COMMANDS: dict[str, type] = {
    "train": Train,
    "finetune": Finetune,
    "evaluate": Evaluate,
    "collect": Collect,
    "deploy": Deploy,
    "serve": Serve,
    "bundle inspect": BundleInspect,
    "bundle import": BundleImport,
    "bundle push": BundlePush,
    "bundle pull": BundlePull,
    "bundle export": BundleExport,
    "data convert": Convert,
    "data absolute": Absolute,
    "data augment": Augment,
    "data inspect": Inspect,
    "data report": DataReport,
    "data view": View,
    "data doctor": Doctor,
    "data edit": Edit,
    "fit": Fit,
    **{f"fit {name}": fit for name, fit in FITS.items()},
}
