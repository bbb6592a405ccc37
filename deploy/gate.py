"""The safety gates: no command reaches a robot that has not passed here.

A diffusion policy can return anything: NaN after it has diverged, a chunk from another mode, a target outside the
workspace. A gate knows nothing of policies. It compares what it is given with limits, and with what passed before, and
says why it refuses; the robot then holds what it had. There are two, since neither process trusts the other:

    loop    `Gate`            each command, within what was demonstrated, before it is sent
    arm     `WaypointGate`    each message that arrives in the arm's process, within the arm's limits
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from action_diffusion.deploy.limits import Limits
from action_diffusion.deploy.motion import Layout
from action_diffusion.errors import InputError

STALE = 0.1
"""How old a message may be (s)."""
OVERDUE = 0.25
"""How long its last waypoint may have been due (s): more than a control period, in which a late command is sent."""
AHEAD = 10.0
"""How far ahead a waypoint may be (s)."""


def demonstrated(statistics: Mapping[str, Any], margin: float) -> Limits:
    """The range of the demonstrated actions, widened at both ends by `margin`, a share of it (>= 0).

    `statistics`: of the action, from the bundle (`policy.normalizer.fit`). A dimension that never changed in the
    demonstrations may leave its value by `margin`, in its unit.
    """
    from action_diffusion.policy.normalizer import CONSTANT  # imports torch, which the arm's process never does

    if not 0 <= margin < np.inf:
        raise InputError(f"safety.margin={margin} must be 0 or more, and finite")
    if "min" not in statistics or "max" not in statistics:
        raise InputError("the bundle does not say in which range its actions were demonstrated, so none can be checked")
    low, high = (np.asarray(statistics[end], dtype=np.float64) for end in ("min", "max"))
    span = high - low
    constant = span <= CONSTANT * np.maximum(1.0, np.abs(high))
    room = margin * np.where(constant, 1.0, span)
    return Limits(low=low - room, high=high + room)


class Gate:
    """Passes commands that are finite, of the right shape and inside `limits`; remembers the last one that passed."""

    def __init__(self, *, limits: Limits) -> None:
        self.limits = limits
        self.last: np.ndarray | None = None

    def reset(self) -> None:
        """A new episode begins: no command has passed, and any step to the first one is allowed."""
        self.last = None

    def refuse(self, command: np.ndarray) -> str | None:
        """Why `command` must not be sent, in one line; None where it may be, and then counts as sent."""
        reason = self._reason(np.asarray(command))
        if reason is None:
            self.last = np.array(command)
        return reason

    def ahead(self, commands: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Those of `commands` [A] each, from the first on, that could follow the last one that passed; none counts."""
        last, passed = self.last, []
        for command in commands:
            if self.refuse(command) is not None:
                break
            passed.append(command)
        self.last = last
        return passed

    def _reason(self, command: np.ndarray) -> str | None:
        limits = self.limits
        if command.shape != limits.low.shape:
            return f"the command has shape {list(command.shape)}, expected {list(limits.low.shape)}"
        if not np.isfinite(command).all():
            return f"the command is not finite: {command.tolist()}"
        outside = _outside("command", command, limits)
        if outside is not None:
            return outside
        if limits.max_step is not None and self.last is not None:
            step = np.abs(command - self.last)
            if (step > limits.max_step).any():
                i = int((step > limits.max_step).argmax())
                return f"command[{i}] is {step[i]:g} away from the last one, at most {limits.max_step[i]:g} is allowed"
        return None


class WaypointGate:
    """Passes messages of timed waypoints that the arm may follow. Everything is in coordinates, see `motion`."""

    def __init__(self, *, layout: Layout, limits: Limits) -> None:
        self._layout, self._limits = layout, limits
        self._sent = -np.inf

    def refuse(
        self, *, sent: float, times: Sequence[float], points: np.ndarray, now: float, before: np.ndarray
    ) -> str | None:
        """Why the arm must not follow waypoints, in one line; None where it may.

        Args:
            sent: when the message was sent (monotonic s); the last one that passed was sent earlier.
            times: when each of the n waypoints is due (monotonic s), ascending.
            points: [n, A], in coordinates.
            now: the present time.
            before: [A], where the arm's path is when the first of them is due.
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
        if not (np.isfinite(points).all() and np.isfinite(times).all() and np.isfinite(sent)):
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
        for point in points:
            outside = _outside("waypoint", point, limits)
            if outside is not None:
                return outside
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


def _outside(what: str, values: np.ndarray, limits: Limits) -> str | None:
    outside = (values < limits.low) | (values > limits.high)
    if not outside.any():
        return None
    i = int(outside.argmax())
    return f"{what}[{i}] = {values[i]:g} is outside [{limits.low[i]:g}, {limits.high[i]:g}]"
