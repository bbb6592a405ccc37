"""Franka's arms (FER "Panda" and FR3) through `panda-python`: joint impedance at 1 kHz, by the FCI.

    our process ── set_control, each period ──▶ panda-python's own thread, 1 kHz ── torques, UDP ──▶ FCI
                                                     └ dies or halts with our process ──▶ no packets ──▶ robot stops

The thread holds the last target for as long as our process lives. When it dies or is halted, the FCI gets no packets,
and after 20 in a row (20 ms) it stops the robot: `communication_constraints_violation`.

https://jeanelsner.github.io/panda-py; https://frankarobotics.github.io/docs: control parameters, errors.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from action_diffusion.deploy.drivers.vendor import RemoteClock, above_zero, attempt, library, numbers, one_line
from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.hardware.protocols import ArmState, Group
from action_diffusion.errors import InputError, unknown

MODELS: dict[str, dict[str, list[float]]] = {
    "fer": {
        "low": [-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973],
        "high": [2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973],
        "velocity": [2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61],
        "acceleration": [15.0, 7.5, 10.0, 12.5, 15.0, 20.0, 20.0],
        "jerk": [7500.0, 3750.0, 5000.0, 6250.0, 7500.0, 10000.0, 10000.0],
    },
    "fr3": {
        "low": [-2.7437, -1.7837, -2.9007, -3.0421, -2.8065, 0.5445, -3.0159],
        "high": [2.7437, 1.7837, 2.9007, -0.1518, 2.8065, 4.5169, 3.0159],
        "velocity": [2.62, 2.62, 2.62, 2.62, 5.26, 4.18, 5.26],
        "acceleration": [10.0] * 7,
        "jerk": [5000.0] * 7,
    },
}
"""Franka's joint limits (rad, s). The FR3's velocities shrink near the ends of its joints: keep off them."""
WIDTH = 0.08
"""The Franka Hand opens so far (m)."""
STEP = 0.002
"""The hand is told to move when the width that is wanted has changed by more than this (m)."""
_JOINTS = Group(name="joints", size=7, kind="linear", unit="rad")
_SPEEDS = Group(name="joint_velocities", size=7, kind="linear", unit="rad/s")
_POSE = (
    Group(name="position", size=3, kind="linear", unit="m"),
    Group(name="rotation", size=3, kind="rotation", unit="rad", reference=(np.pi, 0.0, 0.0)),
)
_GRIPPER = Group(name="gripper", size=1, kind="hold", unit="m")


class FrankaArm:
    """Commands are joint angles (7, rad), and the hand's width (m).

    State is joint angles and velocities, the end effector's position and rotation vector (m, rad; in the
    base's frame), and the width.

    Args:
        host: the control box's address; the FCI must be active in Desk, and the joints unlocked.
        model: "fer" (Franka Emika Robot, Panda) or "fr3" (Franka Research 3). The package index has panda-python for
            the FER; an FR3 needs the wheel for its system version from panda-py's releases.
        rate: setpoints per second (Hz).
        stiffness: of all joints, as a share of panda-python's (600, …, 50 Nm/rad); damping goes with its square root.
        hand: a Franka Hand is mounted, and homed: commands have an eighth number. It says what it was told last.
        hand_speed, hand_force: of the hand (m/s, N).
        realtime: insist on a kernel with PREEMPT_RT, as Franka does; without, the robot may stop in the middle.
        dry_run: connect and read; no controller is started, and the hand is left alone.
    """

    watchdog = "FCI: without packets at 1 kHz from our process, 20 in a row, the robot stops by itself"

    def __init__(
        self,
        *,
        host: str,
        model: str,
        rate: float = 250.0,
        stiffness: float = 1.0,
        hand: bool = False,
        hand_speed: float = 0.1,
        hand_force: float = 20.0,
        realtime: bool = True,
        dry_run: bool = False,
    ) -> None:
        if model not in MODELS:
            raise unknown("model", model, MODELS, "arm franka")
        above_zero("arm franka", rate=rate, stiffness=stiffness, hand_speed=hand_speed, hand_force=hand_force)
        gripper = (_GRIPPER,) if hand else ()
        self.rate = float(rate)
        self.command = (_JOINTS, *gripper)
        self.state = (_JOINTS, _SPEEDS, *_POSE, *gripper)
        self.limits: Limits | None = _limits(model, hand)
        self._host, self._model, self._stiffness = host, model, float(stiffness)
        self._has_hand, self._hand_settings = hand, (float(hand_speed), float(hand_force))
        self._realtime, self._dry_run = realtime, dry_run
        self._panda: Any = None
        self._controller: Any = None
        self._hand: Hand | None = None
        self._clock = RemoteClock()

    def connect(self) -> None:
        panda_py, controllers = library("panda_py", "franka"), library("panda_py.controllers", "franka")
        franka = library("panda_py.libfranka", "franka")
        config = franka.RealtimeConfig.kEnforce if self._realtime else franka.RealtimeConfig.kIgnore
        try:
            self._panda = panda_py.Panda(self._host, "panda", config)
            self._check_ready(franka.RobotMode)
            if self._has_hand:
                self._hand = Hand(franka.Gripper(self._host), *self._hand_settings, still=self._dry_run)
            if not self._dry_run:
                k = np.array([600.0, 600.0, 600.0, 600.0, 250.0, 150.0, 50.0])
                d = np.array([50.0, 50.0, 50.0, 20.0, 20.0, 20.0, 10.0])
                self._controller = controllers.JointPosition(k * self._stiffness, d * self._stiffness**0.5, 1.0)
                self._panda.start_controller(self._controller)
                self._wait_moving()
            self.read()
        except Exception as error:
            self.stop()
            self.close()
            raise InputError(f"Franka at {self._host}: {one_line(error)}") from error

    def _check_ready(self, modes: Any) -> None:
        """Starting a controller would clear a reflex without a word: people should have seen it."""
        mode = self._panda.get_state().robot_mode
        if mode != modes.kIdle:
            raise InputError(f"it is not idle, but {mode}: unlock it, release the user stop, clear errors in Desk")
        low, high = self._panda.get_joint_limits_lower(), self._panda.get_joint_limits_upper()
        limits = MODELS[self._model]
        if (np.asarray(limits["low"]) < np.asarray(low) - 1e-3).any() or (
            np.asarray(limits["high"]) > np.asarray(high) + 1e-3
        ).any():
            raise InputError(f"its joint limits are narrower than those of model={self._model}: is it another one?")

    def _wait_moving(self) -> None:
        deadline = time.monotonic() + 2.0
        while not self._panda.is_moving():
            self._panda.raise_error()
            if time.monotonic() > deadline:
                raise InputError("its controller does not start")
            time.sleep(0.005)

    def read(self) -> ArmState:
        """Raises `RuntimeError` with libfranka's words where the robot has stopped with an error."""
        if not self._dry_run:
            self._panda.raise_error()
            if not self._panda.is_moving():
                raise ConnectionError("the robot is no longer controlled")
        state = self._panda.get_state()
        t = self._clock(state.time.to_sec(), time.monotonic())
        pose = numbers(state.O_T_EE, 16, "Franka's end effector").reshape(4, 4).T  # it comes column by column
        values = {
            "joints": numbers(state.q, 7, "Franka's joint angles"),
            "joint_velocities": numbers(state.dq, 7, "Franka's joint velocities"),
            "position": pose[:3, 3],
            "rotation": Rotation.from_matrix(pose[:3, :3]).as_rotvec(),
        }
        if self._hand is not None:
            values["gripper"] = np.array([self._hand.width])
        return ArmState(t, values)

    def send(self, setpoint: np.ndarray) -> None:
        if not self._dry_run:
            self._controller.set_control(setpoint[:7])
        if self._hand is not None:
            self._hand.command(float(setpoint[7]))

    def stop(self) -> None:
        """End control: the robot brakes and holds. The hand keeps what it holds."""
        if self._panda is not None and not self._dry_run:
            attempt(self._panda.stop_controller)

    def close(self) -> None:
        if self._hand is not None:
            self._hand.close()
        self._hand = self._controller = self._panda = None


