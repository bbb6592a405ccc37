"""An SO-101 without an SO-101: six STS3215 motors behind a pseudo-terminal that speaks Feetech's protocol.

    python -m action_diffusion.deploy.sim.feetech folder=emulated
    python -m action_diffusion.deploy.bringup robot=lerobot hardware=emulated/cell.yaml number=0 distance=10

    host ── ff ff ID LENGTH INSTRUCTION …  CHECKSUM ──▶ motor
    host ◀─ ff ff ID LENGTH ERROR       …  CHECKSUM ──  motor        the checksum is ~(all after ff ff), low byte

lerobot's own code drives it as it drives the real bus: `folder` holds `port` (the terminal), `so101.json` (lerobot's
calibration file, which is that of the motors) and `cell.yaml`. `faults=0.01` damages every hundredth packet. Ctrl-C
ends it.

A motor goes to its goal at `SPEED`, or at its own limit; it has no mass, no friction and no load. EEPROM is
memory like the rest (`Lock` protects nothing), and the baud rate is ignored.

Feetech: communication protocol of SMS/STS servos; memory table of STS3215.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import threading
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from action_diffusion.deploy.ipc.processes import prefer
from action_diffusion.deploy.sim.world import PRIORITY
from action_diffusion.errors import InputError, unknown

NAMES = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
BROADCAST = 0xFE
PING, READ, WRITE, REG_WRITE, ACTION, SYNC_READ, SYNC_WRITE = 0x01, 0x02, 0x03, 0x04, 0x05, 0x82, 0x83
OVERLOAD = 0x20
"""The bit of a status packet's error byte that says so."""
STEPS = 4096
"""Of a turn."""
SPEED = 3072.0
"""Steps/s that a motor does at most: 270°/s."""
FIRMWARE, MODEL, ID, LOW, HIGH, OFFSET, MODE, TORQUE, GOAL = 0, 3, 5, 9, 11, 31, 33, 40, 42
POSITION, VELOCITY, LOAD, VOLTAGE, TEMPERATURE, STATUS, MOVING = 56, 58, 60, 62, 63, 65, 66
"""Addresses of the memory table."""
DAMAGES = ("lost", "wrong", "late", "out")
"""A byte gets lost; a byte is another one, so that the checksum is wrong; the answer is late; the cable is out."""


