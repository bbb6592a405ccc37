"""A UR5e without a UR5e: a controller that speaks RTDE and the dashboard's language, and takes scripts.

    python -m action_diffusion.deploy.sim.ur folder=emulated_ur
    python -m action_diffusion.deploy.bringup robot=ur hardware=emulated_ur/cell.yaml number=5 distance=0.1

    29999          dashboard: a line is asked, a line is answered
    30001 … 30003  scripts: what comes there begins a program
    30004          RTDE: size (2 bytes), kind (1), payload, big-endian; states go out, registers come in

The real `ur_rtde` drives it. Its program is not interpreted, but done here, as far as our driver asks for it:
`servoJ`, `servoL`, `servoStop`, the watchdog, and the end of the script, with the handshake by registers. Other
commands of the library are acknowledged and do nothing. Joints follow `servoj` with its lookahead as a lag, up to their
largest speeds; there is no dynamics, no singularity and no safety system.

All 127.x.y.z are this machine's on Linux, and each can have a controller, since the ports are fixed.

Universal Robots: RTDE guide; dashboard server; DH parameters.
"""

from __future__ import annotations

import contextlib
import math
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from action_diffusion.deploy.ipc.processes import prefer
from action_diffusion.deploy.sim.world import PRIORITY
from action_diffusion.errors import InputError, unknown

DASHBOARD, SCRIPTS, RTDE = 29999, (30001, 30002, 30003), 30004
VERSIONS = {"e": (5, 11, 0), "cb": (3, 15, 0)}
RATES = {"e": 500.0, "cb": 125.0}
"""States per second (Hz)."""
HOME = (0.0, -1.6, 1.6, -1.6, -1.57, 0.0)
LIMIT = math.pi
"""Largest speed of a joint (rad/s)."""
DECELERATION = 10.0
"""With which an arm brakes whose program has ended (rad/s²)."""
SERVOJ, SERVO_STOP, SERVOL, WATCHDOG, STOP_SCRIPT = 11, 16, 24, 35, 255
REALTIME = (SERVOJ, SERVOL)
"""Commands of ur_rtde's program, in its register; those of real time are taken in each cycle."""
READY, DONE = 1, 2
PLAYING, STOPPED = 2, 1
PROTECTIVE, EMERGENCY = 1 << 2, 1 << 7
"""Of the safety status bits."""
FORMATS = {"DOUBLE": "d", "VECTOR6D": "6d", "VECTOR3D": "3d", "VECTOR6INT32": "6i"}
FORMATS |= {"INT32": "i", "UINT32": "I", "UINT64": "Q", "UINT8": "B"}
TYPES = {
    **dict.fromkeys(("robot_mode", "safety_mode"), "INT32"),
    **dict.fromkeys(("runtime_state", "robot_status_bits", "safety_status_bits", "speed_slider_mask"), "UINT32"),
    **dict.fromkeys(("actual_digital_input_bits", "actual_digital_output_bits"), "UINT64"),
    **dict.fromkeys(("timestamp", "actual_execution_time", "speed_scaling", "target_speed_fraction"), "DOUBLE"),
    **dict.fromkeys(("actual_momentum", "actual_main_voltage", "actual_robot_voltage"), "DOUBLE"),
    **dict.fromkeys(("actual_robot_current", "speed_slider_fraction", "payload"), "DOUBLE"),
    **{f"standard_analog_{way}{i}": "DOUBLE" for way in ("input", "output", "output_") for i in range(2)},
    "joint_mode": "VECTOR6INT32",
    "actual_tool_accelerometer": "VECTOR3D",
    "payload_cog": "VECTOR3D",
    "payload_inertia": "VECTOR6D",
    **{f"{what}_{unit}": "VECTOR6D" for what in ("target", "actual") for unit in ("q", "qd", "current", "TCP_pose")},
    **{f"{what}_{unit}": "VECTOR6D" for what in ("target", "actual") for unit in ("TCP_speed", "TCP_force")},
    **dict.fromkeys(("target_qdd", "target_moment", "joint_control_output", "joint_temperatures"), "VECTOR6D"),
    **dict.fromkeys(("actual_joint_voltage", "external_force_torque", "ft_raw_wrench"), "VECTOR6D"),
    **{
        f"{name}{mask}": "UINT8"
        for name in ("tool_digital_output", "standard_digital_output")
        for mask in ("", "_mask")
    },
    **{f"configurable_digital_output{mask}": "UINT8" for mask in ("", "_mask")},
    **dict.fromkeys(("standard_analog_output_mask", "standard_analog_output_type"), "UINT8"),
}
DH = (
    (0.1625, 0, math.pi / 2),
    (0, -0.425, 0),
    (0, -0.3922, 0),
    (0.1333, 0, math.pi / 2),
    (0.0997, 0, -math.pi / 2),
    (0.0996, 0, 0),
)
"""d, a (m) and alpha (rad) of each joint of a UR5e."""