class Hand:
    """The Franka Hand, moved by a thread: its calls return when the fingers are there.

    Closing grasps, so that it goes on pressing; opening moves. `still`: it is told nothing.
    """

    def __init__(self, gripper: Any, speed: float, force: float, *, still: bool) -> None:
        state = gripper.read_once()
        if not state.max_width > 0:
            raise InputError("its hand is not homed: home it in Desk")
        self._gripper, self._speed, self._force, self._still = gripper, speed, force, still
        self.width = float(state.width)
        self._error: Exception | None = None
        self._work, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._move, daemon=True, name="hand")
        self._thread.start()

    def command(self, width: float) -> None:
        """Begin to go to `width` (m). Raises what went wrong before."""
        if self._error is not None:
            raise ConnectionError(f"the hand: {one_line(self._error)}")
        if not self._still and abs(width - self.width) > STEP:
            self._closing = width < self.width
            self.width = width
            self._work.set()

    def _move(self) -> None:
        while self._work.wait() and not self._ended:
            self._work.clear()
            try:
                if self._closing:  # whatever is between the fingers is right
                    self._gripper.grasp(self.width, self._speed, self._force, WIDTH, WIDTH)
                else:
                    self._gripper.move(self.width, self._speed)
            except Exception as error:
                self._error = error

    def close(self) -> None:
        """Tell it no more."""
        self._ended = True
        self._work.set()
        self._thread.join(0.1)


def _limits(model: str, hand: bool) -> Limits:
    n = int(hand)
    ends = {"low": np.zeros(n), "high": np.full(n, WIDTH)}
    arrays = {name: np.append(values, ends.get(name, np.full(n, np.inf))) for name, values in MODELS[model].items()}
    return Limits(**arrays, max_step=np.append(np.full(7, np.inf), np.full(n, WIDTH)))
