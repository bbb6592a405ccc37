"""Our driver on lerobot itself: its robots, configurations and motor buses, with nothing on the serial port.

    PYTHONPATH=FOLDER_WITH_LEROBOT python lerobot_peer.py

Prints what it found as JSON, for test_lerobot.py. Methods of the buses are replaced by `autospec`, which refuses calls
that the real ones would not take.
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from lerobot.motors.dynamixel import DynamixelMotorsBus
from lerobot.motors.feetech import FeetechMotorsBus
from lerobot.motors.motors_bus import SerialMotorsBus
from lerobot.robots import Robot, RobotConfig, make_robot_from_config
from lerobot.teleoperators import Teleoperator, TeleoperatorConfig, make_teleoperator_from_config

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import vendors

from action_diffusion.deploy.drivers.lerobot import SIX, LeRobotArm
from action_diffusion.deploy.teleop.devices.leader import Leader
from action_diffusion.errors import InputError


def differences() -> list[str]:
    """Where the stand-ins' methods take other parameters than lerobot's."""
    found = []
    pairs = ((vendors.Robot, Robot), (vendors.MotorsBus, SerialMotorsBus), (vendors.Teleoperator, Teleoperator))
    for mine, real in pairs:
        for name, member in vars(mine).items():
            if name.startswith("_") or not inspect.isfunction(member):
                continue
            ours, theirs = (
                [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
                for function in (member, getattr(real, name))
            )
            if ours != theirs:
                found.append(f"{name}: {ours} is not {theirs}")
    for registry in (RobotConfig, TeleoperatorConfig):
        for name in ("get_known_choices", "get_choice_class"):
            if not callable(getattr(registry, name)):
                found.append(f"{registry.__name__}.{name}")
    for make in (make_robot_from_config, make_teleoperator_from_config):
        if list(inspect.signature(make).parameters) != ["config"]:
            found.append(make.__name__)
    return found


def noting(done: list[str], name: str, connected: mock.PropertyMock, after: bool) -> Callable[..., None]:
    """What stands for the method `name`: it goes to `done`, and the bus is connected or not from then on."""

    def effect(*_: Any, **__: Any) -> None:
        done.append(name)
        connected.return_value = after

    return effect


def lead(kind: str, bus: type, folder: str) -> list[str]:
    """What the driver of a leader arm did on `bus`, and what it said; or why it refused."""
    done: list[str] = []
    place = {name: 10.0 * index for index, name in enumerate(SIX)}
    with ExitStack() as stack:
        for name in ("connect", "disconnect", "write", "disable_torque", "enable_torque", "configure_motors"):
            call = mock.patch.object(
                bus, name, autospec=True, side_effect=lambda *_, name=name, **__: done.append(name)
            )
            stack.enter_context(call)
        stack.enter_context(
            mock.patch.object(bus, "sync_read", autospec=True, side_effect=lambda *_, **__: dict(place))
        )
        stack.enter_context(mock.patch.object(bus, "is_calibrated", new_callable=mock.PropertyMock, return_value=True))
        connected = stack.enter_context(mock.patch.object(bus, "is_connected", new_callable=mock.PropertyMock))
        connected.return_value = False
        leader = Leader(type=kind, config={"port": "/dev/null", "id": "leader", "calibration_dir": folder})
        for name, after in (("connect", True), ("disconnect", False)):
            getattr(bus, name).side_effect = noting(done, name, connected, after)
        try:
            leader.connect()
        except InputError as error:
            return [str(error)]
        target = leader.poll().target
        assert target is not None
        done.append(str(target.tolist()))
        leader.close()
    return done


def drive(kind: str, bus: type, folder: str, **settings: Any) -> list[str]:
    """Names and arguments of what the driver did on `bus`, from connecting to closing; or why it refused."""
    done: list[str] = []
    place = dict.fromkeys(SIX, 10.0)

    def record(name: str, answer: Any = None) -> Any:
        def call(_: Any, *given: Any, **named: Any) -> Any:
            done.append(f"{name} {list(given)}" if name == "write" else name)
            return answer

        return call

    with ExitStack() as stack:
        for name in ("connect", "disconnect", "write", "disable_torque", "enable_torque", "configure_motors"):
            stack.enter_context(mock.patch.object(bus, name, autospec=True, side_effect=record(name)))
        for name, answer in (("sync_read", place), ("sync_write", None)):
            stack.enter_context(mock.patch.object(bus, name, autospec=True, side_effect=record(name, answer)))
        stack.enter_context(mock.patch.object(bus, "is_calibrated", new_callable=mock.PropertyMock, return_value=True))
        connected = stack.enter_context(mock.patch.object(bus, "is_connected", new_callable=mock.PropertyMock))
        connected.return_value = False
        for name, after in (("connect", True), ("disconnect", False)):
            getattr(bus, name).side_effect = noting(done, name, connected, after)
        config = {"port": "/dev/null", "id": "arm", "calibration_dir": folder}
        arm = LeRobotArm(type=kind, config=config, **settings)
        try:
            arm.connect()
        except InputError as error:
            return [str(error)]
        done.append("connected")
        values = arm.read().values["joints"]
        assert values.tolist() == list(place.values())
        arm.send(values + 1)
        arm.stop()
        arm.close()
    return done


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = {
            "differences": differences(),
            "so101": drive("so101_follower", FeetechMotorsBus, folder, watchdog="a person"),
            "so101_watchdog": drive("so101_follower", FeetechMotorsBus, folder, bus_watchdog=0.1),
            "koch": drive("koch_follower", DynamixelMotorsBus, folder, bus_watchdog=0.1),
            "koch_dry": drive("koch_follower", DynamixelMotorsBus, folder, bus_watchdog=0.1, dry_run=True),
            "unknown": drive("so102_follower", FeetechMotorsBus, folder, watchdog="a person"),
            "leader": lead("so101_leader", FeetechMotorsBus, folder),
            "unknown_leader": lead("so102_leader", FeetechMotorsBus, folder),
            "numpy": np.__version__,
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
