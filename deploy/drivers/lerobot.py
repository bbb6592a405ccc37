"""Anything that lerobot drives through its `Robot` classes: SO-100, SO-101, Koch, OMX, …

What such arms do when our process dies: their motors keep their torque and hold the goal that they were given last.
Nothing brakes, lets go, or notices. Two ways out, one of which is required:

- `bus_watchdog`, for motors that have one (Dynamixel's X series: Koch, OMX): a motor that gets no instruction for so
  long stops. Feetech's (SO-100, SO-101) have none.
- `watchdog`, in your words: what stops the arm, such as a person at the power switch. It goes into the record.

https://huggingface.co/docs/lerobot; ROBOTIS e-Manual, control table: Bus Watchdog (98).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import pkgutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from action_diffusion.deploy.drivers.vendor import above_zero, attempt, library, numbers, one_line
from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.hardware.protocols import ArmState, Group
from action_diffusion.errors import InputError, unknown

VERSION = "0.4.4"
INSTALL = f"pip install --no-deps lerobot=={VERSION}"
"""Without its dependencies, since it asks for older versions of torch and diffusers, which its drivers do not need."""
SIX = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
"""The motors of SO-100, SO-101, Koch and OMX, in lerobot's order."""
TICK = 0.02
"""Dynamixel's unit of the bus watchdog (s)."""


class LeRobotArm:
    """Commands and state are one group, `joints`: the positions of `motors`, in lerobot's units.

    Those are degrees where the robot's configuration has use_degrees=true, otherwise -100 to 100 of the calibrated
    range; 0 to 100 for grippers. lerobot knows no limits: the user gives all.

    Args:
        type: lerobot's name of the robot: "so101_follower", "koch_follower", …
        config: what its configuration takes: {port: /dev/ttyACM0, id: my_arm, …}. Cameras are drivers of their own.
        motors: names as in lerobot's actions, without ".pos", in the order of the policy's actions.
        rate: setpoints per second (Hz): a read and a write on a serial bus have to fit into a period.
        watchdog: what stops the arm when this process dies.
        bus_watchdog: seconds, 0.02 to 2.54, in steps of 0.02; 0: the motors have none.
        dry_run: open the bus and read; torque stays as it is, and no goal is written.
    """

    limits: Limits | None = None

    def __init__(
        self,
        *,
        type: str,
        config: Mapping[str, Any],
        motors: Sequence[str] = SIX,
        rate: float = 100.0,
        watchdog: str = "",
        bus_watchdog: float = 0.0,
        dry_run: bool = False,
    ) -> None:
        above_zero("arm lerobot", rate=rate)
        if bus_watchdog and not TICK <= bus_watchdog <= 127 * TICK:
            raise InputError(f"arm lerobot: bus_watchdog={bus_watchdog} must lie in {TICK} to {127 * TICK} s")
        if not watchdog.strip() and not bus_watchdog:
            raise InputError(
                "arm lerobot: its motors hold their last goal when our process dies, and nothing stops them: give "
                "bus_watchdog=SECONDS (Dynamixel), or say in watchdog=… what does, such as a person at the power switch"
            )
        if bus_watchdog:
            watchdog = f"Dynamixel's bus watchdog: each motor stops when it got no instruction for {bus_watchdog:g} s"
        self.rate, self.watchdog = float(rate), watchdog
        joints = Group(name="joints", size=len(motors), kind="linear", unit="lerobot's: degrees or percent")
        self.command: tuple[Group, ...] = (joints,)
        self.state: tuple[Group, ...] = self.command
        self._type, self._config, self._motors = type, dict(config), [f"{name}.pos" for name in motors]
        self._ticks, self._dry_run, self._watched = round(bus_watchdog / TICK), dry_run, False
        self._robot: Any = None

    def connect(self) -> None:
        robots = library("lerobot.robots", "lerobot", INSTALL)
        try:
            settings = configuration(robots, robots.RobotConfig, self._type, self._config)
            robot = robots.make_robot_from_config(settings)
            self._check_motors(robot)
            self._open(robot)
            self.read()
        except Exception as error:
            self.close()
            hint = f"; install {INSTALL}" if isinstance(error, ImportError) else ""
            raise InputError(f"lerobot's {self._type}: {one_line(error)}{hint}") from error

    def _check_motors(self, robot: Any) -> None:
        actions = list(robot.action_features)
        if set(actions) != set(self._motors):
            raise InputError(f"motors={self._motors} are not those of its actions: {', '.join(actions)}")

    def _open(self, robot: Any) -> None:
        bus = getattr(robot, "bus", None)
        if self._dry_run:
            if bus is None:
                raise InputError("it has no bus that could be read without switching on its torque: no dry_run")
            self._robot = robot
            bus.connect()
        else:
            self._robot = robot
            robot.connect(calibrate=False)
        if not robot.is_calibrated:
            raise InputError(f"it is not calibrated: lerobot-calibrate --robot.type={self._type} …")
        if self._ticks:
            self._check_watchdog(bus)
            self._write_watchdog(bus, 0)  # which also clears one that has struck

    def _check_watchdog(self, bus: Any) -> None:
        tables = getattr(bus, "model_ctrl_table", None)
        if tables is None:
            raise InputError("bus_watchdog: it has no bus of motors that have one")
        without = [name for name, motor in bus.motors.items() if "Bus_Watchdog" not in tables.get(motor.model, {})]
        if without:
            raise InputError(f"bus_watchdog: {', '.join(without)} have none")

    def read(self) -> ArmState:
        """The time is that of the middle of the exchange with the motors."""
        began = time.monotonic()
        observation = self._robot.get_observation()
        t = (began + time.monotonic()) / 2
        values = [float(observation[name]) for name in self._motors]
        return ArmState(t, {"joints": numbers(values, len(values), "lerobot's positions")})

    def send(self, setpoint: np.ndarray) -> None:
        if self._dry_run:
            return
        if self._ticks and not self._watched:  # not earlier: from now on motors want to hear something all the time
            self._write_watchdog(self._robot.bus, self._ticks)
            self._watched = True
        self._robot.send_action(dict(zip(self._motors, setpoint.tolist(), strict=True)))

    def stop(self) -> None:
        """Hold where the arm is: these motors have nothing better."""
        if self._robot is not None and not self._dry_run:
            attempt(self._hold, 0.5)

    def _hold(self) -> None:
        self.send(self.read().values["joints"])

    def close(self) -> None:
        """Torque stays on, unless config says disable_torque_on_disconnect=true: then a raised arm falls."""
        robot, self._robot = self._robot, None
        if robot is None:
            return
        if self._dry_run:
            attempt(lambda: robot.bus.disconnect(disable_torque=False))
            return
        if self._ticks:
            attempt(lambda: self._write_watchdog(robot.bus, 0))
        attempt(robot.disconnect)

    @staticmethod
    def _write_watchdog(bus: Any, ticks: int) -> None:
        for name in bus.motors:
            bus.write("Bus_Watchdog", name, ticks, normalize=False, num_retry=2)


