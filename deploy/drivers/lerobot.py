"""Anything that lerobot drives through its `Robot` classes: SO-100, SO-101, Koch, OMX, …

What such arms do when our process dies: their motors keep their torque and hold the goal that they were given last.
Nothing brakes, lets go, or notices. Two ways out, one of which is required:

- `bus_watchdog`, for motors that have one (Dynamixel's X series: Koch, OMX): a motor that gets no instruction for so
  long stops. Feetech's (SO-100, SO-101) have none.
- `watchdog`, in your words: what stops the arm, such as a person at the power switch. It goes into the record.

What lerobot leaves to its users on the bus, and this driver does:

- A bus that did not answer when it was opened is opened again (`OPENING`): one lost byte would end it.
- A state that did not arrive is asked for again, for as long as a loose cable may take (`PATIENCE`). Meanwhile the
  motors rest at their last goal, and the next one is a setpoint's step from there.
- An answer that comes too late would pass for that to the next question, since packets have no numbers: what has come
  before a question is dropped.
- Motors that are limp keep an old goal, and jump there when they are switched on: their goal becomes where they are.

https://huggingface.co/docs/lerobot; ROBOTIS e-Manual, control table: Bus Watchdog (98).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import time
from collections.abc import Callable, Mapping, Sequence
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
"""Without its dependencies, since it asks for older versions of torch and diffusers, which its drivers do not need.

On Python 3.12 `lerobot[feetech,dynamixel]==0.6.1` does as well, with its dependencies; both are tested.
"""
SIX = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
"""The motors of SO-100, SO-101, Koch and OMX, in lerobot's order."""
TICK = 0.02
"""Dynamixel's unit of the bus watchdog (s)."""
PATIENCE = 0.3
"""How long an answer may fail to arrive (s)."""
OPENING = 2.0
"""How long a bus is opened until its motors answer (s)."""
READ_WAIT = 0.005
"""How long one reading of a port waits for its bytes (s); their libraries ask again until their own time is over."""


