"""An emulated UR5e: its controller, and the real ur_rtde on it, driven by our driver in the arm's process."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated_arms import until

from action_diffusion.deploy.arm.link import ArmLink, ArmSetup
from action_diffusion.deploy.ipc.channels import Phase
from action_diffusion.deploy.ipc.rings import Segments
from action_diffusion.deploy.sim.ur import EMERGENCY, HOME, PROTECTIVE, Controller, joints_at, kind_of, main, place
from action_diffusion.errors import InputError
from benchmarks.robustness.emulated import HERE

pytest.importorskip("rtde_control")

HOST = f"127.1.{os.getpid() // 250 % 250}.{os.getpid() % 250 + 1}"
"""An address of this process' own, since the ports are fixed."""
LIMITS: dict[str, object] = {"low": [-1.5, -2.4, 0.5, -2.6, -1.9, -1.5], "high": [1.5, -0.6, 2.4, -0.6, -1.2, 1.5]}
LIMITS |= {"velocity": [1.0] * 6, "acceleration": [8.0] * 6, "jerk": [160.0] * 6}


class Told:
    """Setpoints that arrived, with whether a watchdog would have ended their program."""

    def __init__(self) -> None:
        self.setpoints: list[tuple[str, np.ndarray]] = []
        self.unwatched = 0
        self.controller: Controller | None = None

    def __call__(self, _: float, kind: str, values: list[float]) -> None:
        assert self.controller is not None
        self.setpoints.append((kind, np.array(values)))
        self.unwatched += not self.controller.watched and not self.controller.ended


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def controller(told: Told) -> Iterator[Controller]:
    with Controller(HOST, told=told) as made:
        told.controller = made
        yield made


@contextmanager
def driven(**settings: Any) -> Iterator[ArmLink]:
    """The arm's process, ready to move. The watchdog is patient with a computer that is busy with other tests."""
    segments, limits = Segments(), settings.pop("limits", LIMITS)
    driver = {"host": HOST, "model": "ur5e", "rate": 125, "watchdog_time": 0.4, **settings}
    try:
        link = ArmLink(folder=segments.path, setup=ArmSetup(driver=f"{HERE}:SharedUr", settings=driver, limits=limits))
        try:
            link.begin()
            yield link
        finally:
            link.close()
    finally:
        segments.remove()


def go(link: ArmLink, goal: np.ndarray, seconds: float = 0.6) -> None:
    """Be at `goal` in so long; returns at once."""
    link.follow(np.array([time.monotonic() + seconds]), goal[None])


# The controller.


def test_the_arm_comes_back_from_where_its_tool_is():
    joints = np.array(HOME)
    moved = joints + np.array([0.2, -0.1, 0.15, 0.1, -0.2, 0.3])
    np.testing.assert_allclose(joints_at(place(moved), joints), moved, atol=1e-6)
    # UR's own DH parameters: stretched out along -x, with all the offsets between
    np.testing.assert_allclose(place(np.zeros(6))[:3], [-0.8172, -0.2329, 0.0628], atol=1e-4)


def test_it_says_what_the_guide_of_rtde_says(controller):
    with socket.create_connection((HOST, 30004), timeout=5) as host:

        def ask(kind: str, payload: bytes) -> bytes:
            host.sendall(struct.pack(">HB", len(payload) + 3, ord(kind)) + payload)
            size, said = struct.unpack(">HB", host.recv(3, socket.MSG_WAITALL))
            assert chr(said) == kind
            return host.recv(size - 3, socket.MSG_WAITALL)

        assert ask("V", b"\0\2") == b"\1"
        assert struct.unpack(">4I", ask("v", b""))[:2] == (5, 11)
        assert ask("O", struct.pack(">d", 125.0) + b"timestamp,actual_q,nonsense") == b"\1DOUBLE,VECTOR6D,NOT_FOUND"
        assert ask("I", b"input_int_register_0,input_double_register_3") == b"\1INT32,DOUBLE"
        assert ask("S", b"") == b"\1"
        size, kind = struct.unpack(">HB", host.recv(3, socket.MSG_WAITALL))
        assert (size, chr(kind)) == (3 + 1 + 8 + 48, "U")
        assert struct.unpack(">B7d", host.recv(size - 3, socket.MSG_WAITALL))[2:] == HOME
    with socket.create_connection((HOST, 29999), timeout=5) as board:
        lines = board.makefile("rw", newline="\n")
        assert lines.readline().startswith("Connected")
        lines.write("PolyscopeVersion\nis in remote control\nsing\n")
        lines.flush()
        assert [lines.readline()[:11] for _ in range(3)] == ["URSoftware ", "true\n", "could not u"]
    assert kind_of("safety_status_bits") == "UINT32"