class Motor:
    """An STS3215 with its memory. Positions are in steps; `at` is where its shaft is, by its own encoder."""

    def __init__(
        self, number: int, at: float = STEPS / 2, low: int = 0, high: int = STEPS - 1, offset: int = 0
    ) -> None:
        self.memory = bytearray(128)
        self.at, self.velocity, self.overloaded = float(at), 0.0, False
        self._pending: tuple[int, bytes] | None = None
        for address, value in ((FIRMWARE, 3 + 9 * 256), (MODEL, 777), (LOW, low), (HIGH, high)):
            self._put(address, value)
        self.memory[ID], self.memory[VOLTAGE], self.memory[TEMPERATURE] = number, 120, 25
        self._put(OFFSET, _magnitude(offset, 11))
        self._put(GOAL, round(self.position))

    def _put(self, address: int, value: int) -> None:
        self.memory[address : address + 2] = value.to_bytes(2, "little")

    def _word(self, address: int) -> int:
        return int.from_bytes(self.memory[address : address + 2], "little")

    @property
    def position(self) -> float:
        """As it says it: from its homing offset."""
        return (self.at - _signed(self._word(OFFSET), 11)) % STEPS

    @property
    def torque(self) -> bool:
        return self.memory[TORQUE] == 1

    @property
    def goal(self) -> int:
        """Steps, as it was told."""
        return _signed(self._word(GOAL), 15)

    def move(self, seconds: float) -> None:
        """Go towards the goal, within the limits of the memory, for so long."""
        goal = min(max(self.goal, self._word(LOW)), self._word(HIGH))
        free = self.torque and not self.overloaded
        way = float(np.clip(goal - self.position, -SPEED * seconds, SPEED * seconds)) if free else 0.0
        self.at += way
        self.velocity = way / seconds if seconds > 0 else 0.0

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes from `address` on; beyond the memory there are none."""
        self._put(POSITION, round(self.position) % STEPS)
        self._put(VELOCITY, _magnitude(round(self.velocity), 15))
        self._put(LOAD, _magnitude(round(min(1000.0, abs(self.goal - self.position))), 10))
        self.memory[MOVING] = abs(self.velocity) > 1
        self.memory[STATUS] = OVERLOAD if self.overloaded else 0
        return bytes(self.memory[address : address + size])

    def write(self, address: int, data: bytes) -> None:
        """Bytes of the table; what would lie beyond it is nothing. Torque at 128 calls the present place the middle."""
        data = data[: len(self.memory) - address]
        self.memory[address : address + len(data)] = data
        if self.memory[TORQUE] == 128:
            self.memory[TORQUE] = 0
            self._put(OFFSET, _magnitude(int(np.clip(round(self.at) - STEPS // 2, -2047, 2047)), 11))

    def register(self, address: int, data: bytes) -> None:
        """Keep it for `act`."""
        self._pending = address, data

    def act(self) -> None:
        """Write what was registered."""
        if self._pending is not None:
            self.write(*self._pending)
            self._pending = None


class Line:
    """The cable, one way: what is on it, and how it is damaged.

    random: of where a damage is. `next_damage` hits the next packet; `share` of all packets get one at random.
    """

    def __init__(self, random: np.random.Generator, share: float = 0.0) -> None:
        self._random, self._share = random, share
        self.next_damage: str | None = None

    def carry(self, packet: bytes) -> bytes:
        """What arrives of `packet`."""
        damage, self.next_damage = self.next_damage, None
        if damage is None and self._random.random() < self._share:
            damage = ("lost", "wrong")[self._random.integers(2)]
        if damage is None or not packet:
            return packet
        index = int(self._random.integers(len(packet)))
        changed = bytes([packet[index] ^ int(self._random.integers(1, 256))]) if damage == "wrong" else b""
        return packet[:index] + changed + packet[index + 1 :]


class Bus:
    """Motors on a cable behind a pseudo-terminal, served by a thread.

    Args:
        motors: by number.
        seed, faults: share of all packets, either way, that is damaged at random.
        told: called with the time (monotonic s) and {number: goal} whenever the host sends goals, before any damage.

    Attributes:
        port: the terminal's path, for the host.
        missing: numbers of motors that do not answer.
        lock: held while motors move or answer; hold it to change one.
    """

    def __init__(
        self,
        motors: Mapping[int, Motor],
        *,
        seed: int = 0,
        faults: float = 0.0,
        told: Callable[[float, dict[int, int]], None] = lambda _t, _goals: None,
    ) -> None:
        random = np.random.default_rng(seed)
        self.motors, self.missing, self.lock = dict(motors), set[int](), threading.Lock()
        self._there, self._back, self._told = Line(random, faults), Line(random, faults), told
        self._out_until, self._late = 0.0, 0.0
        self._ours, self._theirs = os.openpty()
        tty.setraw(self._theirs)  # kept open: a host that closes it hangs nothing up
        self.port = os.ttyname(self._theirs)
        self._moved, self._ends = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True, name="feetech")
        self._thread.start()

    def damage(self, kind: str, *, seconds: float = 0.2, there: bool = False) -> None:
        """One of `DAMAGES`, to the next packet: on its way to the motors, or back; or for `seconds` from now.

        Raises `InputError` for another one.
        """
        if kind not in DAMAGES:
            raise unknown("damage", kind, DAMAGES)
        if kind == "out":
            self._out_until = time.monotonic() + seconds
        elif kind == "late":
            self._late = seconds
        else:
            (self._there if there else self._back).next_damage = kind

    def _serve(self) -> None:
        sent, heard = bytearray(), bytearray()
        while not self._ends.is_set():
            if not select.select([self._ours], [], [], 0.02)[0]:
                sent.clear()  # who waits for the rest of a packet gives up
                heard.clear()
                with self.lock:
                    self._move()
                continue
            data = os.read(self._ours, 4096)
            now = time.monotonic()
            sent += data
            for packet in packets(sent):
                self._note(now, packet)
                if now < self._out_until:
                    continue
                heard += self._there.carry(_framed(packet))
                for arrived in packets(heard):
                    self._answer(arrived)

    def _note(self, now: float, packet: bytes) -> None:
        """Goals in what the host said go to `told`."""
        goals = {
            number: _signed(int.from_bytes(data[:2], "little"), 15)
            for number, address, data in writes(packet)
            if address == GOAL and len(data) >= 2
        }
        if goals:
            self._told(now, goals)

    def _move(self) -> None:
        now = time.monotonic()
        for motor in self.motors.values():
            motor.move(now - self._moved)
        self._moved = now

    def _answer(self, packet: bytes) -> None:
        with self.lock:
            self._move()
            answers = [_framed(answer) for answer in self._replies(packet)]
        if self._late:
            late, self._late = self._late, 0.0
            self._ends.wait(late)
        for answer in answers:
            if time.monotonic() >= self._out_until:
                os.write(self._ours, self._back.carry(answer))

    def _replies(self, packet: bytes) -> Iterator[bytes]:
        number, instruction, parameters = packet[0], packet[2], packet[3:]
        present = {n: motor for n, motor in self.motors.items() if n not in self.missing}
        if instruction == SYNC_READ and len(parameters) >= 2:
            address, size = parameters[:2]
            for each in parameters[2:]:
                if each in present:
                    yield _status(each, present[each], present[each].read(address, size))
            return
        if instruction == SYNC_WRITE:
            for each, address, data in writes(packet):
                if each in present:
                    present[each].write(address, data)
            return
        for each in sorted(present) if number == BROADCAST else [number]:
            if each not in present:
                continue
            motor, data = present[each], b""
            if instruction == READ and len(parameters) == 2:
                data = motor.read(*parameters)
            elif instruction == WRITE and parameters:
                motor.write(parameters[0], parameters[1:])
            elif instruction == REG_WRITE and parameters:
                motor.register(parameters[0], parameters[1:])
            elif instruction == ACTION:
                motor.act()
            elif instruction != PING:
                continue  # nothing that a motor would understand
            if number != BROADCAST or instruction == PING:
                yield _status(each, motor, data)
            if motor.memory[ID] != each:
                self.motors[motor.memory[ID]] = self.motors.pop(each)

    def close(self) -> None:
        """End the thread, and the terminal: the cable is pulled from the host."""
        self._ends.set()
        self._thread.join()
        for descriptor in (self._ours, self._theirs):
            os.close(descriptor)

    def __enter__(self) -> Bus:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def packets(buffer: bytearray) -> Iterator[bytes]:
    """Whole packets with a right checksum, without ff ff and the checksum; they leave `buffer`, and so does rubbish."""
    while True:
        start = buffer.find(b"\xff\xff")
        while start >= 0 and buffer[start + 2 : start + 3] == b"\xff":
            start += 1
        del buffer[: start if start >= 0 else max(0, len(buffer) - 1)]
        if start < 0 or len(buffer) < 4 or len(buffer) < buffer[3] + 4:
            return
        end = buffer[3] + 4
        packet = bytes(buffer[2 : end - 1])
        if len(packet) >= 3 and buffer[end - 1] == _checksum(packet):
            yield packet
            del buffer[:end]
        else:
            del buffer[:2]


def writes(packet: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(number, address, data) of what `packet` writes at once."""
    number, instruction, parameters = packet[0], packet[2], packet[3:]
    if instruction in (WRITE, REG_WRITE) and parameters:
        yield number, parameters[0], parameters[1:]
    elif instruction == SYNC_WRITE and len(parameters) >= 2:
        address, size = parameters[:2]
        for i in range(2, len(parameters) - size, size + 1):
            yield parameters[i], address, parameters[i + 1 : i + 1 + size]


