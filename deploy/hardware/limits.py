"""What commands must keep to. Imported by the arm's process, so nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping
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
    def of(cls, values: object, where: str = "limits") -> Limits:
        """From plain lists, as a configuration has them.

        Raises `InputError` for unknown names, missing ends, anything but lists of numbers, and where an axis is left no
        room to move.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping):
            raise InputError(f"{where}={str(values)[:80]}: write {{low: […], high: […], velocity: […], …}}")
        for name in values:
            if name not in names:
                raise unknown("limit", str(name), names, where)
        for end in ("low", "high"):
            if values.get(end) is None:
                raise InputError(f"{where}.{end} has no value: give one number for each value of a command")
        given = {name: value for name, value in values.items() if value is not None}
        limits = cls(**{name: numbers(value, f"{where}.{name}") for name, value in given.items()})
        if not (limits.low < limits.high).all():
            raise InputError(f"{where} leave no room: from {limits.low.tolist()} to {limits.high.tolist()}")
        return limits

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
        both = Limits(low=np.maximum(self.low, other.low), high=np.minimum(self.high, other.high), **least)
        if ((both.low == both.high) & (self.low < self.high) & (other.low < other.high)).any():
            raise InputError(f"limits leave no room: from {both.low.tolist()} to {both.high.tolist()}")
        return both


def numbers(value: object, where: str, *, axes: int = 1) -> np.ndarray:
    """float64 of `axes` axes from lists as a configuration has them. Raises `InputError` for anything else, and NaN."""
    example = "[0.1, …]" if axes == 1 else "[[0.1, …], …]"
    try:
        array = np.array(value)
        if array.dtype.kind not in "iuf" or array.ndim != axes or not array.size or np.isnan(array).any():
            raise ValueError
        return array.astype(np.float64)
    except (ValueError, TypeError, OverflowError):
        raise InputError(f"{where}={str(value)[:80]}: expected numbers, {example}") from None


def outside(what: str, values: np.ndarray, limits: Limits) -> str | None:
    """Which of `values` [A] is beyond `limits`, in one line that begins with `what`; None where none is."""
    beyond = (values < limits.low) | (values > limits.high)
    if not beyond.any():
        return None
    i = int(beyond.argmax())
    return f"{what}[{i}] = {values[i]:g} is outside [{limits.low[i]:g}, {limits.high[i]:g}]"
