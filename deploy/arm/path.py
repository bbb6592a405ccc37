"""The path that an arm follows: timed waypoints, and where it should be between them.

waypoint      a           b           c
time          |───────────|───────────|─────────▶
linear        a ╌╌╌ on the line ╌╌╌╌╌ c  c  c        rotations: on the shortest turn, at a steady rate
hold          a a a a a a b b b b b b c  c  c
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from action_diffusion.deploy.hardware.command import CommandLayout


@dataclass
class Path:
    """Waypoints that an arm follows: `times` ascending (monotonic s), coordinates `points` [A] each, at least one."""

    layout: CommandLayout
    times: list[float]
    points: list[np.ndarray]

    def at(self, t: float) -> np.ndarray:
        """Coordinates [A] at `t`: the first waypoint before it, the last one after it."""
        after = bisect.bisect_right(self.times, t)
        if after == 0:
            return self.points[0]
        if after == len(self.times):
            return self.points[-1]
        start, end = self.times[after - 1], self.times[after]
        return self.layout.between(self.points[after - 1], self.points[after], (t - start) / (end - start))

    @property
    def end(self) -> float:
        """When the last waypoint is due."""
        return self.times[-1]

    def replace(self, now: float, times: Sequence[float], points: Sequence[np.ndarray]) -> Path:
        """A path that goes over to new waypoints at the first of them, or at once where that is due already.

        Until then it stays as it was: later waypoints of the old path are dropped.
        """
        due = bisect.bisect_right(times, now)
        if due:
            return Path(self.layout, list(times[due - 1 :]), list(points[due - 1 :]))
        old = [(t, point) for t, point in zip(self.times, self.points, strict=True) if now < t < times[0]]
        kept = [(now, self.at(now)), *old]
        return Path(self.layout, [*(t for t, _ in kept), *times], [*(point for _, point in kept), *points])