def _status(number: int, motor: Motor, data: bytes) -> bytes:
    return bytes([number, len(data) + 2, OVERLOAD if motor.overloaded else 0]) + data


def _framed(packet: bytes) -> bytes:
    return b"\xff\xff" + packet + bytes([_checksum(packet)])


def _checksum(packet: bytes) -> int:
    return ~sum(packet) & 0xFF


def _magnitude(value: int, bit: int) -> int:
    """Sign and magnitude, with the sign in `bit`."""
    return abs(value) | (value < 0) << bit


def _signed(value: int, bit: int) -> int:
    size = value & ((1 << bit) - 1)
    return -size if value >> bit & 1 else size


# An SO-101, and the files that lerobot and this package want of it.


def so101() -> dict[int, Motor]:
    """Its six motors, by number, in the middle of their ranges, with a homing offset each."""
    offsets = (120, -240, 360, -480, 15, -1000)
    low, high = (800,) * 4 + (0, 0), (3300,) * 4 + (4095, 4095)
    return {
        number: Motor(number, at=2048 + offset, low=low[number - 1], high=high[number - 1], offset=offset)
        for number, offset in enumerate(offsets, start=1)
    }


def calibration(motors: Mapping[int, Motor]) -> dict[str, dict[str, int]]:
    """lerobot's calibration file of these motors."""
    return {
        name: {
            "id": number,
            "drive_mode": 0,
            "homing_offset": _signed(motor._word(OFFSET), 11),
            "range_min": motor._word(LOW),
            "range_max": motor._word(HIGH),
        }
        for name, (number, motor) in zip(NAMES, sorted(motors.items()), strict=True)
    }


