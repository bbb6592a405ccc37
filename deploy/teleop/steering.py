"""From what a device says to an action of the task, by what the action is:

    a target in the plane (PushT)     pointers show it; twists move it
    relative, of a simulated arm      twists, scaled to its units (OSC_POSE: 1 is 0.05 m or 0.5 rad a step)
    places of a robot                 leader arms show them; twists move the last one: positions, rotations, joints

Speeds are in m/s and rad/s, whatever the rate. What comes out is within the limits, and no further from the last one
than they allow at once; the safety gate looks at it once more. NaN passes here, and not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.spatial.transform import Rotation

from action_diffusion.deploy.hardware.command import CommandLayout
from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.hardware.protocols import Group
from action_diffusion.deploy.teleop.devices.device import Signals
from action_diffusion.errors import InputError

OSC_STEP = (0.05, 0.5)
"""What 1 means in OSC_POSE's relative actions: m, rad."""
GRAB = 30.0
"""How near (px) to PushT's finger a pointer takes hold of it."""
HAND = "come to the finger to take hold of it"
FULL = 1.0 - 1e-9


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """At full deflection: m/s, rad/s, rad/s of a joint (or the joint's unit), px/s."""

    linear: float = 0.25
    angular: float = 1.0
    joint: float = 0.5
    plane: float = 300.0

    def scaled(self, factor: float) -> Speeds:
        """All of them, `factor` times. Raises `InputError` unless that is above 0."""
        if not 0 < factor < np.inf:
            raise InputError(f"speed={factor} must be above 0")
        return Speeds(
            linear=self.linear * factor,
            angular=self.angular * factor,
            joint=self.joint * factor,
            plane=self.plane * factor,
        )


class SignalMapping(Protocol):
    """Turns signals into actions; remembers where it was."""

    def reset(self) -> None:
        """An episode begins."""

    def begin(self, present: np.ndarray) -> None:
        """The person drives from now on, also after a pause, with the world at `present` [A]."""

    def action(self, signals: Signals, present: np.ndarray) -> np.ndarray | str:
        """The action [A] for a control step, or why there is none."""
        ...


class PlaneSteering:
    """PushT: [x, y] in px, y downwards.

    Args:
        grab: a pointer has to take hold of the finger first, so that nothing jumps.
    """

    def __init__(self, limits: Limits, rate: float, speeds: Speeds, *, grab: bool = True) -> None:
        self._limits, self._rate, self._speeds, self._grab = limits, rate, speeds, grab
        self._held, self._at = False, np.zeros(2)

    def reset(self) -> None:
        pass

    def begin(self, present: np.ndarray) -> None:
        self._held, self._at = False, present

    def action(self, signals: Signals, present: np.ndarray) -> np.ndarray | str:
        if signals.target is not None:
            if signals.target.shape != (2,):
                return f"a target of PushT is two numbers, got {signals.target.size}"
            self._held = self._held or float(np.linalg.norm(signals.target - present)) <= GRAB
            if self._grab and not self._held:
                return HAND
            self._at = signals.target
        else:
            twist = np.zeros(6) if signals.twist is None else signals.twist
            pixels = -np.array([twist[1], twist[0]]) * self._speeds.plane * signals.speed / self._rate
            self._at = np.clip(self._at + pixels, self._limits.low, self._limits.high)
        return self._at


class RelativeSteering:
    """Relative actions [dx dy dz | rx ry rz | gripper] of a simulated arm; gripper below 0 opens, above 0 closes."""

    def __init__(self, limits: Limits, rate: float, speeds: Speeds) -> None:
        if len(limits.low) != 7:
            raise InputError(f"one person drives one arm of 7 numbers; this task's actions have {len(limits.low)}")
        step = np.repeat([speeds.linear, speeds.angular], 3) / rate
        self._scale = step / np.repeat(OSC_STEP, 3)
        self._limits, self._gripper = limits, -1.0

    def begin(self, present: np.ndarray) -> None:
        """A gripper stays as it was told last; an arm that was reset opens it."""

    def reset(self) -> None:
        self._gripper = -1.0

    def action(self, signals: Signals, present: np.ndarray) -> np.ndarray | str:
        if signals.twist is None:
            return "this task's actions are relative: a device that shows places cannot give them"
        self._gripper = _gripper(self._gripper, signals, opened=-1.0, closed=1.0)
        action = np.append(signals.twist * self._scale * signals.speed, self._gripper)
        result: np.ndarray | str = np.clip(action, self._limits.low, self._limits.high)
        return result


