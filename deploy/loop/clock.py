"""Time as a part: the loop is paced by a clock that is handed in, real for robots and virtual for tests.

period       |──────|──────|──────|──────|
tick         0      1      2      3      4
work         ██     ███    █████████ ██
late?                      tick 3 is missed, and not made up for: two commands in a row, the first of them
                           old, move an arm twice as fast as they were meant to
"""

from __future__ import annotations

import math
import time
from typing import Protocol


class Clock(Protocol):
    """Seconds that only go forward, from any start."""

    def now(self) -> float: ...

    def sleep_until(self, moment: float) -> None:
        """Return at `moment` (s), or at once where it is past."""


class MonotonicClock:
    """The computer's monotonic clock: it does not jump when somebody sets the time."""

    def now(self) -> float:
        return time.monotonic()

    def sleep_until(self, moment: float) -> None:
        time.sleep(max(0.0, moment - time.monotonic()))


class VirtualClock:
    """Stands still but for sleeping and `advance`: a run on it is instant, and the same every time."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def sleep_until(self, moment: float) -> None:
        self._now = max(self._now, moment)

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass, as work would."""
        self._now += seconds


class Pacer:
    """Ticks at `rate` (Hz) on a grid that begins with the first `wait`."""

    def __init__(self, *, clock: Clock, rate: float) -> None:
        self._clock = clock
        self._rate = rate
        self._start: float | None = None
        self._index = 0

    def wait(self) -> tuple[float, int]:
        """Sleep until the next tick that is not past. Returns its time (s) and how many were missed before it."""
        if self._start is None:
            self._start = self._clock.now()
            return self._start, 0
        elapsed = self._clock.now() - self._start
        before, self._index = self._index, max(self._index + 1, math.ceil(elapsed * self._rate))
        tick = self._start + self._index / self._rate
        self._clock.sleep_until(tick)
        return tick, self._index - before - 1
