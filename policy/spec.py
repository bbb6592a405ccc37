"""What a policy expects and returns, written beside its weights so that a mismatch is refused and never guessed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import numpy as np

from action_diffusion.errors import InputError, unknown
from action_diffusion.options import KINDS, Environment, Rate, Sentence, Steps, TextEncoder, check_steps
from action_diffusion.registry import check_required
from action_diffusion.rotations import RotationColumns, check_rotations
from action_diffusion.schema import Between, OneOf, Sized, check, shown

FORMAT = 1
IN_FRAME = "action_in_frame"
"""The normaliser's key for actions in the policy's action frame; "action" is always for those in the data's units."""
MOST_VALUES = 100_000
"""Of a state, or of an action; an image may have as many pixels as `MOST_BYTES` allows."""
MOST_BYTES = 2**30
"""Of the observations that a policy sees at once."""
MOST_SENTENCES = 1000
"""That a bundle keeps of those that it was trained on."""
MOST_ACTION = 1e30
"""What a normalised value near 0 may stand for, in the data's units."""
CONSTANT = 1e-6
"""A dimension whose range is below this share of its magnitude (or below this, near zero) counts as constant."""
DTYPES = ("float16", "float32", "float64", "uint8", "uint16", "int16", "int32", "int64", "bool")
Side = Annotated[int, Between(1, MOST_VALUES)]
Dtype = Annotated[str, OneOf(*DTYPES)]
Rotations = Annotated[tuple[RotationColumns, ...], Sized(0, 100)]
Vector = Annotated[tuple[Annotated[float, Between(-3e38, 3e38)], ...], Sized(1, MOST_VALUES)]


@dataclass(frozen=True)
class TextSpec:
    """How words become an observation's vector. encoder: {name, …} of `registry.TEXT_ENCODERS`. version: what it says
    of itself; another one makes other vectors. None: its options say all. sentences: trained on, the first of them."""

    encoder: TextEncoder
    version: str | None = None
    sentences: Annotated[tuple[Sentence, ...], Sized(1, MOST_SENTENCES)] = ()


@dataclass(frozen=True)
class ObservationSpec:
    """One observation key. shape: of one step; images are uint8 [H, W, 3], depth is uint16 [H, W] in mm, 0 where it is
    unknown, points are [P, 3] in one frame or [P, 6] with colours, words are a vector, as `text` says. unit: of the
    values, for people.

    source and columns: the replay buffer's key and the columns of it that this key was trained on. rotations: the
    values that are some, of which the policy takes any sign and any turn.
    """

    shape: Annotated[tuple[Side, ...], Sized(0, 4)]
    dtype: Dtype = "float32"
    unit: str = ""
    kind: Annotated[str, OneOf(*KINDS)] = "state"
    source: str = ""
    columns: tuple[Annotated[int, Between(0)], ...] | None = None
    rotations: Rotations = ()
    text: TextSpec | None = None

    def __post_init__(self) -> None:
        values = math.prod(self.shape)
        if (self.kind == "text") != (self.text is not None):
            raise InputError("an observation has kind: text and says in text: how words become a vector, or neither")
        if self.kind == "image" and (len(self.shape) != 3 or self.shape[2] != 3):
            raise InputError(f"an image of shape {list(self.shape)}: images are [height, width, 3]")
        if self.kind == "depth" and (len(self.shape) != 2 or self.dtype != "uint16"):
            raise InputError(f"depth of shape {list(self.shape)} of {self.dtype}: it is [height, width] of uint16")
        if self.kind == "points" and (len(self.shape) != 2 or self.shape[1] not in (3, 6)):
            raise InputError(f"points of shape {list(self.shape)}: they are [points, 3], or [points, 6] with colours")
        if self.kind not in ("image", "depth") and values > MOST_VALUES:
            raise InputError(f"a state of shape {list(self.shape)} has {values:,} values, more than {MOST_VALUES:,}")
        check_rotations(self.rotations, values)


@dataclass(frozen=True)
class ActionSpec:
    """The action of one step: shape [A], unit, the replay buffer's key, and the values that are rotations."""

    shape: Annotated[tuple[Annotated[int, Between(1, 4096)], ...], Sized(1, 1)]
    dtype: Dtype = "float32"
    unit: str = ""
    source: str = "action"
    rotations: Rotations = ()

    def __post_init__(self) -> None:
        check_rotations(self.rotations, self.shape[0])