def test_a_port_that_is_taken_and_options_that_are_none_get_one_line(controller, capsys, tmp_path):
    with pytest.raises(InputError, match=r"port 29999: Address already in use"):
        Controller(HOST)
    (tmp_path / "file").touch()
    other = "host=127.1.250.9"
    for words, message in (
        (["hosts=1"], "did you mean host"),
        (["host=8.8.8.8"], "8.8.8.8"),
        (["series=f"], "series"),
        ([other, f"folder={tmp_path}/file"], "file"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err


# ur_rtde on it.


def test_it_goes_where_it_is_told_under_its_watchdog_and_ends_its_program(controller, told):
    goal = np.array(HOME) + np.array([0.2, -0.1, 0.1, 0.0, 0.1, 0.3])
    with driven() as link:
        go(link, goal)
        assert until(lambda: np.abs(controller.joints - goal).max() < 1e-3)
        assert controller.watched
        assert link.events() == []
    assert until(lambda: controller.ended)
    assert told.unwatched == 0
    setpoints = np.array([values for kind, values in told.setpoints if kind == "servoj"])
    assert np.abs(np.diff(setpoints, axis=0)).max() <= 1.0 / 125 * 1.001
    assert (setpoints >= LIMITS["low"]).all()
    assert (setpoints <= LIMITS["high"]).all()


def test_poses_and_the_tools_output_go_there_too(controller, told):
    goal = place(np.array(HOME) + np.array([0.05, 0.02, -0.02, 0.0, 0.0, 0.05]))
    start = np.append(place(np.array(HOME)), 0.0)
    limits = {"low": [*(start[:3] - 0.3), -1.0, -1.0, -1.0, 0.0], "high": [*(start[:3] + 0.3), 1.0, 1.0, 1.0, 1.0]}
    limits |= {"velocity": [1.0] * 6 + [np.inf], "acceleration": [8.0] * 6 + [np.inf], "jerk": [160.0] * 6 + [np.inf]}
    limits |= {"max_step": [np.inf] * 6 + [1.0]}
    with driven(space="pose", tool_output=1, reference=start[3:6].tolist(), limits=limits) as link:
        go(link, np.append(goal, 1.0))
        assert until(lambda: np.abs(place(controller.joints) - goal).max() < 2e-3)
        assert until(lambda: controller.tool == 2)
    assert {kind for kind, _ in told.setpoints} == {"servol"}


def test_a_dry_run_sends_no_setpoint_and_feeds_the_watchdog(controller, told):
    with driven(dry_run=True) as link:
        go(link, np.array(HOME) + 0.1)
        time.sleep(1.0)
        assert controller.watched
        assert link.phase is Phase.MOVING
    assert told.setpoints == []
    assert controller.joints.tolist() == list(HOME)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda controller: controller.freeze(0.7), "has sent no state|took|lost|program has ended"),
        (lambda controller: controller.unplug(0.7), "has sent no state|took|lost|program has ended"),
        (lambda controller: controller.drop(), "has sent no state|took|lost|program has ended|process has ended"),
        (lambda controller: controller.drop(writers=True), "took|lost|program has ended|process has ended"),
        (lambda controller: controller.halt(), "program has ended"),
        (lambda controller: controller.protect(PROTECTIVE), "protective stop|program has ended"),
        (lambda controller: controller.protect(EMERGENCY), "emergency stop|program has ended"),
    ],
    ids=["frozen", "out", "reset", "its reset", "halted", "protective", "emergency"],
)
def test_a_controller_that_stops_ends_it_and_the_arm_stands(controller, told, fault, reason):
    with driven() as link:
        go(link, np.array(HOME) + 0.3, 0.5)
        assert until(lambda: controller.moving)
        fault(controller)
        assert until(lambda: link.phase is Phase.BROKEN)
        assert re.search(reason, "; ".join(link.events()) or "its process has ended")
    assert until(lambda: not controller.moving)
    assert told.unwatched <= 1  # ur_rtde sends what it could not send once more, and is then ended
    steps = np.abs(np.diff([values for _, values in told.setpoints], axis=0))
    assert len(steps) == 0 or steps.max() <= 4 * 1.0 / 125


def test_the_controllers_watchdog_stops_the_arm_of_a_process_that_is_killed(controller, told):
    with driven() as link:
        go(link, np.array(HOME) + 0.3, 0.5)
        assert until(lambda: controller.moving)
        link.child.process.send_signal(signal.SIGKILL)
        assert until(lambda: controller.ended == "the watchdog")
        assert until(lambda: not controller.moving)


def test_an_emergency_stop_brakes_within_the_limits_and_lets_nothing_begin(controller, told):
    with driven() as link:
        go(link, np.array(HOME) + 0.3, 0.5)
        assert until(lambda: controller.moving)
        link.emergency_stop()
        assert until(lambda: link.phase is Phase.STILL)
        assert "stop: emergency stop" in link.events()
        with pytest.raises(InputError, match="the emergency stop is set"):
            link.begin()
    steps = np.diff([values for _, values in told.setpoints], axis=0)
    assert np.abs(np.diff(steps, axis=0)).max() <= 8.0 / 125**2 * 1.01


def test_a_robot_that_is_not_ready_is_refused_in_one_line(controller):
    controller.protect(PROTECTIVE)
    with pytest.raises(InputError, match=r"arm: UR at .*: the robot is in a protective stop"), driven():
        pass
    controller.close()
    with pytest.raises(InputError, match=r"arm: UR at .*: .*connect"), driven():
        pass
    controller.__init__(HOST)


@pytest.mark.slow
@pytest.mark.alone
def test_the_bring_up_of_the_docs_goes_through(tmp_path):
    """docs/bringup.md: the emulator in a process of its own, a look, and the first motion."""
    host = f"host={HOST}"
    emulator = subprocess.Popen(
        [sys.executable, "-m", "action_diffusion.deploy.sim.ur", "folder=ur", host],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
    )
    try:
        assert emulator.stdout is not None
        assert b"a UR5e at" in emulator.stdout.readline()
        cell = Path("ur") / "cell.yaml"
        (tmp_path / cell).write_text(
            (tmp_path / cell).read_text().replace("rate: 125", "rate: 125, watchdog_time: 0.4")
        )
        bringup = [sys.executable, "-m", "action_diffusion.deploy.bringup", "robot=ur", f"hardware={cell}"]
        for words, said in (
            (["dry_run=true", "seconds=1", "number=5"], "as in a dry run it should not"),
            (["number=5", "distance=0.1", "speed=0.1", "seconds=1"], "and went 0."),
        ):
            done = subprocess.run(bringup + words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "RTDE watchdog" in done.stdout
            assert said in done.stdout
    finally:
        emulator.send_signal(signal.SIGINT)
        assert emulator.wait(20) == 0
