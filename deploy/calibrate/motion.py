"""The slow motion by which `calibrate=true` measures, and what setpoints, states and frames were while it went on.

    number  ╭╮  ╭╮  ╭╮  ╭╮       distance · ½ (1 − cos ωt + a tenth of sin 5ωt), fading in over the first period and
          ╭─╯╰──╯╰──╯╰──╯╰─╮     out over the last: the arm begins at rest where it stands, and ends there
        ──╯                ╰──

The small quick part tells a delay from the lag of an arm that follows slowly, which a single sine cannot.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from action_diffusion.deploy.arm.link import ArmLink
from action_diffusion.deploy.calibrate.delays import EARLIEST, LATEST, Signal, small
from action_diffusion.deploy.hardware.command import CommandLayout
from action_diffusion.deploy.hardware.limits import RATES, Limits
from action_diffusion.deploy.ipc.channels import MOST_WAYPOINTS, Phase
from action_diffusion.deploy.ipc.rings import RingReader
from action_diffusion.deploy.robot.process_robot import ProcessRobot
from action_diffusion.errors import InputError

STEP = 0.02
"""Between two waypoints (s); a held number gets one for each of the arm's periods, since its steps blur the time."""
QUICK, SHARE = 5, 0.1
"""How many times as quick the small part is, and how large, as a share of the slow one."""
VELOCITY, OTHERS = 0.3, 0.5
"""Shares of the limits that the motion may use: of velocity, and of acceleration and jerk."""
LONGEST = 20.0
_AHEAD = 0.3
_LEAD, _TAIL = 0.3, LATEST + 0.1


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The motion that is asked for.

    number: of a command, from 0. distance: in its unit; None: a tenth of the way between its limits. period: at least
    (s); limits make it longer. n_periods: with the first and the last, in which it fades.
    """

    number: int = 0
    distance: float | None = None
    period: float = 1.719
    n_periods: int = 6

    def __post_init__(self) -> None:
        for name, kinds in (("number", int), ("n_periods", int), ("period", int | float)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise InputError(f"calibration.{name}={value} must be a {'whole ' * (kinds is int)}number")
        if not self.period > 2 * (LATEST - EARLIEST):
            raise InputError(f"calibration.period={self.period} must be above {2 * (LATEST - EARLIEST):g} s")
        if self.n_periods < 4:
            raise InputError(f"calibration.n_periods={self.n_periods} must be at least 4, in two of which it fades")
        distance = self.distance
        if distance is not None and (not isinstance(distance, int | float) or not distance > 0):
            raise InputError(f"calibration.distance={distance} must be a number above 0")


class Motion(NamedTuple):
    """times [n] (s, from 0), commands [n, A], and the edges of the periods in which it is whole (s)."""

    times: np.ndarray
    commands: np.ndarray
    edges: np.ndarray


@dataclass(frozen=True, kw_only=True)
class RecordedMotion:
    """What was recorded. `sent` and `state`: of the number that moved. `frames`: by camera, made small; `arrived`: when
    each came, relative to its stamp (s). `edges`: of whole periods (monotonic s). `events`: what the arm's process did
    against the motion; where there are any, it was given up. `lost`: seconds that a simulator did not keep up with."""

    sent: Signal
    state: Signal
    frames: Mapping[str, Signal]
    arrived: Mapping[str, np.ndarray]
    edges: np.ndarray
    events: list[str]
    lost: float = 0.0


def shape(phase: np.ndarray, n_periods: int) -> np.ndarray:
    """The motion for a distance of 1: phase in periods, from 0 to `n_periods`."""
    slow = 1 - np.cos(2 * np.pi * phase)
    result: np.ndarray = (
        0.5 * _fade(phase) * _fade(n_periods - phase) * (slow + SHARE * np.sin(2 * np.pi * QUICK * phase))
    )
    return result


def _fade(x: np.ndarray) -> np.ndarray:
    """0 to 1 over [0, 1], with velocity and acceleration 0 at both ends."""
    x = np.clip(x, 0.0, 1.0)
    return np.asarray(x**3 * (10 - 15 * x + 6 * x**2))


def plan(arm: ArmLink, wanted: Wanted) -> Motion:
    """The motion, from where the arm is told to be now. Raises `InputError` where it has no room, or must not move."""
    layout, limits, number = CommandLayout(arm.command), arm.limits, wanted.number
    moving = [int(i) for i in (*layout.smooth, *layout.recalled) if int(i) not in _turning(layout)]
    if number not in moving:
        raise InputError(f"calibration.number={number} is none that may move; those are {sorted(moving)}")
    start = arm.last_setpoint().values["command"]
    distance = wanted.distance or 0.1 * float(limits.high[number] - limits.low[number])
    phase = np.linspace(0, wanted.n_periods, 400 * wanted.n_periods + 1)
    unit = shape(phase, wanted.n_periods)
    side = _with_room(start[number], distance, unit, limits.low[number], limits.high[number])
    period = wanted.period
    if number in layout.smooth:
        period = max(period, _least_period(phase, side * unit, limits, number))
    if period > LONGEST:
        raise InputError(f"calibration.distance={distance:g} would take {period:.0f} s a period: give a smaller one")
    step = STEP if number in layout.smooth else 1 / arm.rate
    times = np.arange(0, wanted.n_periods * period + step, step)
    commands = np.tile(start, (len(times), 1))
    commands[:, number] += side * shape(times / period, wanted.n_periods)
    return Motion(times, commands, period * np.arange(1, wanted.n_periods))


def _with_room(start: float, distance: float, unit: np.ndarray, low: float, high: float) -> float:
    """distance, or -distance, with which the motion stays inside."""
    for side in (distance, -distance):
        path = start + side * unit
        if path.min() >= low and path.max() <= high:
            return side
    raise InputError(f"calibration.distance={distance:g} has no room on either side of {start:.4f}")


def _least_period(phase: np.ndarray, path: np.ndarray, limits: Limits, number: int) -> float:
    """How long (s) a period has to be, for the motion to use no more than its share of the limits."""
    least, derivative = 0.0, path
    for order, name in enumerate(RATES, 1):
        derivative = np.gradient(derivative, phase)
        most = getattr(limits, name)[number] * (VELOCITY if order == 1 else OTHERS)
        least = max(least, float(np.abs(derivative).max() / most) ** (1 / order))
    return least


def _turning(layout: CommandLayout) -> set[int]:
    return {i for group, part in layout.slices() if group.kind == "rotation" for i in range(part.start, part.stop)}


def move(robot: ProcessRobot, motion: Motion, number: int) -> RecordedMotion:
    """Go through it, and record. The arm has begun, and rests in the end. Raises `InputError` where a camera dies."""
    recorder, lost = _MotionRecorder(robot, number), _lost(robot)
    arm, events = robot.arm, list[str]()
    start, step = time.monotonic() + _LEAD, motion.times[1]
    n = min(MOST_WAYPOINTS, round(_AHEAD / step))
    while (now := time.monotonic()) < start + motion.times[-1] + _TAIL and not events:
        first = max(0, math.ceil((now - start) / step))
        if first < len(motion.times):
            rows = slice(first, first + n)
            arm.follow(start + motion.times[rows], motion.commands[rows])
        arm.renew()
        recorder.look()
        events = robot.events()
        if not events and arm.phase is not Phase.MOVING:
            events = ["the arm stopped"]
        time.sleep(STEP)
    return replace(recorder.measured(start + motion.edges, events), lost=_lost(robot) - lost)


def _lost(robot: ProcessRobot) -> float:
    return 0.0 if robot.scene is None else robot.scene.lost


class _MotionRecorder:
    """Empties the rings before they are overwritten: `look` has to be called several times a second."""

    def __init__(self, robot: ProcessRobot, number: int) -> None:
        self._number = number
        self._name, self._index = [(group.name, i) for group in robot.arm.command for i in range(group.size)][number]
        self._rings = {"sent": robot.arm.setpoints, "state": robot.arm.states}
        self._rings |= {f"camera {key}": RingReader(robot.folder / f"camera {key}") for key in robot.cameras}
        self._heard = {name: ring.count - 1 for name, ring in self._rings.items()}
        self._rows: dict[str, list[tuple[float, float | np.ndarray, float]]] = {name: [] for name in self._rings}

    def look(self) -> None:
        for name, ring in self._rings.items():
            for record in ring.after(self._heard[name]):
                self._heard[name] = record.number
                values, arrived = record.values, 0.0
                if name == "sent":
                    value: float | np.ndarray = float(values["command"][self._number])
                elif name == "state":
                    value = float(values[self._name][self._index])
                else:
                    value, arrived = small(values["image"]), float(values["arrived"]) - record.t
                self._rows[name].append((record.t, value, arrived))

    def measured(self, edges: np.ndarray, events: list[str]) -> RecordedMotion:
        signals = {name: _signal(rows) for name, rows in self._rows.items()}
        cameras = {name.removeprefix("camera "): name for name in self._rings if name.startswith("camera ")}
        return RecordedMotion(
            sent=signals["sent"],
            state=signals["state"],
            frames={key: signals[name] for key, name in cameras.items()},
            arrived={key: np.array([late for _, _, late in self._rows[name]]) for key, name in cameras.items()},
            edges=edges,
            events=events,
        )


def _signal(rows: list[tuple[float, float | np.ndarray, float]]) -> Signal:
    """In order, and each time once: an arm may be read more often than it measures."""
    t, first = np.unique([moment for moment, _, _ in rows], return_index=True)
    return Signal(t, np.array([rows[i][1] for i in first]))
