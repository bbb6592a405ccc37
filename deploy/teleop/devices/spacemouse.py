"""3Dconnexion's SpaceMouse, through pyspacemouse: push and turn the cap as the arm is to move. No screen is needed.

What it says at rest is seldom nothing, and an arm that follows it drifts; so within 8 % of the middle is nothing. While
it is pushed it sends some hundred reports a second, and each is read: else what the arm does falls ever further behind.
One that is silent while it is pushed has been unplugged, and nobody drives.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from action_diffusion.deploy.drivers.vendor import library, one_line
from action_diffusion.deploy.teleop.devices.device import Signals, without_drift
from action_diffusion.errors import InputError

DEAD = 0.08
MOST_REPORTS = 200
SILENT = 0.3
"""How old (s) the last report of a push may be."""
AXES = ("x", "y", "z", "roll", "pitch", "yaw")


class SpaceMouse:
    """See `device.Device`. The first button moves the gripper; the second one is the clutch.

    Args:
        index: which of those that are plugged in.
        clutch: it drives only while the second button is held.
    """

    help = "push and turn the cap, left button gripper; Enter start, k keep, Backspace discard, u undo in the terminal"

    def __init__(self, *, index: int = 0, clutch: bool = False) -> None:
        self._index, self._clutch = index, clutch
        self._mouse: Any = None
        self._before, self._t, self._heard = False, -np.inf, -np.inf

    def connect(self) -> None:
        library_ = library("pyspacemouse", "spacemouse")
        try:
            self._mouse = library_.open(device_index=self._index, axis_convention=library_.AxisConvention.ROS)
        except Exception as error:
            raise InputError(
                f"device=spacemouse: {one_line(error)}. It needs hidapi (apt install libhidapi-hidraw0), and on Linux "
                "a udev rule that lets you read /dev/hidraw*"
            ) from error

    def poll(self) -> Signals:
        try:
            state = self._newest()
        except Exception as error:
            raise InputError(f"device=spacemouse: {one_line(error)}") from error
        buttons = [bool(button) for button in state.buttons] + [False, False]
        new, self._before = buttons[0] and not self._before, buttons[0]
        twist = without_drift(np.array([getattr(state, axis) for axis in AXES], dtype=np.float64), DEAD)
        why = self._why(bool(twist.any()), buttons[1])
        return Signals(engaged=not why, why=why, twist=twist, toggle=new)

    def _why(self, pushed: bool, held: bool) -> str:
        """Why nobody drives; nothing where somebody does."""
        if pushed and time.monotonic() - self._heard > SILENT:
            return "the SpaceMouse is silent: is it plugged in?"
        return "hold the second button to drive" if self._clutch and not held else ""

    def _newest(self) -> Any:
        """The state after all reports that have come: one more read, and its time stays."""
        for _ in range(MOST_REPORTS):
            state = self._mouse.read()
            if state.t == self._t:
                break
            self._t, self._heard = state.t, time.monotonic()
        return state

    def close(self) -> None:
        if self._mouse is not None:
            self._mouse.close()
