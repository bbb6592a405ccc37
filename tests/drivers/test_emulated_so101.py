"""An emulated SO-101: the emulator's protocol, and lerobot's own code on it, driven by our driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated_arms import LEROBOT

from action_diffusion.deploy.sim.feetech import (
    GOAL,
    OVERLOAD,
    POSITION,
    TORQUE,
    Bus,
    Motor,
    calibration,
    main,
    packets,
    so101,
)
from action_diffusion.errors import InputError
from action_diffusion.files import cache_folder

PEERS = cache_folder() / "peers"
NEW = PEERS / "lerobot-0.6.1"
EXTRA = PEERS / "lerobot-drivers-0.6.1"
ROOT = Path(__file__).parents[2]
WORD = f"python -m pip install --no-deps --target {EXTRA} -r tests/peers/lerobot-0.6.1.txt"

# The protocol.


class Host:
    """Whoever talks to a bus, byte by byte."""

    def __init__(self, bus: Bus) -> None:
        self.descriptor = os.open(bus.port, os.O_RDWR | os.O_NOCTTY)

    def say(self, *body: int, wrong: int = 0) -> None:
        """`body` from the number on, without its length, which is counted; `wrong` is added to the checksum."""
        packet = [body[0], len(body), *body[1:]]
        os.write(self.descriptor, bytes([255, 255, *packet, (~sum(packet) + wrong) & 255]))

    def hear(self, n: int = 1, seconds: float = 5.0) -> list[list[int]]:
        """The next `n` answers, without ff ff, length and checksum; fewer where they do not come."""
        heard, buffer, deadline = list[list[int]](), bytearray(), time.monotonic() + seconds
        os.set_blocking(self.descriptor, False)
        while len(heard) < n and time.monotonic() < deadline:
            try:
                buffer += os.read(self.descriptor, 4096)
            except BlockingIOError:
                time.sleep(0.002)
            heard += [[packet[0], *packet[2:]] for packet in packets(buffer)]
        return heard


@pytest.fixture
def line() -> Iterator[tuple[Bus, Host, list[dict[int, int]]]]:
    goals: list[dict[int, int]] = []
    with Bus({1: Motor(1), 2: Motor(2, at=1000, offset=-500)}, told=lambda _t, told: goals.append(told)) as bus:
        host = Host(bus)
        yield bus, host, goals
        os.close(host.descriptor)


def test_it_answers_as_the_manual_of_the_protocol_says(line):
    _, host, goals = line
    host.say(1, 0x01)
    assert host.hear() == [[1, 0]]
    host.say(1, 0x02, 3, 2)
    assert host.hear() == [[1, 0, 777 % 256, 777 // 256]]
    host.say(0xFE, 0x82, POSITION, 2, 2, 1)
    assert host.hear(2) == [[2, 0, 1500 % 256, 1500 // 256], [1, 0, 0, 8]]  # an offset of -500: 1000 + 500
    host.say(2, 0x02, 31, 2)
    assert host.hear() == [[2, 0, 500 % 256, 500 // 256 | 8]]  # sign and magnitude: bit 11
    host.say(0xFE, 0x83, GOAL, 2, 1, 0x10, 0x08, 2, 0x10, 0x08)
    host.say(1, 0x02, GOAL, 2)
    assert host.hear() == [[1, 0, 0x10, 0x08]]
    assert goals == [{1: 0x810, 2: 0x810}]
    host.say(1, 0x04, GOAL, 0x20, 0x08)
    assert host.hear() == [[1, 0]]
    host.say(1, 0x02, GOAL, 2)
    assert host.hear() == [[1, 0, 0x10, 0x08]]  # only registered
    host.say(0xFE, 0x05)
    host.say(1, 0x02, GOAL, 2)
    assert host.hear() == [[1, 0, 0x20, 0x08]]


def test_what_is_damaged_or_for_nobody_gets_no_answer(line):
    bus, host, goals = line
    host.say(1, 0x01, wrong=1)
    host.say(9, 0x01)
    os.write(host.descriptor, bytes([255, 255, 1]))
    bus.missing = {2}
    host.say(2, 0x01)
    assert host.hear(seconds=0.3) == []
    host.say(1, 0x01)
    assert host.hear() == [[1, 0]]
    bus.damage("wrong")
    host.say(1, 0x01)
    assert host.hear(seconds=0.2) == []
    bus.damage("out", seconds=0.2)
    host.say(1, 0x03, GOAL, 0, 9)
    assert host.hear(seconds=0.3) == []
    assert goals == [{1: 0x900}]  # what the host said, though no motor heard it
    host.say(1, 0x02, GOAL, 2)
    assert host.hear() == [[1, 0, 0, 8]]
    bus.motors[1].overloaded = True
    host.say(1, 0x01)
    assert host.hear() == [[1, OVERLOAD]]
    with pytest.raises(InputError, match=r"unknown damage 'los'.*lost"):
        bus.damage("los")


def test_a_motor_goes_to_its_goal_at_its_speed_within_its_limits_and_only_with_torque():
    motor = Motor(1, at=2000, low=500, high=3000, offset=100)
    assert motor.position == 1900
    motor.write(GOAL, (3500).to_bytes(2, "little"))
    motor.move(1.0)
    assert motor.position == 1900  # limp
    motor.write(TORQUE, b"\1")
    motor.move(0.1)
    assert motor.position == pytest.approx(1900 + 307.2)
    motor.overloaded = True
    motor.move(1.0)
    assert motor.position == pytest.approx(1900 + 307.2)
    motor.overloaded = False
    motor.move(9.0)
    assert motor.position == 3000
    assert motor.read(POSITION, 2) == (3000).to_bytes(2, "little")


def test_the_files_are_of_these_motors_and_options_are_checked(capsys, tmp_path):
    made = calibration(so101())
    assert made["gripper"] == {"id": 6, "drive_mode": 0, "homing_offset": -1000, "range_min": 0, "range_max": 4095}
    assert all(abs(motor.position - 2048) < 1 for motor in so101().values())
    (tmp_path / "file").touch()
    for word, message in (
        ("faults=2", "faults=2"),
        ("folders=x", "did you mean folder"),
        (f"folder={tmp_path}/file", "file"),
    ):
        assert main([word]) == 2
        assert message in capsys.readouterr().err


# lerobot's own code on it.


def package(folder: Path) -> Path:
    """`folder` with this package as an installation would have it, for another Python."""
    target = folder / "action_diffusion"
    target.mkdir()
    places = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    for path in (ROOT / "action_diffusion").iterdir():
        (target / path.name).symlink_to(path)
    for name, place in places.items():
        if name.count(".") == 1 and not (target / name.partition(".")[2]).exists():
            (target / name.partition(".")[2]).symlink_to(ROOT / place)
    return folder


@pytest.fixture(scope="module", params=["0.4.4", "0.6.1"])
def found(request, tmp_path_factory) -> dict[str, Any]:
    new = request.param == "0.6.1"
    python, folders = (NEW / "bin" / "python", [EXTRA]) if new else (Path(sys.executable), [LEROBOT])
    if not (python.exists() and all(folder.exists() for folder in folders)):
        pytest.skip(f"no lerobot {request.param}: see test_lerobot.py, test_lerobot_policy.py, {WORD}")
    if new:
        folders.append(package(tmp_path_factory.mktemp("package")))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    script = [str(python), str(ROOT / "tests" / "peers" / "feetech_peer.py")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert report["version"] == request.param
    return report


def test_a_dry_run_tells_the_motors_nothing(found):
    assert found["so101"]["dry"] == [[], [False] * 6]


def test_a_limp_motor_does_not_jump_to_an_old_goal_when_it_is_switched_on(found):
    assert found["so101"]["torque"] == [True] * 6
    assert np.abs(found["so101"]["jump"]).max() < 1


def test_it_stands_where_its_calibration_says_and_goes_where_it_is_told(found):
    done = found["so101"]
    assert done["start"] == pytest.approx([0, 300 * 360 / 4095, 0, 0, 0, 50], abs=0.2)
    assert done["moved"] == pytest.approx([20, -20, 10, 0, 0, 20], abs=0.2)
    first, last = ({int(number): goal for number, goal in goals.items()} for goals in done["goals"])
    assert last[1] - first[1] == pytest.approx(19 * 4095 / 360, abs=1)


def test_a_lost_byte_a_wrong_checksum_and_a_cable_that_is_out_for_a_moment_cost_nothing_but_time(found):
    assert found["so101"]["damaged"] == [0.0] * 21


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next(found):
    assert found["so101"]["fresh"] == pytest.approx(-100 * 360 / 4095, abs=0.2)


def test_whoever_waits_for_an_answer_leaves_the_core_to_others(found):
    """Of 0.1 s. An arm's process runs before all others, the kernel's thread that brings the bytes included."""
    assert found["so101"]["busy"] < 0.03


def test_a_stop_keeps_the_last_setpoint_though_the_arm_was_pushed(found):
    assert found["so101"]["stop"] == [found["so101"]["goals"][1]]


def test_a_cable_that_stays_out_ends_it_with_the_torque_on(found):
    assert found["so101"]["gone"].startswith("ConnectionError: Failed to sync read 'Present_Position'")
    assert found["so101"]["kept"] == [True] * 5


def test_a_leader_is_read_through_a_damaged_packet(found):
    assert len(found["so101"]["leader"]) == 6


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("missing", "- 5 (expected model: 777)"),
        ("overloaded", "- 3 (expected model: 777)"),
        ("calibration", "not calibrated: lerobot-calibrate"),
        ("unplugged", "Could not connect on port"),
    ],
)
def test_an_arm_that_is_not_whole_is_refused_in_one_line(found, trouble, message):
    said = found["so101"][trouble]
    assert said.startswith("InputError: lerobot's so101_follower: ")
    assert message in said
    assert "\n" not in said


def test_robots_leaders_and_cameras_of_plugins_are_found_by_their_names(found):
    done = found["plugins"]
    assert (done["arm"], done["leader"], done["camera"]) == ([5.0, 6.0], [3.0, 4.0], [[3, 4, 3], 7])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("near", "unknown robot 'toi' in lerobot and its plugins: did you mean toy?"),
        ("unnamed", "unknown robot 'brand_seven_x'"),
        ("broken", "plugin lerobot_robot_broken does not import: its library is missing"),
        ("absent", "unknown plugin 'lerobot_robot_brnd': did you mean lerobot_robot_brand"),
        ("foreign", "plugin=os.path: lerobot's plugins of this kind are called lerobot_robot_NAME"),
        ("camera_near", "unknown camera 'toi'"),
        ("camera_shape", "config.height is missing"),
    ],
)
def test_a_plugin_that_is_none_gets_one_line(found, name, message):
    assert message in found["plugins"][name]
    assert found["plugins"][name].startswith("InputError: ")


def test_no_plugin_is_imported_that_nobody_named(found):
    assert found["plugins"]["imported"] is False
