"""What needs no policy: the error of standing still, and of doing what was done last, on the same windows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

_RATES = re.compile(r"vel|speed|twist|effort|torque|current|force|acc", re.IGNORECASE)
"""In the names of states that are no positions, whatever the action is."""
_NEAR = 0.1
"""Of the action's range: mean distance of a commanded position from the measured one."""
_ALIKE = 0.9
"""Correlation of the two."""


def chunks(
    states: Mapping[str, np.ndarray], before: np.ndarray, action: np.ndarray, span: np.ndarray, names: Sequence[str]
) -> dict[str, tuple[np.ndarray, dict[str, str]]]:
    """By name: the action [N, A] that is repeated in each window, and what each dimension's is made of.

    hold_still: the position measured now, in dimensions that are positions: those whose actions are near to a measured
    state and move with it. In others the action before. repeat_last_action: the action before in all.

    Args:
        states: [N, D] each, as measured now.
        before, action: [N, A], of the row before now, and of now.
        span: [A], the action's range.
    """
    last = {name: "the action before" for name in names}
    still, made_of = before.copy(), dict(last)
    measured = {
        f"{key}[{column}]": values[:, column]
        for key, values in states.items()
        if not _RATES.search(key)
        for column in range(values.shape[1])
    }
    for index, name in enumerate(names):
        position = _position(measured, action[:, index], span[index])
        if position is not None:
            still[:, index], made_of[name] = measured[position], position
    return {"hold_still": (still, made_of), "repeat_last_action": (before, last)}


def _position(measured: Mapping[str, np.ndarray], action: np.ndarray, span: float) -> str | None:
    """Which state `action` [N] commands, if any."""
    if np.ptp(action) == 0:
        return None
    far = {key: np.abs(values - action).mean() for key, values in measured.items() if np.ptp(values) > 0}
    nearest = min(far, key=lambda key: far[key], default=None)
    if nearest is None or far[nearest] > _NEAR * span:
        return None
    return nearest if np.corrcoef(measured[nearest], action)[0, 1] >= _ALIKE else None
