"""Arms of Universal Robots through `ur-rtde`: setpoints by RTDE, followed by `servoj` in a program on the controller.

    our process ── servoJ, each period ──▶ RTDE input register ──▶ rtde_control's program ── servoj ──▶ joints
                                               └ no update for `watchdog_time` ──▶ program ended, arm braked

The program repeats the last target for as long as it runs. What ends it when we are gone is the controller's own
watchdog on that register, and a controller that does not take it is refused.

https://sdurobotics.gitlab.io/ur_rtde; URScript manual: `servoj`, `rtde_set_watchdog`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from action_diffusion.deploy.drivers.vendor import (
    RemoteClock,
    above_zero,
    attempt,
    library,
    numbers,
    one_line,
    same_sockets,
    sockets,
)
from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.hardware.protocols import ArmState, Group
from action_diffusion.errors import InputError, unknown

SPEEDS: dict[str, tuple[int, ...]] = {
    "ur3": (180, 180, 180, 360, 360, 360),
    "ur3e": (180, 180, 180, 360, 360, 360),
    "ur5": (180,) * 6,
    "ur5e": (180,) * 6,
    "ur10": (120, 120, 180, 180, 180, 180),
    "ur10e": (120, 120, 180, 180, 180, 180),
    "ur16e": (120, 120, 180, 180, 180, 180),
    "ur20": (120, 120, 150, 210, 210, 210),
    "ur30": (120, 120, 150, 210, 210, 210),
}
"""Largest joint speeds (degrees/s), of the user manuals. They give no accelerations. All joints turn by ±360°."""
SPACES = ("joints", "pose")
RUNNING = 7
"""`getRobotMode` of an arm that is switched on, with its brakes released."""
SILENCE = 0.1
"""A controller that has sent no new state for so long (s) is gone."""
_JOINTS = Group(name="joints", size=6, kind="linear", unit="rad")
_SPEEDS = Group(name="joint_velocities", size=6, kind="linear", unit="rad/s")
_POSITION = Group(name="position", size=3, kind="linear", unit="m")
_GRIPPER = Group(name="gripper", size=1, kind="hold")


class UrArm:
    """Commands are joint angles, or the tool's pose in the base's frame; state is both, with joint velocities.

    Args:
        host: the controller's address. It must be in remote control (e-Series).
        model: "ur5e", …: see `SPEEDS`.
        space: of commands: "joints" (6, rad), or "pose": position (3, m) and rotation vector (3, rad). Near
            singularities a pose moves joints fast: the vendor's speeds are checked for "joints" alone.
        rate: setpoints per second (Hz): up to 125 for CB3, up to 500 for e-Series.
        lookahead: seconds over which `servoj` smooths, 0.03 to 0.2: longer is smoother, and later.
        gain: of `servoj`, 100 to 2000: higher follows more closely, and shakes earlier.
        watchdog_time: the controller brakes when it has had no setpoint for so long (s).
        deceleration: of the vendor's stop (rad/s²).
        reference: a rotation vector from which the limits of a pose's rotation count; the default points down.
        tool_output: a digital output of the tool, 0 or 1, that closes a gripper: a further number of commands, above
            0.5 for closed. None: there is no gripper.
        dry_run: connect, start the program and its watchdog, read, and send no setpoint.
    """

    threaded = True
    """The library has threads of its own, which have to run before others as well."""

    def __init__(
        self,
        *,
        host: str,
        model: str,
        space: str = "joints",
        rate: float = 125.0,
        lookahead: float = 0.1,
        gain: float = 300.0,
        watchdog_time: float = 0.1,
        deceleration: float = 10.0,
        reference: Sequence[float] = (math.pi, 0.0, 0.0),
        tool_output: int | None = None,
        dry_run: bool = False,
    ) -> None:
        if model not in SPEEDS:
            raise unknown("model", model, SPEEDS, "arm ur")
        if space not in SPACES:
            raise unknown("space", space, SPACES, "arm ur")
        above_zero("arm ur", rate=rate, watchdog_time=watchdog_time, deceleration=deceleration)
        if not (0.03 <= lookahead <= 0.2 and 100 <= gain <= 2000 and watchdog_time > 2 / rate):
            raise InputError(
                f"arm ur: lookahead={lookahead} must lie in 0.03 to 0.2 s, gain={gain} in 100 to 2000, "
                f"and watchdog_time={watchdog_time} above two periods of {rate:g} Hz"
            )
        if tool_output not in (None, 0, 1):
            raise InputError(f"arm ur: tool_output={tool_output} must be 0 or 1")
        self.rate = float(rate)
        rotation = Group(name="rotation", size=3, kind="rotation", unit="rad", reference=_three(reference))
        gripper = () if tool_output is None else (_GRIPPER,)
        self.command = ((_JOINTS,) if space == "joints" else (_POSITION, rotation)) + gripper
        self.state = (_JOINTS, _SPEEDS, _POSITION, rotation, *gripper)
        self.limits = _limits(model, len(gripper)) if space == "joints" else None
        self.watchdog = (
            f"RTDE watchdog: the controller ends its program and brakes when no setpoint came for {watchdog_time:g} s"
        )
        self._host, self._joints, self._dry_run = host, space == "joints", dry_run
        self._servo = (0.0, 0.0, 1 / self.rate, float(lookahead), float(gain))  # speed and acceleration are unused
        self._watchdog_time, self._deceleration, self._output = watchdog_time, float(deceleration), tool_output
        self._receive: Any = None
        self._control: Any = None
        self._sockets: dict[int, int] = {}
        self._io: Any = None
        self._closed, self._watched, self._sent = 0.0, False, 0.0
        self._clock, self._stamp, self._seen = RemoteClock(), -1.0, 0.0

    def connect(self) -> None:
        receive, control = library("rtde_receive", "ur"), library("rtde_control", "ur")
        with self._refusals():
            self._receive = receive.RTDEReceiveInterface(self._host)
            mode = self._receive.getRobotMode()
            if mode != RUNNING:
                raise InputError(f"the arm is not running (robot mode {mode}): switch it on and release its brakes")
            self._check_stopped()
            others = sockets()
            self._control = control.RTDEControlInterface(self._host)
            self._sockets = {number: inode for number, inode in sockets().items() if others.get(number) != inode}
            if self._output is not None:
                self._io = library("rtde_io", "ur").RTDEIOInterface(self._host)
                self._grip(self._closed)
            self.read()

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """Errors within become an `InputError` that names the robot, and nothing stays connected."""
        try:
            yield
        except Exception as error:
            self.close()
            raise InputError(f"UR at {self._host}: {one_line(error)}") from error

    def read(self) -> ArmState:
        """Raises `TimeoutError` where the controller is silent, `ConnectionError` where it has stopped the arm."""
        receive = self._receive
        stamp = receive.getTimestamp()
        for _ in range(3):  # the library may receive between two calls
            joints, speeds, pose = receive.getActualQ(), receive.getActualQd(), receive.getActualTCPPose()
            again = receive.getTimestamp()
            if again == stamp:
                break
            stamp = again
        now = time.monotonic()
        if stamp != self._stamp:
            self._stamp, self._seen = stamp, now
        elif now - self._seen > SILENCE:
            raise TimeoutError(f"the controller has sent no state for {SILENCE} s")
        self._check_stopped()
        place = numbers(pose, 6, "UR's tool pose")
        values = {
            "joints": numbers(joints, 6, "UR's joint angles"),
            "joint_velocities": numbers(speeds, 6, "UR's joint velocities"),
            "position": place[:3],
            "rotation": place[3:],
        }
        if self._output is not None:
            values["gripper"] = np.array([self._closed])
        return ArmState(self._clock(stamp, self._seen), values)

    def _check_stopped(self) -> None:
        if self._receive.isEmergencyStopped():
            raise ConnectionError("the robot is in an emergency stop")
        if self._receive.isProtectiveStopped():
            raise ConnectionError("the robot is in a protective stop")

    def send(self, setpoint: np.ndarray) -> None:
        """Raises `ConnectionError` where the controller takes no setpoint, `TimeoutError` where it took too long.

        The library makes a new connection for one that it has lost, in whichever thread notices, with a new program
        that has no watchdog. A new connection is therefore the end, and so is whatever took longer than the watchdog
        waits.
        """
        self._check_connection()
        if not self._watched:  # not earlier: from now on a setpoint has to come in each of its periods
            self._watch()
        began = time.monotonic()
        if began - self._sent > self._watchdog_time:
            raise TimeoutError(f"no setpoint was sent for {began - self._sent:.2f} s: the watchdog has struck")
        if self._dry_run:
            taken = self._control.kickWatchdog()
        else:
            servo = self._control.servoJ if self._joints else self._control.servoL
            taken = servo(setpoint[:6].tolist(), *self._servo)
        if not taken:
            raise ConnectionError("the controller takes no setpoints: its program has ended")
        self._sent = time.monotonic()
        if self._sent - began > self._watchdog_time:
            raise TimeoutError(f"a setpoint took {self._sent - began:.2f} s to send")
        self._check_connection()  # the library sends what it could not send once more, over a new one
        if self._output is not None and (setpoint[6] > 0.5) != (self._closed > 0.5):
            self._grip(float(setpoint[6] > 0.5))

    def _check_connection(self) -> None:
        if not self._control.isConnected() or not same_sockets(self._sockets):
            raise ConnectionError("the connection to the controller was lost")

    def _watch(self) -> None:
        """Set it: before the first setpoint, so that the arm has not moved where the controller refuses."""
        self._watched, self._sent = self._control.setWatchdog(1 / self._watchdog_time), time.monotonic()
        if not self._watched:
            raise ConnectionError("the controller does not take the RTDE watchdog, and nothing else would stop the arm")

    def _grip(self, closed: float) -> None:
        if not self._dry_run and not self._io.setToolDigitalOut(self._output, closed > 0.5):
            raise ConnectionError(f"the controller does not set the tool's output {self._output}")
        self._closed = closed

    def stop(self) -> None:
        """`stopj`: joints brake at `deceleration`. The gripper keeps what it holds."""
        control, deceleration = self._control, self._deceleration
        if control is not None and not self._dry_run:
            attempt(lambda: control.servoStop(deceleration))

    def close(self) -> None:
        """End the program, and with it the watchdog, and disconnect."""
        control, self._control = self._control, None
        if control is not None:
            attempt(control.stopScript, 2.0)
        for interface in (control, self._io, self._receive):
            if interface is not None:
                attempt(interface.disconnect)
        self._io = self._receive = None


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    x, y, z = (float(value) for value in numbers(values, 3, "reference"))
    return x, y, z


def _limits(model: str, n_grippers: int) -> Limits:
    """What the manual says; a gripper is open or closed. Acceleration and jerk are for the user to say."""
    turn, none = np.full(6, 2 * math.pi), np.full(6, np.inf)
    return Limits(
        low=np.append(-turn, np.zeros(n_grippers)),
        high=np.append(turn, np.ones(n_grippers)),
        velocity=np.append(np.radians(SPEEDS[model]), np.full(n_grippers, np.inf)),
        max_step=np.append(none, np.ones(n_grippers)),
    )