@dataclass(frozen=True)
class Statistics:
    """Of the normaliser, for one key: what `normalizer.fit` gives, numbers for each dimension."""

    scale: Vector
    offset: Vector
    kind: Annotated[str, OneOf("minmax", "gaussian", "identity")] = "minmax"
    min: Vector | None = None
    max: Vector | None = None

    def __post_init__(self) -> None:
        given = [part for part in (self.scale, self.offset, self.min, self.max) if part is not None]
        lengths = [len(part) for part in given]
        if len(set(lengths)) > 1:
            raise InputError(f"normaliser statistics of {lengths} dimensions, expected equal numbers of them")
        if (self.min is None) != (self.max is None):
            raise InputError("normaliser statistics have one of min and max, expected both")
        for scale, offset in zip(self.scale, self.offset, strict=True):
            if not abs(scale) > (1 + abs(offset)) / MOST_ACTION:
                raise InputError(f"normaliser statistics: scale={scale} with offset={offset} leads to no number")


def env_words(env: Mapping[str, Any]) -> str:
    """The simulator and the length of its episodes: what two evaluations on the same starts have in common."""
    return f"{env['name']} of {env['max_steps']} steps" if env.get("max_steps") else str(env["name"])


@dataclass(frozen=True)
class PolicySpec:
    """Everything that a caller of a policy must know. Observations are in order; cameras in the order trained on.

    control_rate: Hz, at which actions are meant to be executed. normalizer: key → statistics (`normalizer.fit`).
    demonstrations: who gave them, in words ("scripted expert"), where their buffer says so. estimates: states that are
    recorded and not observed, which the policy learns to tell. buffer_columns: what became of each column that the
    demonstrations have, in words. requires: parts of somebody else's ("encoder mine") → the package and its version, or
    the file of `plugins=`.
    """

    observations: Annotated[dict[str, ObservationSpec], Sized(1, 256)]
    action: ActionSpec
    n_obs_steps: Steps
    horizon: Steps
    n_action_steps: Steps
    control_rate: Rate
    task: str = ""
    env: Environment | None = None
    demonstrations: str = ""
    estimates: dict[str, ObservationSpec] = field(default_factory=dict)
    normalizer: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    buffer_columns: dict[str, str] = field(default_factory=dict)
    requires: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_steps(self.n_obs_steps, self.horizon, self.n_action_steps)
        seen = sum(math.prod(value.shape) * np.dtype(value.dtype).itemsize for value in self.observations.values())
        if seen * self.n_obs_steps > MOST_BYTES:
            raise InputError(
                f"{self.n_obs_steps} steps of observations take {seen * self.n_obs_steps / 1e9:.3g} GB, at most "
                f"{MOST_BYTES / 1e9:.3g} GB can be"
            )

    @property
    def noise_shape(self) -> tuple[int, int]:
        """[H, D] of the noise that a chunk is made of, and of the chunk as the denoiser has it: of an action in the
        policy's frame, which may have another number of values than one in the data."""
        in_frame = self.normalizer.get(IN_FRAME)
        return self.horizon, self.action.shape[0] if in_frame is None else len(in_frame["scale"])

    @property
    def states(self) -> dict[str, ObservationSpec]:
        """Vectors, which are neither images nor depth nor points: observed, or estimated."""
        vectors = {key: value for key, value in self.observations.items() if value.kind in ("state", "text")}
        return vectors | self.estimates

    @property
    def depths(self) -> dict[str, ObservationSpec]:
        return {key: value for key, value in self.observations.items() if value.kind == "depth"}

    @property
    def points(self) -> dict[str, ObservationSpec]:
        return {key: value for key, value in self.observations.items() if value.kind == "points"}

    @property
    def texts(self) -> dict[str, TextSpec]:
        """The observations that are words, as vectors."""
        return {key: value.text for key, value in self.observations.items() if value.text is not None}

    @property
    def cameras(self) -> list[str]:
        """What cameras have to show: images, and depth."""
        return [*self.camera_order, *self.depths]

    @property
    def camera_order(self) -> list[str]:
        """Images, which the encoder sees in this order."""
        return [key for key, value in self.observations.items() if value.kind == "image"]

    def to_json(self) -> dict[str, Any]:
        """Plain data for `spec.json`."""
        return {"format": FORMAT, **asdict(self), "camera_order": self.camera_order}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> PolicySpec:
        """The inverse of `to_json`; `InputError` names what is missing or unknown. `where`: the file."""
        if data.get("format") != FORMAT:
            raise InputError(f"{where}: bundle format {data.get('format')!r}, this version reads format {FORMAT}")
        check_required(check(data.get("requires", {}), dict[str, str], f"{where}: requires"), where)
        order = data.get("camera_order")
        try:
            spec: PolicySpec = check({key: data[key] for key in data if key not in ("format", "camera_order")}, cls)
            check(spec.normalizer, dict[str, Statistics], "normalizer")
        except InputError as error:
            raise InputError(f"{where}: not a complete policy specification: {error}") from None
        if order != spec.camera_order:
            raise InputError(
                f"{where}: camera_order is {order}, but the observations list the cameras as {spec.camera_order}"
            )
        for key in (*spec.states, *spec.depths, *spec.points, "action"):
            if key not in spec.normalizer:
                raise InputError(f"{where}: no normaliser statistics for {key!r}; the bundle cannot be used without")
        return spec

    def difference(self, other: PolicySpec) -> str:
        """Whether callers of this policy can go on with `other`: "" if so, else what would be new to them, in words.

        Weights, statistics, and where the data lay that a policy was trained on, may differ.
        """
        ours, theirs = (_contract(spec) for spec in (self, other))
        for key in {**ours, **theirs}:
            if ours.get(key) != theirs.get(key):
                return f"{key} is {shown(theirs.get(key) or 'none')}, not {shown(ours.get(key) or 'none')}"
        return ""

    def check(self, observations: Mapping[str, np.ndarray]) -> bool:
        """Refuse observations that differ from what was trained on; returns whether they have a batch axis.

        Each must be [To, *shape] or [B, To, *shape], finite, and images uint8.
        """
        for key in observations:
            if key not in self.observations:
                raise unknown("observation", key, self.observations)
        batched = None
        for key, spec in self.observations.items():
            if key not in observations:
                raise InputError(
                    f"observation {key!r} is missing: the policy takes {list(self.observations)}, "
                    f"got {list(observations)}"
                )
            value = np.asarray(observations[key])
            expected = (self.n_obs_steps, *spec.shape)
            if value.shape != expected and value.shape[1:] != expected:
                raise InputError(
                    f"observation {key!r} has shape {list(value.shape)}, the policy takes "
                    f"[{', '.join(map(str, expected))}] or the same with a batch axis in front"
                )
            if batched is not None and batched != (value.shape != expected):
                raise InputError(f"observation {key!r}: either all observations have a batch axis or none")
            batched = value.shape != expected
            if spec.kind == "image" and value.dtype != np.uint8:
                raise InputError(f"observation {key!r} has dtype {value.dtype}, images are uint8 from 0 to 255")
            if spec.kind != "image" and not np.isfinite(value).all():
                raise InputError(f"observation {key!r} holds NaN or infinite values")
        return bool(batched)


def _contract(spec: PolicySpec) -> dict[str, Any]:
    """What a caller depends on, by name."""
    parts = {f"observation {key}": value for key, value in spec.observations.items()} | {"action": spec.action}
    sizes = ("n_obs_steps", "horizon", "n_action_steps", "control_rate")
    named = {
        f"{name}, {field}": getattr(part, field, "")
        for name, part in parts.items()
        for field in ("shape", "dtype", "unit", "kind", "rotations")
    }
    return {name: getattr(spec, name) for name in sizes} | named | {"noise_shape": spec.noise_shape}


def action_span(spec: PolicySpec) -> np.ndarray:
    """How far each dimension of the action [A] reaches in the data; two normalised units where nobody says."""
    statistics = spec.normalizer["action"]
    if statistics.get("min") is None:
        return np.asarray(2.0 / np.abs(statistics["scale"]))
    return np.asarray(np.subtract(statistics["max"], statistics["min"]))
