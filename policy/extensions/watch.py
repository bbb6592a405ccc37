"""When what the guard says of an episode's chunks is an alarm (`guard`), for whoever executes them: without torch."""

from __future__ import annotations

import math

LEVEL = "guard.level"
"""The note of a chunk that `Watch` sums up."""


class Watch:
    """The cumulative sum of an episode's levels.

    Attributes:
        sum: >= 0; infinite once a level was no number.
        alarm: begins where the sum is above 1, and ends with the first level of at most 0, which clears the sum.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """An episode begins, or what was before no longer counts."""
        self.sum, self.alarm = 0.0, False

    def take(self, level: float) -> bool:
        """The level of the newest chunk. Returns whether there is an alarm."""
        if self.alarm and level <= 0.0:
            self.reset()
            return False
        self.sum = math.inf if math.isnan(level) else max(0.0, self.sum + level)
        self.alarm = self.alarm or self.sum > 1.0
        return self.alarm
