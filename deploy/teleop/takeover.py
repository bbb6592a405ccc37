"""A person who takes over from a policy with a device: `deploy teleop=gamepad`. When, the page's button says."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from action_diffusion.deploy.drivers.vendor import attempt
from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.loop.operator import STALE
from action_diffusion.deploy.robot.cell import read_cell
from action_diffusion.deploy.robot.process_robot import ProcessRobot
from action_diffusion.deploy.teleop.devices.device import Device
from action_diffusion.deploy.teleop.devices.registry import make_device
from action_diffusion.deploy.teleop.steering import SignalMapping, Speeds, steering_of
from action_diffusion.deploy.teleop.world import action_of, command_limits, place_of
from action_diffusion.errors import unknown
from action_diffusion.options import Deploy
from action_diffusion.registry import DEVICES

NOT_FOR_TAKING_OVER = ("browser", "script")
"""Devices that nobody takes over with."""


class DeviceTeleoperator:
    """See `operator.Teleoperator`: the arm goes on from where it is when the person takes over.

    Args:
        device: connected.
        present: where the arm is in terms of a command, [A].
        action: a command as the policy has it, which may mean rotations in 6D.
    """

    def __init__(
        self,
        device: Device,
        steering: SignalMapping,
        present: Callable[[], np.ndarray],
        action: Callable[[np.ndarray], np.ndarray] = np.asarray,
    ) -> None:
        self._device, self._steering, self._present, self._action = device, steering, present, action
        self._last = -np.inf

    def command(self, t: float) -> np.ndarray | None:
        signals = self._device.poll()
        present = self._present()
        if not signals.engaged:
            self._last = -np.inf
            return None
        if t - self._last > STALE:
            self._steering.begin(present)
        self._last = t
        command = self._steering.action(signals, present)
        return None if isinstance(command, str) else self._action(command)

    def close(self) -> None:
        attempt(self._device.close)


def teleoperator(config: Deploy, robot: ProcessRobot, limits: Limits) -> DeviceTeleoperator | None:
    """What `teleop=` names, ready; None where it names nothing.

    config: `configs/deploy.yaml`: teleop, hardware. limits: of the loop's gate, which nothing is to be refused by.
    Raises `InputError` for a device that cannot be had.
    """
    name = config.teleop
    if name is None:
        return None
    if name not in DEVICES or name in NOT_FOR_TAKING_OVER:
        raise unknown("device", str(name), [name for name in DEVICES if name not in NOT_FOR_TAKING_OVER], "teleop")
    device = make_device(name, read_cell(config.hardware) if config.hardware else {})
    assert device is not None
    layout, arm = robot.layout, robot.arm.limits
    as_commanded = len(limits.low) == layout.size
    within = limits if as_commanded else command_limits(layout, arm)
    gripper = (-1.0, 1.0) if config.robot == "sim_arm" else None
    steering = steering_of(layout.groups, within, robot.control_rate, Speeds(), arm_limits=arm, gripper=gripper)
    device.connect()
    action = np.asarray if as_commanded else functools.partial(action_of, layout)
    return DeviceTeleoperator(device, steering, lambda: place_of(robot), action)
