"""What a policy expects and returns, written beside its weights so that a mismatch is refused and never guessed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from action_diffusion.errors import InputError, unknown

FORMAT = 1
KINDS = ("state", "image")
LATER = ("demonstrations", "estimates", "buffer_columns")  # fields that bundles of earlier versions lack


@dataclass(frozen=True)
class ObservationSpec:
    """One observation key. shape: of one step; images are uint8 [H, W, 3]. unit: of the values, for people.

    source and columns: the replay buffer's key and the columns of it that this key was trained on.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    unit: str = ""
    kind: str = "state"
    source: str = ""
    columns: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ActionSpec:
    """The action of one step: shape [A], unit, and the replay buffer's key."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    unit: str = ""
    source: str = "action"


@dataclass(frozen=True)
class PolicySpec:
    """Everything that a caller of a policy must know. Observations are in order; cameras in the order trained on.

    control_rate: Hz, at which actions are meant to be executed. normalizer: key → statistics (`normalizer.fit`).
    demonstrations: who gave them, in words ("scripted expert"), where their buffer says so. estimates: states that are
    recorded and not observed, which the policy learns to tell. buffer_columns: what became of each column that the
    demonstrations have, in words.
    """

    observations: dict[str, ObservationSpec]
    action: ActionSpec
    n_obs_steps: int
    horizon: int
    n_action_steps: int
    control_rate: float
    task: str = ""
    env: dict[str, Any] | None = None
    demonstrations: str = ""
    estimates: dict[str, ObservationSpec] = field(default_factory=dict)
    normalizer: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    buffer_columns: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("n_obs_steps", "horizon", "n_action_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_obs_steps - 1 + self.n_action_steps > self.horizon:
            raise InputError(
                f"n_action_steps={self.n_action_steps} does not fit: a chunk of horizon={self.horizon} that begins "
                f"{self.n_obs_steps - 1} steps before now has {self.horizon - self.n_obs_steps + 1} left to execute"
            )

    @property
    def states(self) -> dict[str, ObservationSpec]:
        """What is not an image: observed, or estimated."""
        return {key: value for key, value in self.observations.items() if value.kind == "state"} | self.estimates

    @property
    def camera_order(self) -> list[str]:
        return [key for key, value in self.observations.items() if value.kind == "image"]

    def to_json(self) -> dict[str, Any]:
        """Plain data for `spec.json`."""
        return {"format": FORMAT, **asdict(self), "camera_order": self.camera_order}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> PolicySpec:
        """The inverse of `to_json`; `InputError` names what is missing or unknown. `where`: the file."""
        if data.get("format") != FORMAT:
            raise InputError(f"{where}: bundle format {data.get('format')!r}, this version reads format {FORMAT}")
        try:
            fields = {key: data[key] for key in cls.__dataclass_fields__ if key not in LATER or key in data}
            for name in ("observations", "estimates"):
                states = data.get(name, {}) if name in LATER else data[name]
                fields[name] = {key: ObservationSpec(**_tuples(value)) for key, value in states.items()}
            fields["action"] = ActionSpec(**_tuples(data["action"]))
            order = data["camera_order"]
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{where}: not a complete policy specification: {error}") from None
        spec = cls(**fields)
        if order != spec.camera_order:
            raise InputError(
                f"{where}: camera_order is {order}, but the observations list the cameras as {spec.camera_order}"
            )
        for key in (*spec.states, "action"):
            if key not in spec.normalizer:
                raise InputError(f"{where}: no normaliser statistics for {key!r}; the bundle cannot be used without")
        return spec

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
            if spec.kind == "state" and not np.isfinite(value).all():
                raise InputError(f"observation {key!r} holds NaN or infinite values")
        return bool(batched)


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
