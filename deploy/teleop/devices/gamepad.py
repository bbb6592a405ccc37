"""Gamepads that SDL knows, through pygame: their buttons mean the same whoever made them, and no screen is needed.

left stick     forward, back, left, right        A (south)    gripper         Start   start
right stick    up, down; turn about up           right bumper clutch          Y       keep
D-pad          turn about left and forward       bumper left  half speed      B       discard
                                                                              Back    undo
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from action_diffusion.deploy.drivers.vendor import library
from action_diffusion.deploy.teleop.devices.device import Ask, Signals, without_drift
from action_diffusion.errors import InputError

DEAD = 0.12
"""Of a stick: how far from its middle it may rest."""
FULL = 32767
BUTTONS = {
    "START": Ask.START,
    "Y": Ask.KEEP,
    "B": Ask.DISCARD,
    "BACK": Ask.UNDO,
}


class Gamepad:
    """See `device.Device`.

    Args:
        index: which of those that are plugged in.
        clutch: it drives only while the right bumper is held.
    """

    help = "sticks move, D-pad turns, A gripper, LB slow, Start start, Y keep, B discard, Back undo, Ctrl-C finish"

    def __init__(self, *, index: int = 0, clutch: bool = False) -> None:
        self._index, self._clutch = index, clutch
        self._pad: Any = None
        self._before: dict[str, bool] = {}

    def connect(self) -> None:
        os.environ.setdefault("SDL_JOYSTICK_ALLOW_BACKGROUND_EVENTS", "1")  # there is no window to be in front
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        if not os.environ.get("DISPLAY") and not os.environ.get("WAYLAND_DISPLAY"):
            os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        self._game = library("pygame", "gamepad")
        self._pads = library("pygame._sdl2.controller", "gamepad")
        self._game.display.init()  # SDL hands out events only with one
        self._pads.init()
        n = self._pads.get_count()
        if self._index >= n or not self._pads.is_controller(self._index):
            raise InputError(f"device=gamepad: number {self._index} is not among the {n} that SDL finds and knows")
        self._pad = self._pads.Controller(self._index)

    def poll(self) -> Signals:
        self._game.event.pump()
        if not self._pad.attached():
            raise InputError("device=gamepad: it is no longer there")
        pressed = [name for name in (*BUTTONS, "A") if self._is_new(name)]
        engaged = not self._clutch or self._is_down("RIGHTSHOULDER")
        return Signals(
            engaged=engaged,
            why="" if engaged else "hold the right bumper to drive",
            twist=self._twist(),
            toggle="A" in pressed,
            speed=0.5 if self._is_down("LEFTSHOULDER") else 1.0,
            orders=tuple(BUTTONS[name] for name in pressed if name in BUTTONS),
        )

    def _twist(self) -> np.ndarray:
        names = ("LEFTY", "LEFTX", "RIGHTY", "RIGHTX")
        axes = [getattr(self._game, f"CONTROLLER_AXIS_{name}") for name in names]
        y, x, right_y, right_x = without_drift(np.array([self._pad.get_axis(axis) / FULL for axis in axes]), DEAD)
        roll = self._is_down("DPAD_RIGHT") - self._is_down("DPAD_LEFT")
        pitch = self._is_down("DPAD_UP") - self._is_down("DPAD_DOWN")
        return np.array([-y, -x, -right_y, roll, pitch, -right_x], dtype=np.float64)

    def _is_down(self, name: str) -> bool:
        return bool(self._pad.get_button(getattr(self._game, f"CONTROLLER_BUTTON_{name}")))

    def _is_new(self, name: str) -> bool:
        """Whether a button has been pressed since the last time."""
        down = self._is_down(name)
        new, self._before[name] = down and not self._before.get(name, False), down
        return new

    def close(self) -> None:
        if self._pad is not None:
            self._pad.quit()
            self._pads.quit()
