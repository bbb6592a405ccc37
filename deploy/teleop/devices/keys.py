"""Keys that drive: the same in a terminal and on the page, and as in robosuite where it has them.

    w s  forward, back      z x  turn about forward      space   gripper      Enter      start
    a d  left, right        t g  turn about left         + -     speed        k          keep
    r f  up, down           c v  turn about up                                Backspace  discard
                                                                              u          undo

Forward is away from the robot's base, and up on PushT's table.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np

from action_diffusion.deploy.teleop.devices.device import Ask, Signals

AXES = (("w", "s"), ("a", "d"), ("r", "f"), ("z", "x"), ("t", "g"), ("c", "v"))
ALIKE = {"ArrowUp": "w", "ArrowDown": "s", "ArrowLeft": "a", "ArrowRight": "d"}
ORDERS = {
    "Enter": Ask.START,
    "k": Ask.KEEP,
    "Backspace": Ask.DISCARD,
    "u": Ask.UNDO,
}
GRIPPER, FASTER, SLOWER = " ", "+=", "-_"
KEYS = {*(key for pair in AXES for key in pair), GRIPPER, *FASTER, *SLOWER, *ALIKE, *ORDERS}
"""All that mean something."""
HELP = (
    "w a s d r f move, z x t g c v turn, space gripper, + - speed; "
    "Enter start, k keep, Backspace discard, u undo, Ctrl-C finish"
)
STEP, SLOWEST, FASTEST = 1.25, 0.1, 4.0


class Keys:
    """Keys as signals: which are down, and what was pressed since the last time.

    Attributes:
        speed: what the person has set.
    """

    def __init__(self) -> None:
        self.speed = 1.0

    def signals(self, down: Collection[str], pressed: Iterable[str]) -> Signals:
        """`down`: keys that are held now. `pressed`: presses since the last call, in order."""
        held = {ALIKE.get(key, key) for key in down}
        twist = np.array([float(more in held) - float(less in held) for more, less in AXES])
        orders, toggle = [], False
        for key in pressed:
            if key in ORDERS:
                orders.append(ORDERS[key])
            elif key == GRIPPER:
                toggle = not toggle
            elif key in FASTER or key in SLOWER:
                factor = STEP if key in FASTER else 1 / STEP
                self.speed = float(np.clip(self.speed * factor, SLOWEST, FASTEST))
        return Signals(twist=twist, toggle=toggle, speed=self.speed, orders=tuple(orders))