class LeRobotArm:
    """Commands and state are one group, `joints`: the positions of `motors`, in lerobot's units.

    Those are degrees where the robot's configuration has use_degrees=true, otherwise -100 to 100 of the calibrated
    range; 0 to 100 for grippers. lerobot knows no limits: the user gives all.

    Args:
        type: lerobot's name of the robot: "so101_follower", "koch_follower", …
        config: what its configuration takes: {port: /dev/ttyACM0, id: my_arm, …}. Cameras are drivers of their own.
        plugin: the package that brings the type, where it is not lerobot's own; "": lerobot_robot_TYPE.
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
        plugin: str = "",
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
        self._plugin, self._dry_run = plugin, dry_run
        self._ticks, self._watched, self._heard = round(bus_watchdog / TICK), False, 0.0
        self._robot: Any = None
        self._last: np.ndarray | None = None

    def connect(self) -> None:
        robots = library("lerobot.robots", "lerobot", INSTALL)
        try:
            settings = configuration(robots, robots.RobotConfig, self._type, self._config, self._plugin)
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
            opened(robot, bus.connect)
        else:
            self._robot = robot
            if bus is not None and not _lacking(bus, "Torque_Enable", "Goal_Position"):
                opened(robot, lambda: _stay(bus))
            opened(robot, lambda: robot.connect(calibrate=False))
        if not robot.is_calibrated:
            raise InputError(f"it is not calibrated: lerobot-calibrate --robot.type={self._type} …")
        if self._ticks:
            without = ["its motors"] if bus is None else _lacking(bus, "Bus_Watchdog")
            if without:
                raise InputError(f"bus_watchdog: {', '.join(without)} have none")
            self._write_watchdog(bus, 0)  # which also clears one that has struck

    def read(self) -> ArmState:
        """The time is that of the middle of the exchange with the motors.

        Raises `ConnectionError` where they have not answered for `PATIENCE`, and `TimeoutError` where they have had no
        instruction for as long as their watchdog waits: they have stopped, and would take no goal.
        """
        observation, t = answered(self._robot, self._robot.get_observation)
        now = time.monotonic()
        if self._watched and now - self._heard > self._ticks * TICK:
            raise TimeoutError(
                f"the motors got no instruction for {now - self._heard:.2f} s: their watchdog has struck"
            )
        self._heard = now
        values = [float(observation[name]) for name in self._motors]
        return ArmState(t, {"joints": numbers(values, len(values), "lerobot's positions")})

    def send(self, setpoint: np.ndarray) -> None:
        if self._dry_run:
            return
        if self._ticks and not self._watched:  # not earlier: from now on motors want to hear something all the time
            self._write_watchdog(self._robot.bus, self._ticks)
            self._watched, self._heard = True, time.monotonic()
        self._last = setpoint.copy()
        self._robot.send_action(dict(zip(self._motors, setpoint.tolist(), strict=True)))

    def stop(self) -> None:
        """Rest at the last setpoint: these motors have nothing better.

        Where the arm is would be a goal outside of its limits for one that was pushed or sags, and sink it each time.
        """
        last = self._last
        if self._robot is not None and last is not None:
            attempt(lambda: self.send(last), 0.5)

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


def _lacking(bus: Any, *registers: str) -> list[str]:
    """Names of the motors of `bus` that have not all of these registers; of a bus without such tables, all."""
    tables = getattr(bus, "model_ctrl_table", {})
    return [name for name, motor in bus.motors.items() if not set(registers) <= set(tables.get(motor.model, {}))]


def _stay(bus: Any) -> None:
    """Motors that are limp get for their goal where they are. Opens and closes the bus."""
    bus.connect()
    try:
        torque = bus.sync_read("Torque_Enable", normalize=False, num_retry=2)
        limp = [name for name, on in torque.items() if not on]
        if limp:
            present = bus.sync_read("Present_Position", limp, normalize=False, num_retry=2)
            for name, place in present.items():
                bus.write("Goal_Position", name, place, normalize=False, num_retry=2)
    finally:
        bus.disconnect(disable_torque=False)


def opened(device: Any, connect: Callable[[], None]) -> None:
    """`connect()`, again for `OPENING` where the motors of a device of lerobot's do not answer as they should.

    Whoever reads from its port sleeps from then on until bytes are there. Feetech's and Dynamixel's libraries ask
    without waiting, over and over: in real time that keeps a core from the kernel's thread that brings the bytes.
    """
    bus: Any = getattr(device, "bus", None)
    port = getattr(bus, "port_handler", None)
    if port is not None and hasattr(bus, "ping"):
        bus.ping = functools.partial(_ping, bus)
    first = time.monotonic()
    while True:
        try:
            connect()
            break
        except (ConnectionError, RuntimeError, IndexError):  # nothing came; too few motors answered; too late
            if port is None or time.monotonic() - first > OPENING:
                raise
            if port.is_open:
                port.closePort()  # which is all: what the motors do stays as it is
    serial = getattr(port, "ser", None)
    if serial is not None and serial.is_open:
        serial.timeout = READ_WAIT


def _ping(bus: Any, motor: object, **options: Any) -> int | None:
    """The model number of a motor of `bus`, or None where it has not answered for `PATIENCE`, where lerobot gives it
    35 ms. What arrived before is forgotten."""
    first = time.monotonic()
    while True:
        bus.port_handler.ser.reset_input_buffer()
        with contextlib.suppress(IndexError):  # the libraries look for numbers in a late answer that has none
            model: int | None = type(bus).ping(bus, motor, **options)
            if model is not None:
                return model
        if time.monotonic() - first > PATIENCE:
            return None


def answered(device: Any, ask: Callable[[], Any]) -> tuple[Any, float]:
    """What a device of lerobot's answers, and the middle of the exchange (monotonic s).

    Asks again for `PATIENCE` where nothing comes, or something that is damaged; then raises its `ConnectionError`. What
    arrived before is forgotten: lerobot's libraries would take it for the answer to what is asked next.
    """
    serial = getattr(getattr(getattr(device, "bus", None), "port_handler", None), "ser", None)
    first = time.monotonic()
    while True:
        began = time.monotonic()
        try:
            if serial is not None:
                serial.reset_input_buffer()
            return ask(), (began + time.monotonic()) / 2
        except ConnectionError:
            if time.monotonic() - first > PATIENCE:
                raise
            time.sleep(0.001)  # one that is not connected at all says so at once


def configuration(package: ModuleType, base: Any, kind: str, config: Mapping[str, Any], plugin: str = "") -> Any:
    """The configuration `kind` ("so101_follower", "koch_leader") of `package`, with the values of `config`.

    package: lerobot.robots, .teleoperators or .cameras; base: the class whose registry has its configurations. A device
    is registered when its package is imported, which is called much like the device: one of lerobot's own, or else the
    installed `plugin`, by default lerobot_ROBOT_KIND, as lerobot calls them. Other plugins are not imported. Raises
    `InputError` for an unknown kind, for options that it does not take, and for a plugin that cannot be imported.
    """
    role = package.__name__.rpartition(".")[2].removesuffix("s")
    names = [found.name for found in pkgutil.iter_modules(package.__path__) if found.ispkg]
    for name in difflib.get_close_matches(kind, names, n=len(names), cutoff=0.0):
        if kind in base.get_known_choices():
            break
        with contextlib.suppress(Exception):  # those whose libraries are missing raise what they like
            importlib.import_module(f"{package.__name__}.{name}")
    if kind not in base.get_known_choices():
        _import_plugin(f"lerobot_{role}_", kind, plugin)
    if kind not in base.get_known_choices():
        installed = {name.removeprefix(f"lerobot_{role}_") for name in _plugins(f"lerobot_{role}_")}
        raise unknown(role, kind, {*base.get_known_choices(), *installed}, "lerobot and its plugins")
    chosen = base.get_choice_class(kind)
    fields = {field.name for field in dataclasses.fields(chosen)}
    for name in config:
        if name not in fields:
            raise unknown("option", name, fields, "config")
    # A raised arm would fall whenever a run ends; a read is tried again by us, and for how long is ours to say.
    ours = {"disable_torque_on_disconnect": False, "num_read_retries": 0}
    paths = {field.name for field in dataclasses.fields(chosen) if "Path" in str(field.type)}
    given = {name: Path(value) if name in paths else value for name, value in config.items()}
    return chosen(**{name: value for name, value in ours.items() if name in fields} | given)


def _plugins(prefix: str) -> list[str]:
    """Installed packages whose names begin with `prefix`: lerobot finds its plugins by them."""
    names = (distribution.metadata["Name"] or "" for distribution in importlib.metadata.distributions())
    return sorted({name for name in names if name.startswith(prefix)})


def _import_plugin(prefix: str, kind: str, plugin: str) -> None:
    """Import the plugin that a user named, or whose name follows from `kind`, where it is installed.

    Raises `InputError` where `plugin` is none, is not installed, or does not import.
    """
    name = plugin or f"{prefix}{kind}"
    if plugin and not (name.startswith(prefix) and name.isidentifier()):
        raise InputError(f"plugin={plugin}: lerobot's plugins of this kind are called {prefix}NAME")
    if not name.isidentifier() or importlib.util.find_spec(name) is None:
        if plugin:
            raise unknown("plugin", plugin, _plugins(prefix))
        return
    try:
        importlib.import_module(name)
    except Exception as error:
        raise InputError(f"plugin {name} does not import: {one_line(error)}") from error
