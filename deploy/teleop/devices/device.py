"""What a person drives with: one protocol for mice, keyboards, gamepads, SpaceMice, leader arms and scripts.

A device is asked once a control step and never waited for. Its library is imported in `connect`, and a missing one is
an `InputError` that says what to install.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from action_diffusion.deploy.drivers.vendor import attempt


class Ask(enum.IntEnum):
    """What a person may ask of the session, beside driving."""

    START, KEEP, DISCARD, UNDO, FINISH = 1, 2, 3, 4, 5


class Signals(NamedTuple):
    """What a device says in one control step.

    Attributes:
        engaged: the person drives; otherwise nothing is commanded, nothing is recorded, and a simulator stands still.
        why: why nobody drives, for people.
        twist: [6], each in [-1, 1], 1 being full speed: forward, left, up, then turns about these axes (right-handed).
            None from devices that show places instead.
        target: [A], the command itself in the data's units; None from devices that give a twist.
        gripper: 1 closes, -1 opens, 0 leaves it; `toggle` changes it.
        speed: what the person scales the speed by, from now on.
        orders: in the order given.
    """

    engaged: bool = True
    why: str = ""
    twist: np.ndarray | None = None
    target: np.ndarray | None = None
    gripper: int = 0
    toggle: bool = False
    speed: float = 1.0
    orders: tuple[Ask, ...] = ()


class Device(Protocol):
    """Something to drive with. Made with plain values; touches no hardware before `connect`.

    Attributes:
        help: in one line for people, what does what.
    """

    help: str

    def connect(self) -> None:
        """Be ready. Raises `InputError` where something is missing."""

    def poll(self) -> Signals:
        """What the person does now; returns at once. Raises `InputError` where the device is gone."""
        ...

    def close(self) -> None:
        """Let go of it. Called once, whatever happened."""


class Together:
    """`driver` drives; orders come from all.

    Args:
        others: such as the page beside a gamepad.
    """

    def __init__(self, driver: Device, others: Sequence[Device]) -> None:
        self._driver, self._others = driver, others
        self.help = driver.help

    def connect(self) -> None:
        for device in (self._driver, *self._others):
            device.connect()

    def poll(self) -> Signals:
        signals = self._driver.poll()
        others = [order for device in self._others for order in device.poll().orders]
        return signals._replace(orders=(*signals.orders, *others))

    def close(self) -> None:
        for device in (self._driver, *self._others):
            attempt(device.close)


def without_drift(values: np.ndarray, dead: float) -> np.ndarray:
    """`values` in [-1, 1] without what a device says at rest: 0 within `dead`, and a straight line from there to 1.

    Anything but a finite number is 0: a device that speaks nonsense does not move an arm.
    """
    values = np.where(np.isfinite(values), values, 0.0)
    beyond = (np.abs(values) - dead) / (1 - dead)
    result: np.ndarray = np.sign(values) * np.clip(beyond, 0.0, 1.0)
    return result
