"""The driver of lerobot's arms, on lerobot itself, with nothing on the serial port.

lerobot asks for an older torch than ours, which its drivers do not need: it lies in a folder of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from action_diffusion.deploy.drivers.lerobot import SIX, VERSION
from action_diffusion.files import cache_folder

FOLDER = cache_folder() / "peers" / "lerobot-drivers"
LIST = Path(__file__).parents[1].joinpath("peers", "lerobot.txt")

pytestmark = pytest.mark.skipif(
    not (FOLDER / "lerobot").exists(),
    reason=f"no lerobot: {sys.executable} -m pip install --no-deps --target {FOLDER} -r tests/peers/lerobot.txt",
)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(FOLDER), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(Path(__file__).parents[1].joinpath("peers", "lerobot_peer.py"))]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.mark.slow
def test_the_stand_ins_are_like_lerobot(found):
    assert found["differences"] == []


def test_an_so101_is_read_sent_held_and_let_go_with_its_torque_on(found):
    done = found["so101"]
    assert done[0] == "connect"
    assert done[done.index("connected") + 1 :] == [
        *("sync_read", "sync_write"),  # a state, a setpoint
        "sync_write",  # the stop: rest at the last setpoint
        "disconnect",
    ]


def test_motors_without_a_watchdog_are_named(found):
    assert len(found["so101_watchdog"]) == 1
    assert f"bus_watchdog: {', '.join(SIX)} have none" in found["so101_watchdog"][0]


def test_dynamixels_get_their_watchdog_last_and_are_cleared_first(found):
    done = found["koch"]
    written = [line for line in done if "Bus_Watchdog" in line]
    assert written == [f"write ['Bus_Watchdog', '{name}', {ticks}]" for ticks in (0, 5, 0) for name in SIX]
    assert done.index("enable_torque") < done.index(written[0])
    assert done.index("connected") < done.index(written[len(SIX)]) < done.index("sync_write")


def test_a_dry_run_switches_no_torque_and_writes_no_goal(found):
    assert not {"sync_write", "enable_torque", "disable_torque"} & set(found["koch_dry"])
    assert found["koch_dry"][-1] == "disconnect"


def test_a_robot_that_lerobot_does_not_know_gets_suggestions(found):
    assert "did you mean so101_follower" in found["unknown"][0]


def test_a_leader_is_read_with_its_torque_off(found):
    done = found["leader"]
    assert done[0] == "connect"
    assert "disable_torque" in done
    assert "enable_torque" not in done
    assert done[-2:] == ["[0.0, 10.0, 20.0, 30.0, 40.0, 50.0]", "disconnect"]
    assert "did you mean so101_leader" in found["unknown_leader"][0]


def test_the_version_is_written_twice_alike():
    assert f"lerobot=={VERSION}" in LIST.read_text().splitlines()
