"""The arm's safety gate: each message of waypoints that arrives in the arm's process, within the arm's limits.

The loop has checked its commands already (`loop.gate`); the arm's process does not trust it, nor whoever else writes
to its ring: what passes here is finite.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from action_diffusion.deploy.hardware.command import CommandLayout
from action_diffusion.deploy.hardware.limits import Limits, outside

STALE = 0.1
"""How old a message may be (s)."""
OVERDUE = 0.25
"""How long its last waypoint may have been due (s): more than a control period, in which a late command is sent."""
AHEAD = 10.0
"""How far ahead a waypoint may be (s)."""
FAR = 1e9
"""Numbers of a waypoint are smaller: which way a rotation by a larger one turns, nobody knows."""


class WaypointGate:
    """Passes messages of timed waypoints that the arm may follow; `limits`: in coordinates (see `hardware.command`)."""

    def __init__(self, *, layout: CommandLayout, limits: Limits) -> None:
        self._layout, self._limits = layout, limits
        self._sent = -np.inf

    def refuse(
        self, *, sent: float, times: Sequence[float], points: np.ndarray, now: float, before: np.ndarray
    ) -> str | None:
        """Why the arm must not follow waypoints, in one line; None where it may.

        Args:
            sent: when the message was sent (monotonic s); the last one that passed was sent earlier.
            times: when each of the n waypoints is due (monotonic s), ascending.
            points: [n, A], as commands have them.
            now: the present time.
            before: [A], where the arm's path is when the first of them is due, in coordinates.
        """
        reason = self._shape_or_time(sent, np.asarray(times, dtype=np.float64), np.asarray(points), now)
        reason = reason or self._place(np.asarray(times), np.asarray(points), before)
        if reason is None:
            self._sent = sent
        return reason

    def _shape_or_time(self, sent: float, times: np.ndarray, points: np.ndarray, now: float) -> str | None:
        size = self._layout.size
        if points.ndim != 2 or points.shape[1] != size or times.shape != (len(points),) or not len(points):
            return f"waypoints of shape {list(points.shape)} at {list(times.shape)} times; [n >= 1, {size}] is needed"
        if not ((np.abs(points) < FAR).all() and np.isfinite(times).all() and np.isfinite(sent)):
            return "a waypoint or a time is not finite"
        if sent > now or now - sent > STALE:
            return f"stale: the message is {1e3 * (now - sent):.0f} ms old, at most {1e3 * STALE:.0f} are allowed"
        if sent <= self._sent:
            return "out of order: a later message has been followed already"
        if (np.diff(times) <= 0).any():
            return "out of order: the times of the waypoints do not ascend"
        if now - times[-1] > OVERDUE:
            return f"stale: the last waypoint was due {1e3 * (now - times[-1]):.0f} ms ago"
        if times[-1] - now > AHEAD or now - times[0] > AHEAD:
            return f"a waypoint is due more than {AHEAD:g} s from now"
        return None

    def _place(self, times: np.ndarray, points: np.ndarray, before: np.ndarray) -> str | None:
        limits, smooth, held = self._limits, self._layout.smooth, self._layout.held
        points = self._layout.to_coordinates(points)
        for point in points:
            beyond = outside("waypoint", point, limits)
            if beyond is not None:
                return beyond
        if len(held):
            assert limits.max_step is not None
            steps = np.abs(np.diff(np.vstack([before, points])[:, held], axis=0))
            if (steps > limits.max_step[held]).any():
                i = int((steps > limits.max_step[held]).any(axis=0).argmax())
                most = limits.max_step[held[i]]
                return f"waypoint[{held[i]}] changes by {steps[:, i].max():g} at once, at most {most:g} is allowed"
        if len(smooth) and len(points) > 1:
            assert limits.velocity is not None
            speeds = np.abs(np.diff(points[:, smooth], axis=0)) / np.diff(times)[:, None]
            if (speeds > limits.velocity[smooth]).any():
                i = int((speeds > limits.velocity[smooth]).any(axis=0).argmax())
                most = limits.velocity[smooth[i]]
                return (
                    f"waypoint[{smooth[i]}] asks for a velocity of {speeds[:, i].max():g}, at most {most:g} is allowed"
                )
        return None
