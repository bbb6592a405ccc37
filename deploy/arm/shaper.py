"""From a path to setpoints that keep to all limits, and stops that do too.

Straight lines between waypoints have corners, which no arm follows. `ruckig` plans, at every setpoint, the fastest way
back onto the path within velocity, acceleration and jerk; on a straight line that the limits allow this is the line.

A stop needs room. So a setpoint is only taken if the stop that could begin there ends inside all limits:

    ──●──●──●──●            this one is taken: braking from it ends at ▮, inside
               ╰──●──▮
    ━━━━━━━━━━━━━━━━━━━━    limit

and where it is not, the stop that was planned one setpoint earlier, and found to be inside, is begun. By induction
every setpoint is inside, whatever the path does; `SetpointCheck` then looks once more, by differences of what is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from ruckig import ControlInterface, InputParameter, Result, Ruckig, RuckigError, Synchronization, Trajectory

from action_diffusion.deploy.arm.path import Path
from action_diffusion.deploy.hardware.command import CommandLayout
from action_diffusion.deploy.hardware.limits import Limits

_GOOD = (Result.Working, Result.Finished)
_LOOKS = 8
"""Places on a stop at which obstacles are looked for."""
_REST = 1e-9
_PACE = 0.98


class _Stop:
    """A stop that was planned from 0, and begins at `start`.

    The extrema that ruckig finds of a stop include 0, wherever it begins (0.19): so it has to begin there.
    """

    def __init__(self, start: np.ndarray, planned: Trajectory) -> None:
        self._start, self._planned = start, planned
        self.duration = float(planned.duration)

    def at(self, t: float) -> tuple[np.ndarray, list[float], list[float]]:
        """Position, velocity and acceleration, `t` (s) after it began."""
        q, v, a = self._planned.at_time(t)
        return self._start + q, v, a

    def extrema(self) -> tuple[np.ndarray, np.ndarray]:
        """The smallest and the largest positions on the way."""
        found, end = self._planned.position_extrema, self.at(self.duration)[0]
        low, high = ([getattr(extremum, name) for extremum in found] for name in ("min", "max"))
        return np.minimum(self._start + low, end), np.maximum(self._start + high, end)


class Shaper:
    """Moves from rest at `reset`; afterwards each `follow` or `brake` gives the setpoint of one period later.

    Args:
        limits: complete, see `CommandLayout.check_limits`; in coordinates.
        period: between setpoints (s).
        blocked: why coordinates [A] must not be reached, or None; called for setpoints and on stops.

    Attributes:
        q, v, a: coordinates [A] of the last setpoint, and their derivatives; zero for held numbers.
    """

    def __init__(
        self,
        *,
        layout: CommandLayout,
        limits: Limits,
        period: float,
        blocked: Callable[[np.ndarray], str | None] | None = None,
    ) -> None:
        self._layout, self._limits, self._period, self._blocked = layout, limits, period, blocked
        self._smooth, self._held = layout.smooth, layout.held
        n = len(self._smooth)
        self._ruckig = Ruckig(n, period) if n else None
        self._follow, self._stop = (_input(n, limits, self._smooth) for _ in range(2))
        self._stop.control_interface = ControlInterface.Velocity
        for given in (self._follow, self._stop):
            given.target_position = given.target_velocity = given.target_acceleration = [0.0] * n
        self.reset(np.zeros(layout.size))

    def reset(self, q: np.ndarray) -> None:
        """At rest at coordinates `q` [A]."""
        self.q = np.array(q, dtype=np.float64)
        self.v, self.a = np.zeros_like(self.q), np.zeros_like(self.q)
        self._brake: _Stop | None = None
        self._braked = 0.0

    @property
    def at_rest(self) -> bool:
        """Whether nothing that is interpolated moves."""
        return bool((np.abs(self.v) <= _REST).all() and (np.abs(self.a) <= 1e-6).all())

    def follow(self, path: Path, t: float) -> str | None:
        """Go towards where `path` is at `t`; `q` is then the setpoint for `t`. Why it brakes instead, or None."""
        target = path.at(t)
        self._move_held(target[self._held])
        if self._ruckig is None:
            return None
        reason = self._advance(path, t, target, self._velocity(path, t, target))
        if reason is not None:
            self._brake_on()
        return reason

    def _velocity(self, path: Path, t: float, target: np.ndarray) -> np.ndarray:
        """Of the path at `t`, [A]; a little less than the limit, so that there is a way to catch up."""
        if t > path.end or t - self._period < path.times[0]:
            return np.zeros_like(target)
        assert self._limits.velocity is not None
        most = _PACE * self._limits.velocity
        result: np.ndarray = np.clip((target - path.at(t - self._period)) / self._period, -most, most)
        return result

    def brake(self, present: np.ndarray) -> None:
        """Go on with a controlled stop; `present` [A]: where the arm is, for what is commanded to be there."""
        held = self.q.copy()
        recalled = self._layout.recalled
        held[recalled] = np.clip(present, self._limits.low, self._limits.high)[recalled]
        self._move_held(held[self._held])
        if self._ruckig is not None:
            self._brake_on()

    def _move_held(self, target: np.ndarray) -> None:
        if len(self._held):
            assert self._limits.max_step is not None
            most = self._limits.max_step[self._held]
            self.q[self._held] += np.clip(target - self.q[self._held], -most, most)

    def _advance(self, path: Path, t: float, target: np.ndarray, velocity: np.ndarray) -> str | None:
        """One period towards the target, if a stop from there is inside all limits. Otherwise says why not."""
        still = np.zeros_like(velocity)
        if len(path.times) > 1 and path.times[-2] <= t <= path.end:  # is it time to brake for the end?
            arrival = self._plan(path.points[-1], still)
            if arrival is not None and arrival.duration >= path.end - t:
                return self._take(arrival, path.points[-1], still)
        planned = self._plan(target, velocity)
        if planned is None:
            return "no motion within the limits leads to the path"
        return self._take(planned, target, velocity)

    def _plan(self, target: np.ndarray, velocity: np.ndarray) -> Trajectory | None:
        """The fastest way onto a target that is at `target` one period from now and moves on with `velocity`.

        As seen by somebody who moves with it, and is at rest relative to it.
        """
        assert self._limits.velocity is not None
        i, most = self._smooth, self._limits.velocity[self._smooth]
        v = velocity[i]
        self._follow.max_velocity, self._follow.min_velocity = (most - v).tolist(), (-most - v).tolist()
        q = self.q[i] - (target[i] - v * self._period)
        return self._calculate(self._follow, q.tolist(), (self.v[i] - v).tolist(), self.a[i].tolist())

    def _take(self, planned: Trajectory, target: np.ndarray, velocity: np.ndarray) -> str | None:
        relative_q, relative_v, a = planned.at_time(self._period)
        q = (target[self._smooth] + relative_q).tolist()
        v = (velocity[self._smooth] + relative_v).tolist()
        brake = self._planned_stop(q, v, a)
        if brake is None:
            return "no stop within the limits could be planned from the next setpoint"
        reason = self._outside(brake)
        if reason is None:
            self._brake, self._braked = brake, 0.0
            self._set(q, v, a)
        return reason

    def _planned_stop(self, q: list[float], v: list[float], a: list[float]) -> _Stop | None:
        planned = self._calculate(self._stop, [0.0] * len(q), v, a)
        return None if planned is None else _Stop(np.array(q), planned)

    def _calculate(self, given: InputParameter, q: list[float], v: list[float], a: list[float]) -> Trajectory | None:
        given.current_position, given.current_velocity, given.current_acceleration = q, v, a
        planned = Trajectory(len(q))
        assert self._ruckig is not None
        try:
            return planned if self._ruckig.calculate(given, planned) in _GOOD else None
        except RuckigError:
            return None

    def _outside(self, brake: _Stop) -> str | None:
        """Why a stop must not become necessary, or None."""
        for i, least, most in zip(self._smooth, *brake.extrema(), strict=True):
            if least < self._limits.low[i] or most > self._limits.high[i]:
                return (
                    f"braking in time for the limits of number {i}, [{self._limits.low[i]:g}, {self._limits.high[i]:g}]"
                )
        if self._blocked is None:
            return None
        for share in np.linspace(0.0, 1.0, _LOOKS):
            q = self.q.copy()
            q[self._smooth] = brake.at(share * brake.duration)[0]
            reason = self._blocked(q)
            if reason is not None:
                return f"braking in time for {reason}"
        return None

    def _brake_on(self) -> None:
        """One period further on the stop that was planned last; at rest without one."""
        if self._brake is None:
            return
        self._braked += self._period
        self._set(*self._brake.at(self._braked))
        if self._braked >= self._brake.duration:
            self.v[:], self.a[:] = 0.0, 0.0

    def _set(self, q: Sequence[float] | np.ndarray, v: list[float], a: list[float]) -> None:
        self.q[self._smooth], self.v[self._smooth], self.a[self._smooth] = q, v, a


def _input(n: int, limits: Limits, smooth: np.ndarray) -> InputParameter:
    given = InputParameter(n)
    given.synchronization = Synchronization.No
    for name in ("velocity", "acceleration", "jerk"):
        value = getattr(limits, name)
        if n:
            setattr(given, f"max_{name}", value[smooth].tolist())
    return given


class SetpointCheck:
    """The last look at every setpoint: finite, inside, and its differences within velocity, acceleration and jerk.

    It knows nothing of paths and plans, so that a mistake in them does not reach the arm.
    """

    def __init__(self, *, layout: CommandLayout, limits: Limits, period: float) -> None:
        self._limits, self._smooth, self._held = limits, layout.smooth, layout.held
        self._rates: list[tuple[str, np.ndarray]] = []
        # What floating point adds to a difference grows with its order.
        for order, (name, room) in enumerate((("velocity", 1e-6), ("acceleration", 1e-4), ("jerk", 1e-2)), start=1):
            if len(self._smooth):
                value = getattr(limits, name)[self._smooth]
                self._rates.append((name, (value * (1 + room)) * period**order))
        self._last: list[np.ndarray] = []

    def reset(self, q: np.ndarray) -> None:
        """The arm rests at coordinates `q` [A]."""
        self._last = [np.array(q)] * 3

    def refuse(self, q: np.ndarray) -> str | None:
        """Why coordinates `q` [A] must not be sent, or None where they may be, and then count as sent."""
        if not np.isfinite(q).all():
            return f"the setpoint is not finite: {q.tolist()}"
        low, high = self._limits.low, self._limits.high
        slack = 1e-9 * np.maximum(1.0, np.abs(q))
        outside = (q < low - slack) | (q > high + slack)
        if outside.any():
            i = int(outside.argmax())
            return f"setpoint[{i}] = {q[i]:g} is outside [{low[i]:g}, {high[i]:g}]"
        if len(self._held):
            assert self._limits.max_step is not None
            if (np.abs(q - self._last[-1])[self._held] > self._limits.max_step[self._held] * (1 + 1e-9)).any():
                return "a held number of the setpoint changes by more than max_step"
        history = [*self._last, q]
        difference = np.array(history)[:, self._smooth]
        for name, most in self._rates:
            difference = np.diff(difference, axis=0)
            if (np.abs(difference[-1]) > most).any():
                return f"the setpoint exceeds the {name} limit"
        self._last = [*history[1:3], np.array(q)]
        return None
