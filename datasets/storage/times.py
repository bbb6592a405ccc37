"""How many rows a second a recording has by its time stamps, where its attributes do not say."""

from __future__ import annotations

import numpy as np

from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer

_RATES = (2.0, 2000.0)
"""Hz. Outside of these, the times are milliseconds, or numbers of frames."""
_GAP = 1.5
"""Of the usual step: what is longer is a gap, and says nothing of the rate."""

_BACK = 0.05
"""Of the steps: where more do not go forward, the column is no clock."""


def is_time(key: str) -> bool:
    """Whether a column of this name holds the time of each row (s)."""
    return key.split("_")[-1] in ("time", "timestamp")


def timed(buffer: ReplayBuffer) -> tuple[str, float] | None:
    """The first column that holds the time of each row, and the rate (Hz) that it tells; None where none does."""
    for key in buffer.keys:
        column = buffer[key]
        if is_time(key) and column.shape[1:] in ((), (1,)) and column.dtype.kind in "iuf":
            rate = rate_of(np.ravel(column[:]).astype(float), buffer.episode_ends)
            if rate is not None:
                return key, rate
    return None


def rate_of(time: np.ndarray, ends: np.ndarray) -> float | None:
    """Rows a second, to four digits, of rows taken at `time` [N] (s) in episodes with `ends` [E].

    None for what does not advance, and for what is not in seconds.
    """
    steps = np.delete(np.diff(time), ends[:-1] - 1)
    if not len(steps) or not np.isfinite(steps).all() or (steps <= 0).mean() > _BACK:
        return None
    usual = np.median(steps)
    rate = float(f"{1 / steps[(steps > 0) & (steps < _GAP * usual)].mean():.4g}")
    return rate if _RATES[0] <= rate <= _RATES[1] else None
