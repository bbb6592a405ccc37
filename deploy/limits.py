"""What commands must keep to. Imported by the arm's process, so nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from action_diffusion.errors import InputError, unknown

RATES = ("velocity", "acceleration", "jerk")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What commands [A] must keep to, in the data's units. None: nobody says.

    Attributes:
        low, high: the smallest and the largest command, [A] each.
        max_step: the largest change from one command to the next, [A]: for numbers that are held, not interpolated.
        velocity, acceleration, jerk: the largest magnitudes, [A] each, per s, s² and s³: for numbers that are
            interpolated. Infinity where a number is held.

    Raises:
        InputError: where shapes differ, where a limit is NaN, or where nothing lies between low and high.
    """

    low: np.ndarray
    high: np.ndarray
    max_step: np.ndarray | None = None
    velocity: np.ndarray | None = None
    acceleration: np.ndarray | None = None
    jerk: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.low.ndim != 1 or self.low.shape != self.high.shape:
            raise InputError(
                f"limits are vectors of one length, got {list(self.low.shape)} and {list(self.high.shape)}"
            )
        if not (self.low <= self.high).all():
            raise InputError(f"limits leave no room: from {self.low.tolist()} to {self.high.tolist()}")
        for name in ("max_step", *RATES):
            value = getattr(self, name)
            if value is not None and not (value.shape == self.low.shape and (value > 0).all()):
                raise InputError(f"{name} must be above 0 in each of {len(self.low)} dimensions, got {value}")

    @classmethod
    def of(cls, values: Mapping[str, Sequence[float] | None], where: str = "limits") -> Limits:
        """From plain lists, as a configuration has them. Raises `InputError` for unknown names and missing ends."""
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                raise unknown("limit", name, names, where)
        for end in ("low", "high"):
            if values.get(end) is None:
                raise InputError(f"{where}.{end} has no value: give one number for each value of a command")
        arrays = {name: np.asarray(value, dtype=np.float64) for name, value in values.items() if value is not None}
        return cls(**arrays)

    def plain(self) -> dict[str, list[float]]:
        """What `of` reads."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.tolist() for name, value in values.items() if value is not None}

    def within(self, other: Limits | None) -> Limits:
        """What keeps to these limits and to `other`."""
        if other is None:
            return self
        if other.low.shape != self.low.shape:
            raise InputError(f"the limits of commands of {len(self.low)} and {len(other.low)} values do not combine")
        least: dict[str, np.ndarray] = {}
        for name in ("max_step", *RATES):
            given = [getattr(limits, name) for limits in (self, other) if getattr(limits, name) is not None]
            if given:
                least[name] = np.min(given, axis=0)
        return Limits(low=np.maximum(self.low, other.low), high=np.minimum(self.high, other.high), **least)
