"""An emulated SO-101 in the arm's process, through lerobot: bring-up, faults, emergency stop, sudden death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from emulated_arms import LEROBOT, until

from action_diffusion.deploy.arm.link import ArmLink
from action_diffusion.deploy.ipc.channels import Phase
from action_diffusion.deploy.ipc.rings import Segments
from action_diffusion.errors import InputError
from benchmarks.robustness.emulated import So101, Ur, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (LEROBOT / "lerobot").exists(), reason="no lerobot: see test_lerobot.py"),
]


@pytest.fixture
def so101(tmp_path, monkeypatch) -> Iterator[So101]:
    monkeypatch.syspath_prepend(str(LEROBOT))
    arm = So101(tmp_path)
    yield arm
    arm.bus.close()


@contextmanager
def driven(arm: So101) -> Iterator[ArmLink]:
    segments = Segments()
    try:
        link = ArmLink(folder=segments.path, setup=arm.setup)
        try:
            link.begin()
            yield link
        finally:
            link.close()
    finally:
        segments.remove()


GOAL = np.array([40.0, -30.0, 20.0, 10.0, -20.0, 70.0])


def go(link: ArmLink, seconds: float = 1.0) -> None:
    link.follow(np.array([time.monotonic() + seconds]), GOAL[None])


def place(arm: So101) -> np.ndarray:
    return arm._units({number: motor.position for number, motor in arm.bus.motors.items()})


def test_it_goes_where_it_is_told_through_a_bad_cable(so101):
    with driven(so101) as link:
        go(link)
        for kind in ("lost", "wrong", "late", "out for 0.2 s", "wrong"):
            so101.fault(kind, np.random.default_rng(0))
            time.sleep(0.3)
        assert until(lambda: np.abs(place(so101) - GOAL).max() < 0.5)
        assert link.phase is Phase.MOVING
    assert so101.found.wrong == []
    assert so101.found.commands > 10


@pytest.mark.parametrize("kind", ["out for 1 s", "missing"])
def test_a_bus_that_stays_silent_ends_it_where_it_stands(so101, kind):
    with driven(so101) as link:
        go(link)
        so101.fault(kind, np.random.default_rng(0))
        assert until(lambda: link.phase is Phase.BROKEN)
        assert "ConnectionError: Failed to sync read" in "; ".join(link.events())
    assert until(so101.still)
    assert so101.found.wrong == []


def test_an_emergency_stop_and_a_sudden_death_leave_it_standing_with_its_torque_on(so101):
    with driven(so101) as link:
        go(link)
        assert until(lambda: not so101.still())
        link.emergency_stop()
        assert until(lambda: link.phase is Phase.STILL)
        with pytest.raises(InputError, match="emergency stop is set"):
            link.begin()
    so101.mend()
    with driven(so101) as link:
        go(link)
        assert until(lambda: not so101.still())
        link.child.process.send_signal(signal.SIGKILL)
        assert until(so101.still)
    assert all(motor.torque for motor in so101.bus.motors.values())
    assert so101.found.wrong == []


def test_random_faults_let_no_command_out_of_the_limits(so101):
    """`python -m benchmarks.robustness.emulated` does a thousand."""
    assert run(so101, 8, seed=1).wrong == []
    pytest.importorskip("rtde_control")
    ur = Ur(f"127.2.{os.getpid() // 250 % 250}.{os.getpid() % 250 + 1}")
    try:
        assert run(ur, 4, seed=1).wrong == []
    finally:
        ur.controller.close()


@pytest.mark.alone
def test_the_bring_up_of_the_docs_goes_through(tmp_path):
    """docs/bringup.md, without an arm."""
    environment = os.environ | {"PYTHONPATH": str(LEROBOT)}
    command = [sys.executable, "-m", "action_diffusion.deploy.sim.feetech", "folder=emulated"]
    emulator = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE)
    try:
        assert emulator.stdout is not None
        assert b"an SO-101 on" in emulator.stdout.readline()
        cell = Path("emulated") / "cell.yaml"
        bringup = [sys.executable, "-m", "action_diffusion.deploy.bringup", "robot=lerobot", f"hardware={cell}"]
        for words, said in (
            (["dry_run=true", "seconds=1", "number=0", "distance=10"], "as in a dry run it should not"),
            (["seconds=1", "number=0", "distance=10", "speed=0.3"], "and went"),
        ):
            done = subprocess.run(
                bringup + words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180
            )
            assert done.returncode == 0, done.stdout + done.stderr
            assert said in done.stdout
    finally:
        emulator.send_signal(signal.SIGINT)
        assert emulator.wait(20) == 0