def kind_of(name: str) -> str:
    """The type of a variable of RTDE, as the protocol calls it; NOT_FOUND for another name."""
    if name.startswith(("input_int_register_", "output_int_register_")):
        return "INT32"
    if name.startswith(("input_double_register_", "output_double_register_")):
        return "DOUBLE"
    return TYPES.get(name, "NOT_FOUND")


def frame(joints: np.ndarray) -> np.ndarray:
    """Joint angles [6] (rad) → [4, 4], the flange in the base's frame."""
    pose = np.eye(4)
    for q, (d, a, alpha) in zip(joints, DH, strict=True):
        c, s, ca, sa = math.cos(q), math.sin(q), math.cos(alpha), math.sin(alpha)
        pose = pose @ np.array(
            [[c, -s * ca, s * sa, a * c], [s, c * ca, -c * sa, a * s], [0, sa, ca, d], [0, 0, 0, 1.0]]
        )
    return pose


def place(joints: np.ndarray) -> np.ndarray:
    """Joint angles [6] (rad) → position (m) and rotation vector (rad), [6]."""
    pose = frame(joints)
    return np.concatenate([pose[:3, 3], Rotation.from_matrix(pose[:3, :3]).as_rotvec()])


def joints_at(wanted: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Joint angles [6] whose `place` is `wanted` [6], from `near` [6] by damped least squares; the nearest it finds."""
    q, aim = near.copy(), Rotation.from_rotvec(wanted[3:])
    for _ in range(8):
        pose = frame(q)
        turn = (aim * Rotation.from_matrix(pose[:3, :3]).inv()).as_rotvec()
        error = np.concatenate([wanted[:3] - pose[:3, 3], turn])
        if np.abs(error).max() < 1e-6:
            break
        jacobian = np.empty((6, 6))
        for i in range(6):
            moved = frame(q + 1e-6 * np.eye(6)[i])
            jacobian[:3, i] = (moved[:3, 3] - pose[:3, 3]) / 1e-6
            jacobian[3:, i] = Rotation.from_matrix(moved[:3, :3] @ pose[:3, :3].T).as_rotvec() / 1e-6
        q = q + np.linalg.solve(jacobian.T @ jacobian + 1e-8 * np.eye(6), jacobian.T @ error)
    return q


class _Client:
    """One connection, with the recipes that it has set up on it."""

    def __init__(self, connection: socket.socket, port: int) -> None:
        self.socket, self.port = connection, port
        self.heard, self.unsent, self.started = bytearray(), bytearray(), False
        self.inputs: list[tuple[list[str], struct.Struct]] = []
        self.outputs: tuple[list[str], struct.Struct] | None = None
        self.every = 1

    def push(self) -> None:
        """Send what can be sent now. Raises `OSError` where the other end has gone."""
        with contextlib.suppress(BlockingIOError):
            while self.unsent:
                del self.unsent[: self.socket.send(self.unsent)]


class Controller:
    """A UR5e and its controller at `host`, served by a thread.

    Args:
        host: an address of this machine, one for each controller.
        series: "e", or "cb" for one with the older software, that says its state at 125 Hz.
        joints: where the arm stands (rad).
        told: called with the time (monotonic s), "servoj" or "servol", and its six numbers, for each that arrives.

    Attributes:
        joints: where the arm is (rad).
        scripts: how many programs it was sent.
        ended: why the last program ended; "" while one runs, and before the first.
        tool: bits of the tool's digital outputs.

    Raises:
        InputError: where the ports at `host` are taken, or it is no address of this machine.
    """

    def __init__(
        self,
        host: str = "127.0.0.2",
        *,
        series: str = "e",
        joints: Sequence[float] = HOME,
        told: Callable[[float, str, list[float]], None] = lambda _t, _kind, _values: None,
    ) -> None:
        if series not in VERSIONS:
            raise unknown("series", series, VERSIONS)
        self.host, self._version, self.rate, self._told = host, VERSIONS[series], RATES[series], told
        self.joints, self._speeds = np.array(joints, dtype=np.float64), np.zeros(6)
        self.scripts, self.ended, self.tool = 0, "", 0
        self._goal, self._lookahead, self._running, self._executing = self.joints.copy(), 0.1, False, False
        self._inputs: dict[str, float] = {}
        self._state: dict[str, float | Sequence[float]] = {"robot_mode": 7, "safety_mode": 1, "robot_status_bits": 1}
        self._state |= {"runtime_state": STOPPED, "speed_scaling": 1.0, "target_speed_fraction": 1.0}
        self._watchdog, self._fed, self._safety = 0.0, 0.0, 0
        self._frozen_until = self._out_until = 0.0
        self._selector, self._clients = selectors.DefaultSelector(), list[_Client]()
        self._listeners = [self._listen(port) for port in (DASHBOARD, *SCRIPTS, RTDE)]
        self._ends, self._drops = threading.Event(), ""
        self._thread = threading.Thread(target=self._serve, daemon=True, name="ur")
        self._thread.start()

    def _listen(self, port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self.host, port))
        except OSError as error:
            listener.close()
            raise InputError(f"a controller at {self.host}: port {port}: {error.strerror}") from None
        listener.listen()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, port)
        return listener

    # What goes wrong.

    def freeze(self, seconds: float) -> None:
        """Nothing happens in the controller for so long: no state, no program, no answer."""
        self._frozen_until = time.monotonic() + seconds

    def unplug(self, seconds: float) -> None:
        """The cable is out for so long: what was said meanwhile arrives late, as TCP has it."""
        self._out_until = time.monotonic() + seconds

    def drop(self, *, writers: bool = False) -> None:
        """All connections end at once; with `writers` only those over which registers are written."""
        self._drops = "writers" if writers else "all"

    def halt(self, why: str = "somebody pressed stop") -> None:
        """The program ends."""
        self._running, self.ended = False, why

    def protect(self, bits: int = PROTECTIVE) -> None:
        """A protective stop, or with `EMERGENCY` an emergency stop; 0: it is confirmed."""
        self._safety = bits
        if bits:
            self.halt("the safety system")

    @property
    def watched(self) -> bool:
        """Whether a program runs under the watchdog."""
        return self._running and self._watchdog > 0

    @property
    def moving(self) -> bool:
        return bool(np.abs(self._speeds).max() > 1e-3)

    def close(self) -> None:
        """End the thread and all connections."""
        self._ends.set()
        self._thread.join()
        for open_ in (*self._listeners, *(client.socket for client in self._clients)):
            open_.close()
        self._selector.close()

    def __enter__(self) -> Controller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Its thread.

    def _serve(self) -> None:
        start, cycle = time.monotonic(), 0
        while not self._ends.is_set():
            now = time.monotonic()
            if now < self._frozen_until:
                self._ends.wait(0.001)
                continue
            due = start + cycle / self.rate
            if now >= due:
                cycle = max(cycle + 1, math.ceil((now - start) * self.rate))
                self._cycle(cycle, now)
            if self._drops:
                which, self._drops = self._drops, ""
                for client in [client for client in self._clients if which == "all" or client.inputs]:
                    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self._forget(client)
            if now < self._out_until:
                self._ends.wait(max(0.0, min(0.001, due - now)))
                continue
            for key, _ in self._selector.select(max(0.0, start + cycle / self.rate - time.monotonic())):
                if isinstance(key.data, int):
                    self._accept(key.fileobj, key.data)  # type: ignore[arg-type]
                else:
                    self._read(key.data)

    def _accept(self, listener: socket.socket, port: int) -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client = _Client(connection, port)
            self._clients.append(client)
            self._selector.register(connection, selectors.EVENT_READ, client)
            if port == DASHBOARD:
                self._say(client, b"Connected: Universal Robots Dashboard Server\n")

    def _forget(self, client: _Client) -> None:
        self._selector.unregister(client.socket)
        self._clients.remove(client)
        client.socket.close()

    def _say(self, client: _Client, data: bytes) -> None:
        client.unsent += data
        try:
            if time.monotonic() >= self._out_until:
                client.push()
        except OSError:
            self._forget(client)

    def _read(self, client: _Client) -> None:
        try:
            data = client.socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._forget(client)
            return
        client.heard += data
        if client.port == RTDE:
            while (
                len(client.heard) >= 3 and len(client.heard) >= (size := struct.unpack_from(">H", client.heard)[0]) >= 3
            ):
                kind, payload = chr(client.heard[2]), bytes(client.heard[3:size])
                del client.heard[:size]
                self._hear(client, kind, payload)
        elif client.port == DASHBOARD:
            *lines, rest = client.heard.split(b"\n")
            client.heard = bytearray(rest)
            for line in lines:
                self._say(client, self._dashboard(line.decode(errors="replace").strip()).encode() + b"\n")
        elif client.heard.rstrip().endswith(b"\nend"):
            client.heard.clear()
            self._begin()

    def _dashboard(self, line: str) -> str:
        if line == "PolyscopeVersion":
            return "URSoftware {}.{}.{}.108249 (Jan 01 2021)".format(*self._version)
        if line in ("is in remote control", "get serial number"):
            return "true" if line.startswith("is") else "20265500000"
        if line == "stop":
            self.halt("stopped by the dashboard")
            return "Stopped"
        return f"could not understand: '{line}'"

    def _begin(self) -> None:
        """A script has arrived."""
        self.scripts += 1
        if self._safety:
            return
        self._running, self.ended, self._executing, self._watchdog = True, "", False, 0.0
        self._goal, self._state["output_int_register_0"] = self.joints.copy(), READY

    # RTDE.

    def _hear(self, client: _Client, kind: str, payload: bytes) -> None:
        if kind == "V":
            self._tell(client, kind, struct.pack(">B", payload == b"\0\2"))
        elif kind == "v":
            self._tell(client, kind, struct.pack(">4I", *self._version, 0))
        elif kind in "OI":
            names = payload[8 if kind == "O" else 0 :].decode().strip(",").split(",")
            types = [kind_of(name) for name in names]
            packed = struct.Struct(">" + "".join(FORMATS.get(each, "") for each in types))
            if kind == "I":
                client.inputs.append((names, packed))
            else:
                client.outputs = (names, packed)
                client.every = max(1, round(self.rate / max(1.0, struct.unpack_from(">d", payload)[0])))
            self._tell(client, kind, bytes([len(client.inputs) if kind == "I" else 1]) + ",".join(types).encode())
        elif kind in "SP":
            client.started = kind == "S"
            self._tell(client, kind, b"\1")
        elif kind == "U" and payload and 1 <= payload[0] <= len(client.inputs):
            names, packed = client.inputs[payload[0] - 1]
            if len(payload) == packed.size + 1:
                self._take(dict(zip(names, packed.unpack(payload[1:]), strict=True)))

    def _tell(self, client: _Client, kind: str, payload: bytes) -> None:
        self._say(client, struct.pack(">HB", len(payload) + 3, ord(kind)) + payload)

    def _take(self, values: Mapping[str, float]) -> None:
        """Registers and outputs that were written."""
        now = time.monotonic()
        self._inputs.update(values)
        mask = int(values.get("tool_digital_output_mask", 0))
        self.tool = self.tool & ~mask | int(values.get("tool_digital_output", 0)) & mask
        if "input_int_register_0" in values:
            self._fed = now
            if int(values["input_int_register_0"]) in REALTIME:
                kind = "servoj" if int(values["input_int_register_0"]) == SERVOJ else "servol"
                self._told(now, kind, self._registers(0, 6))

    def _registers(self, first: int, n: int) -> list[float]:
        return [float(self._inputs.get(f"input_double_register_{i}", 0.0)) for i in range(first, first + n)]

    # A cycle of the controller.

    def _cycle(self, number: int, now: float) -> None:
        if self._running:
            self._program(now)
        self._move(1 / self.rate)
        state = self._state
        state["timestamp"] = number / self.rate
        state["runtime_state"] = PLAYING if self._running else STOPPED
        state["robot_status_bits"] = 1 | self._running << 1
        state["safety_status_bits"] = self._safety or 1
        state["actual_q"], state["actual_qd"] = self.joints.tolist(), self._speeds.tolist()
        state["target_q"], state["target_qd"] = state["actual_q"], state["actual_qd"]
        if self.moving or "actual_TCP_pose" not in state:
            state["actual_TCP_pose"] = state["target_TCP_pose"] = place(self.joints).tolist()
        for client in list(self._clients):
            if client.started and client.outputs is not None and number % client.every == 0:
                self._tell(client, "U", b"\1" + self._packed(*client.outputs))

    def _packed(self, names: Sequence[str], packed: struct.Struct) -> bytes:
        values: list[float] = []
        for name in names:
            value = self._state.get(name, 0)
            kind = FORMATS.get(kind_of(name), "")
            n = int(kind[0]) if kind[:1].isdigit() else bool(kind)
            values += list(value) if isinstance(value, Sequence) else [value] * n
        return packed.pack(*values)

    def _program(self, now: float) -> None:
        """One turn of the loop in ur_rtde's program."""
        if self._watchdog and now - self._fed > 1 / self._watchdog:
            self.halt("the watchdog")
            return
        command = int(self._inputs.get("input_int_register_0", 0))
        if command in REALTIME:
            wanted, self._lookahead = np.array(self._registers(0, 6)), max(0.03, self._registers(9, 1)[0])
            self._goal = wanted if command == SERVOJ else joints_at(wanted, self._goal)
        elif command == STOP_SCRIPT:
            self.halt("the script's end")
        elif command and not self._executing:
            self._executing = True
            if command == WATCHDOG:
                self._watchdog = self._registers(0, 1)[0]
            elif command == SERVO_STOP:
                self._goal = self.joints + self._speeds * np.abs(self._speeds) / (2 * DECELERATION)
            self._state["output_int_register_0"] = DONE
            return
        elif command:
            return
        self._executing = False
        self._state["output_int_register_0"] = READY

    def _move(self, seconds: float) -> None:
        if self._running:
            speeds = np.clip((self._goal - self.joints) / max(self._lookahead, seconds), -LIMIT, LIMIT)
        else:
            most = DECELERATION * seconds
            speeds = self._speeds - np.clip(self._speeds, -most, most)
        self._speeds, self.joints = speeds, self.joints + speeds * seconds


CELL = """# An emulated UR5e: python -m action_diffusion.deploy.sim.ur folder={folder} host={host}
arm: {{host: {host}, model: ur5e, rate: 125}}
limits:                       # six joints (rad)
  low:          [-1.6, -2.4, 0.5, -2.6, -1.9, -1.6]
  high:         [1.6, -0.6, 2.4, -0.6, -1.2, 1.6]
  velocity:     [1.0, 1.0, 1.0, 1.5, 1.5, 1.5]
  acceleration: [4.0, 4.0, 4.0, 8.0, 8.0, 8.0]
  jerk:         [80.0, 80.0, 80.0, 160.0, 160.0, 160.0]
cameras: {{}}
observations: {{state: [joints]}}
"""


def main(words: Sequence[str]) -> int:
    options = {"folder": "emulated_ur", "host": "127.0.0.2", "series": "e"}
    try:
        for word in words:
            name, equals, value = word.partition("=")
            if not equals or name not in options:
                raise unknown("option", name, options)
            options[name] = value
        folder = Path(options["folder"])
        with Controller(options["host"], series=options["series"]):
            prefer(PRIORITY, everything=True)  # a controller waits for no other program
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "cell.yaml").write_text(CELL.format(folder=folder, host=options["host"]), encoding="utf-8")
            except OSError as error:
                raise InputError(f"folder={folder}: {error.strerror}") from None
            print(f"a UR5e at {options['host']}: robot=ur hardware={folder}/cell.yaml", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