def configuration(package: ModuleType, base: Any, kind: str, config: Mapping[str, Any]) -> Any:
    """The configuration `kind` ("so101_follower", "koch_leader") of `package`, with the values of `config`.

    package: lerobot.robots or lerobot.teleoperators; base: the class whose registry has its configurations. A device is
    registered when its package is imported, which is called much like the device. Raises `InputError` for others, and
    for options that it does not take.
    """
    names = [found.name for found in pkgutil.iter_modules(package.__path__) if found.ispkg]
    for name in difflib.get_close_matches(kind, names, n=len(names), cutoff=0.0):
        if kind in base.get_known_choices():
            break
        with contextlib.suppress(Exception):  # those whose libraries are missing raise what they like
            importlib.import_module(f"{package.__name__}.{name}")
    if kind not in base.get_known_choices():
        raise unknown(package.__name__.rpartition(".")[2].removesuffix("s"), kind, base.get_known_choices(), "lerobot")
    chosen = base.get_choice_class(kind)
    fields = {field.name for field in dataclasses.fields(chosen)}
    for name in config:
        if name not in fields:
            raise unknown("option", name, fields, "config")
    kept = {"disable_torque_on_disconnect": False} if "disable_torque_on_disconnect" in fields else {}
    paths = {field.name for field in dataclasses.fields(chosen) if "Path" in str(field.type)}
    given = {name: Path(value) if name in paths else value for name, value in config.items()}
    return chosen(**{**kept, **given})  # else a raised arm falls whenever a run ends
