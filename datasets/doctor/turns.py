"""Rotations whose numbers jump although nothing turns: another sign of a quaternion, the other end of a rotation
vector's axis, an angle that wraps.

What the buffer does not say (`datasets.storage.rotations`) is told from the values: four of unit length that turn
into their negative, three that go from half a turn to the opposite half turn, an angle that makes a step of a whole
turn beside two others that keep within one. A single angle that wraps is how a planar pose is written, and left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from action_diffusion.datasets.doctor.finding import Finding
from action_diffusion.rotations import WIDTHS, RotationColumns, nearest

if TYPE_CHECKING:
    from action_diffusion.datasets.doctor.survey import Survey

_MOST = 0.99
"""Of the rows that must look like a rotation."""
_CLEAR = 0.5
"""Of the large steps that must be a change of name: others are faults, or noise."""
_ANGLES = re.compile(r"euler|rpy|roll|pitch|yaw|orient|(^|_)rot", re.IGNORECASE)
_WORDS = {4: "the quaternion changes its sign", 3: "the rotation vector goes to the other end of its axis"}
_NONE = "drop the episode, or write the rotations that were meant"
_PERIODS = {"angle": 2 * np.pi, "angle_degrees": 360.0}


def renamed(survey: Survey) -> Iterator[Finding]:
    """A finding for each episode in which a rotation's numbers jump, that begins with the other sign than most, or
    that has quaternions of zeros."""
    for key, low in survey.low.items():
        rows = low.raw.astype(np.float64)
        for rotation in low.rotations:
            part = rows[:, rotation.columns]
            changed = np.zeros(len(part), bool)
            with np.errstate(invalid="ignore"):
                changed[1:] = (nearest(part[1:], part[:-1], rotation.representation) != part[1:]).any(axis=1)
                changed &= ~survey.first & np.isfinite(part).all(axis=1) & np.roll(low.finite, 1)
                other = part[survey.starts] @ rotation.origin < -0.5
            size = part.shape[1]
            dimensions = tuple(range(rotation.first, rotation.first + size))
            where = f"dimension{'s' * (size > 1)} {rotation.first}{f' to {dimensions[-1]}' * (size > 1)}"
            place, missing = f"{rotation.representation}@{rotation.first}", rotation.missing(rows)
            for episode, (start, end) in enumerate(zip(survey.starts, survey.ends, strict=True)):
                none = np.flatnonzero(missing[start:end]) + start
                if len(none):
                    span, what = (int(none[0]), int(none[-1])), "zeros" if size == 4 else "zero or parallel axes"
                    words = f"{where}: {what}, which are no rotation"
                    yield Finding(
                        "rotation", key, episode, *span, len(none), words, _NONE, dimensions=dimensions, rotation=place
                    )
                found = np.flatnonzero(changed[start:end]) + start
                if len(found):
                    n = f"{len(found)} row{'s' * (len(found) > 1)}"
                    words = f"{where}: {_WORDS.get(size, 'the angle wraps')} in {n}"
                elif size == 4 and other[episode]:
                    found, words = (
                        np.asarray([start]),
                        f"{where}: the other sign of the quaternion than in most episodes",
                    )
                else:
                    continue
                span = int(found[0]), int(found[-1])
                yield Finding("rotation", key, episode, *span, len(found), words, dimensions=dimensions, rotation=place)


def recognised(
    key: str, values: np.ndarray, inner: np.ndarray, periods: Sequence[float | None]
) -> list[RotationColumns]:
    """What of a column's finite `values` [N, D] are rotations whose numbers jump. inner: [N], rows that are not their
    episode's first. periods: [D] of angles that wrap."""
    found: list[RotationColumns] = []
    n = values.shape[1]
    for size, kind in ((4, "quaternion"), (3, "rotation_vector")):
        gains = []
        for first in range(n - size + 1):
            gain = _gain(key, values[:, first : first + size], inner, kind, first)
            gains += [] if gain is None else [(gain, first)]
        for _, first in sorted(gains, reverse=True):
            if all(first + size <= other.first or other.columns.stop <= first for other in found):
                found.append(RotationColumns(first, kind))
    taken = {column for one in found for column in range(one.first, one.columns.stop)}
    for column in sorted(set(range(n)) - taken):
        for kind, period in _PERIODS.items():
            if (
                period == periods[column]
                and _wraps(values[:, column], inner, period)
                and (_ANGLES.search(key) or _among_angles(values, column, period))
            ):
                found.append(RotationColumns(column, kind))
    return sorted(found, key=lambda rotation: rotation.first)


def placed(rotation: RotationColumns, values: np.ndarray, starts: np.ndarray) -> RotationColumns:
    """Around the mean rotation of `values` [N, D], a quaternion with the sign that most episodes begin with."""
    fitted = rotation.fitted(values)
    if WIDTHS[rotation.representation] == 4:
        signs = np.sign(values[starts][:, rotation.columns] @ np.asarray(fitted.origin))
        if np.nansum(signs) < 0:
            fitted = replace(fitted, reference=tuple(-value for value in fitted.origin))
    return fitted


def _gain(key: str, part: np.ndarray, inner: np.ndarray, kind: str, first: int) -> float | None:
    """By how much the square of a large step of `part` [N, n] shrinks with another name for the rotation, in the mean;
    None where it is no rotation.

    It is most for the right columns: beside them is one that changes its sign and is left out, or one that need not.
    """
    length = np.linalg.norm(part, axis=1)
    quaternion = kind == "quaternion"
    fits = np.abs(length - 1) < 1e-3 if quaternion else length < np.pi + 0.01
    named = quaternion and "quat" in key.lower() and first % 4 == 0
    if fits.mean() < _MOST and not named:
        return None
    rows = np.flatnonzero(inner)
    steps = part[rows] - part[rows - 1]
    large = (part[rows] * part[rows - 1]).sum(axis=1) < 0 if quaternion else np.linalg.norm(steps, axis=1) > np.pi
    rows, steps = rows[large], steps[large]
    if not len(rows):
        return 0.0 if named or (quaternion and (np.ptp(part, axis=0) > 0).sum() >= 3) else None
    left = nearest(part[rows], part[rows - 1], kind) - part[rows - 1]
    if np.mean(np.linalg.norm(left, axis=1) < np.linalg.norm(steps, axis=1) / 2) < _CLEAR:
        return None
    gain = float(np.mean((steps**2 - left**2).sum(axis=1)))
    unwrapped = nearest(part[rows], part[rows - 1], "angle") - part[rows - 1]
    as_angle = np.mean(steps**2 - unwrapped**2, axis=0).max()
    return gain if quaternion or gain >= as_angle else None


def _wraps(angle: np.ndarray, inner: np.ndarray, period: float) -> bool:
    steps = np.abs(angle[1:] - angle[:-1])[inner[1:]]
    large = steps[steps > period / 2]
    return bool(np.mean(np.abs(large - period) < 0.1 * period) >= _CLEAR)


def _among_angles(values: np.ndarray, column: int, period: float) -> bool:
    """Whether two neighbours of an angle keep within a turn as well, as three Euler angles do."""
    within = [
        any(np.mean((part >= low - 0.01) & (part <= low + period + 0.01)) > _MOST for low in (0.0, -period / 2))
        and np.ptp(part) > 0
        for part in values.T
    ]
    return any(
        first >= 0 and all(within[first : first + 3])
        for first in range(column - 2, column + 1)
        if first + 3 <= len(within)
    )