class PlaceSteering:
    """Commands of a robot: positions (m), a rotation, joints, a gripper, in the order of its groups.

    Args:
        groups, limits: of the command; `low` and `high` of a gripper are its ends.
        arm_limits: the arm's, whose velocities bound how fast a leader is followed.
        gripper: (open, closed); None: the ends of its limits.
    """

    def __init__(
        self,
        groups: tuple[Group, ...],
        limits: Limits,
        rate: float,
        speeds: Speeds,
        *,
        arm_limits: Limits,
        gripper: tuple[float, float] | None = None,
    ) -> None:
        self._layout, self._limits, self._rate, self._speeds = CommandLayout(groups), limits, rate, speeds
        self._at = np.zeros(self._layout.size)
        self._step = _most_at_once(self._layout, arm_limits, rate)
        self._ends = gripper or _gripper_ends(self._layout, limits)
        self._gripper: float | None = None

    def reset(self) -> None:
        pass

    def begin(self, present: np.ndarray) -> None:
        self._at, self._gripper = present, None

    def action(self, signals: Signals, present: np.ndarray) -> np.ndarray | str:
        if signals.target is not None:
            if signals.target.shape != self._at.shape:
                return f"the leader has {signals.target.size} numbers, the arm's commands {self._at.size}"
            wanted = signals.target
        else:
            wanted = self._moved(np.zeros(6) if signals.twist is None else signals.twist, signals)
        wanted = np.clip(wanted, self._limits.low, self._limits.high)
        self._at = self._at + np.clip(wanted - self._at, -self._step, self._step)
        return self._at

    def _moved(self, twist: np.ndarray, signals: Signals) -> np.ndarray:
        """The last place, moved by a twist: joints one by one where the arm is commanded by joints."""
        moved, period = self._at.copy(), signals.speed / self._rate
        for group, part in self._layout.slices():
            if group.name == "gripper":
                opened, closed = self._ends
                at = float(moved[part][0]) if self._gripper is None else self._gripper
                moved[part] = self._gripper = _gripper(at, signals, opened=opened, closed=closed)
            elif group.kind == "rotation":
                turn = Rotation.from_rotvec(twist[3:] * self._speeds.angular * period)
                moved[part] = (turn * Rotation.from_rotvec(moved[part])).as_rotvec()
            elif group.name == "position":
                moved[part] += twist[:3] * self._speeds.linear * period
            else:
                n = min(group.size, 6)
                moved[part][:n] += twist[:n] * self._speeds.joint * period
        return moved


def _gripper(at: float, signals: Signals, *, opened: float, closed: float) -> float:
    """Where a gripper goes that was told to be `at`."""
    if signals.toggle:
        return opened if abs(at - closed) < abs(at - opened) else closed
    return {0: at, 1: closed, -1: opened}[signals.gripper]


def _gripper_ends(layout: CommandLayout, limits: Limits) -> tuple[float, float]:
    """(open, closed): the ends of the gripper's range."""
    for group, part in layout.slices():
        if group.name == "gripper":
            return float(limits.low[part][0]), float(limits.high[part][0])
    return 0.0, 0.0


def _most_at_once(layout: CommandLayout, limits: Limits, rate: float) -> np.ndarray:
    """How far [A] a command may be from the one before: what the arm's velocity and `max_step` allow.

    Rotation vectors of one turn may be far apart: those are for the arm's process to slow down.
    """
    most = np.full(layout.size, np.inf)
    if limits.velocity is not None:
        most = np.minimum(most, limits.velocity / rate * FULL)
    if limits.max_step is not None:
        most = np.minimum(most, limits.max_step)
    for group, part in layout.slices():
        if group.kind == "rotation":
            most[part] = np.inf
    return most


def steering_of(
    groups: tuple[Group, ...] | None,
    limits: Limits,
    rate: float,
    speeds: Speeds,
    *,
    grab: bool = True,
    arm_limits: Limits | None = None,
    gripper: tuple[float, float] | None = None,
) -> SignalMapping:
    """What fits actions of `groups` (see `world.World`)."""
    if groups is None:
        return RelativeSteering(limits, rate, speeds)
    if [group.name for group in groups] == ["target"]:
        return PlaneSteering(limits, rate, speeds, grab=grab)
    return PlaceSteering(groups, limits, rate, speeds, arm_limits=arm_limits or limits, gripper=gripper)