CELL = """# An emulated SO-101: python -m action_diffusion.deploy.sim.feetech folder={folder}
arm:
  type: so101_follower
  config: {{port: {folder}/port, id: so101, calibration_dir: {folder}}}
  rate: 50
  watchdog: nothing can be hurt, since it is emulated
limits:                       # five joints (degrees), the gripper (0 to 100)
  low:          [-90, -90, -90, -90, -90, 5]
  high:         [90, 90, 90, 90, 90, 95]
  velocity:     [90, 90, 90, 90, 90, 100]
  acceleration: [360, 360, 360, 360, 360, 400]
  jerk:         [7200, 7200, 7200, 7200, 7200, 8000]
cameras: {{}}
observations: {{state: [joints]}}
"""


def files(folder: Path, bus: Bus) -> None:
    """`port`, `so101.json` and `cell.yaml` in `folder`. Raises `InputError` where there is no room for them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        port = folder / "port"
        if port.is_symlink():
            port.unlink()  # of a terminal that has ended
        port.symlink_to(bus.port)
        (folder / "so101.json").write_text(json.dumps(calibration(bus.motors), indent=1), encoding="utf-8")
        (folder / "cell.yaml").write_text(CELL.format(folder=folder.resolve()), encoding="utf-8")
    except OSError as error:
        raise InputError(f"folder={folder}: {error.strerror}") from None


def main(words: Sequence[str]) -> int:
    options = {"folder": "emulated", "faults": "0"}
    try:
        for word in words:
            name, equals, value = word.partition("=")
            if not equals or name not in options:
                raise unknown("option", name, options)
            options[name] = value
        try:
            share = float(options["faults"])
        except ValueError:
            share = -1.0
        if not 0 <= share < 1:
            raise InputError(f"faults={options['faults']} must be a share of all packets, from 0 to below 1")
        with Bus(so101(), faults=share) as bus:
            prefer(PRIORITY, everything=True)  # motors wait for no other program
            files(Path(options["folder"]), bus)
            print(f"an SO-101 on {bus.port}: robot=lerobot hardware={options['folder']}/cell.yaml", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
