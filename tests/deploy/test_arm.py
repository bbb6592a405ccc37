"""The arm's process: stops by itself when others die, hang or go mad, keeps its period, and imports nothing heavy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from action_diffusion.deploy.arm.link import ArmLink, ArmSetup
from action_diffusion.deploy.hardware.protocols import Group, check_arm
from action_diffusion.deploy.ipc.channels import Phase
from action_diffusion.deploy.ipc.processes import SILENCE, Heartbeat, Watched
from action_diffusion.deploy.ipc.rings import Moment, RingReader, Segments
from action_diffusion.deploy.sim.pusht import IdealArm
from action_diffusion.errors import InputError
from benchmarks.robustness.fuzz import fuzz

LIMITS = {"low": [-2.0] * 3, "high": [2.0] * 3, "max_step": [1.0] * 3}
LIMITS |= {"velocity": [1.0] * 3, "acceleration": [4.0] * 3, "jerk": [100.0] * 3}
SETTINGS = {"n_joints": 2}


class BreakingArm(IdealArm):
    """Raises at setpoint number 100."""

    sent = 0

    def send(self, setpoint: np.ndarray) -> None:
        self.sent += 1
        if self.sent == 100:
            raise ConnectionError("the cable is out")


class WildArm(IdealArm):
    """Has nothing that stops it."""

    watchdog = ""


@pytest.fixture
def segments(tmp_path) -> Iterator[Segments]:
    made = Segments(tmp_path)
    yield made
    made.remove()


def start(segments: Segments, driver: str = "ideal", **changes: object) -> ArmLink:
    setup: dict[str, Any] = {"settings": SETTINGS, "limits": LIMITS} | changes
    return ArmLink(folder=segments.path, setup=ArmSetup(driver=driver, **setup))


def wait_for(condition, seconds: float = 3.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


def move(arm: ArmLink, seconds: float = 1.0) -> None:
    """Send the arm off at 0.8 rad/s."""
    now = time.monotonic()
    arm.follow(now + np.array([0.05, 0.05 + seconds]), np.array([[0.0, 0, 0], [0.8 * seconds, 0, 0]]))


@pytest.mark.slow
@pytest.mark.alone
def test_it_moves_stops_when_asked_to_and_begins_again(segments):
    arm = start(segments)
    try:
        assert arm.phase is Phase.STILL
        arm.begin()
        move(arm)
        wait_for(lambda: arm.states.latest().values["joints"][0] > 0.2)
        assert arm.phase is Phase.MOVING
        arm.rest()
        assert arm.phase is Phase.STILL
        assert arm.events() == []
        stopped = arm.states.latest().values["joints"][0]
        assert 0.2 < stopped < 0.7
        move(arm)  # nobody said begin
        time.sleep(0.1)
        assert arm.states.latest().values["joints"][0] == pytest.approx(stopped, abs=1e-4)
        arm.begin()
        now = time.monotonic()
        arm.follow([now + 0.1], [[stopped + 0.05, 0, 1.0]])
        wait_for(lambda: arm.states.latest().values["gripper"][0] == 1)
        wait_for(lambda: abs(arm.states.latest().values["joints"][0] - stopped - 0.05) < 1e-6)
        positions = np.array([record.values["command"] for record in arm.setpoints.last(4000)])
        assert (np.abs(np.diff(positions[:, 0])) <= 1.0 / 200 + 1e-9).all()
        assert (np.abs(np.diff(positions[:, 0], n=2)) <= 4.0 / 200**2 + 1e-9).all()
    finally:
        arm.close()
    assert not arm.child.alive


@pytest.mark.slow
def test_what_must_not_be_followed_is_refused_with_its_reason(segments):
    arm = start(segments)
    try:
        arm.begin()
        now = time.monotonic()
        for times, values in (
            ([now], [[np.nan, 0, 0]]),
            ([now], [[0, 0]]),
            ([now - 9], [[0, 0, 0]]),
            ([now], [[3, 0, 0]]),
        ):
            arm.follow(np.array(times), np.array(values))
        said: list[str] = []
        wait_for(lambda: said.extend(arm.events()) or len(said) >= 4)
        for reason, words in zip(said, ("not finite", "1 waypoints of 2 values", "stale", "outside"), strict=True):
            assert reason.startswith("refused: ")
            assert words in reason
        assert arm.phase is Phase.MOVING
    finally:
        arm.close()


@pytest.mark.slow
@pytest.mark.alone
def test_anybody_may_stop_it_and_it_begins_no_more_before_that_is_cleared(segments):
    arm = start(segments)
    try:
        arm.begin()
        move(arm)
        time.sleep(0.3)
        emergency = Moment(segments.path / "emergency")
        emergency.mark()
        events = RingReader(segments.path / "events")
        wait_for(lambda: events.latest() is not None)
        assert events.latest().t - emergency.t < 0.05
        assert arm.events() == ["stop: emergency stop"]
        with pytest.raises(InputError, match=r"the arm does not begin: refused: .* the emergency stop is set"):
            arm.begin()
        emergency.clear()
        arm.begin()
    finally:
        arm.close()


LOOP = """
import sys, time
from pathlib import Path
from tests_arm import LIMITS, SETTINGS, ArmLink, ArmSetup, move
arm = ArmLink(folder=Path(sys.argv[1]), setup=ArmSetup(driver="ideal", settings=SETTINGS, limits=LIMITS))
print(arm.child.process.pid, flush=True)
arm.begin()
move(arm, 2.0)
print("moving", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.alone
def test_when_the_loop_dies_or_hangs_the_stop_begins_within_100_ms(segments, sent):
    code = LOOP.replace("tests_arm", "test_arm")
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    loop = subprocess.Popen(
        [sys.executable, "-c", code, str(segments.path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    try:
        pid = int(loop.stdout.readline())
        assert loop.stdout.readline().strip() == "moving"
        events, setpoints = RingReader(segments.path / "events"), RingReader(segments.path / "setpoints")
        wait_for(lambda: setpoints.latest().values["command"][0] > 0.3)
        assert events.latest() is None
        killed = time.monotonic()
        os.kill(loop.pid, sent)
        wait_for(lambda: events.latest() is not None)
        assert events.latest().t - killed < 0.1
        why = events.latest().values["why"].item().decode()
        assert ("died" in why) if sent == signal.SIGKILL else why == "loop is halted"
        wait_for(lambda: setpoints.latest().values["phase"] == Phase.STILL)
        rest = [record.values["command"][0] for record in setpoints.last(2)]
        assert abs(rest[1] - rest[0]) < 1e-5
        loop.kill()
        loop.wait()
        wait_for(lambda: not Path(f"/proc/{pid}").exists() or not segments.path.exists())
        assert not segments.path.exists()  # what the dead one could no longer do
    finally:
        loop.kill()
        loop.wait()
        loop.stdout.close()


@pytest.mark.slow
def test_a_driver_that_raises_ends_the_process_with_its_reason(segments):
    arm = start(segments, f"{__name__}:BreakingArm")
    try:
        wait_for(lambda: not arm.child.alive)
        assert arm.phase is Phase.BROKEN
        assert arm.events() == ["broken: ConnectionError: the cable is out"]
        with pytest.raises(InputError, match="its process does not answer"):
            arm.begin()
    finally:
        arm.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("driver", "changes", "message"),
    [
        ("ideal", {"limits": None}, "arm: limits has no values, and the arm's driver knows none: nothing moves"),
        ("ideal", {"limits": LIMITS | {"jerk": None}}, "arm: limits.jerk has no value for joints"),
        ("ideal", {"settings": {"n_joint": 2}}, "arm ideal: .*n_joint"),
        ("ideal", {"settings": {"n_joints": 2, "start": [3.0, 0, 0]}}, "the arm stands at .* outside of its limits"),
        ("ideal", {"obstacles": {"table": 0.0}}, "does not say where its links are"),
        ("idael", {}, "unknown arm 'idael': did you mean ideal"),
    ],
)
def test_what_must_not_start_says_why(segments, driver, changes, message):
    with pytest.raises(InputError, match=message):
        start(segments, driver, **changes)


def test_an_arm_without_a_watchdog_of_its_own_is_refused():
    with pytest.raises(InputError, match="WildArm names no watchdog"):
        check_arm(WildArm())
    blind = IdealArm()
    blind.command = (Group(name="elbow", size=1, kind="linear"),)
    with pytest.raises(InputError, match="command group 'elbow' has no state group"):
        check_arm(blind)


@pytest.mark.slow
def test_the_processes_import_nothing_heavy():
    modules = ["arm.process", "cameras.process", "sim.pusht"]
    code = ";".join(f"import action_diffusion.deploy.{name}" for name in modules)
    code += ";import sys;print([name for name in ('torch', 'diffusers', 'hydra') if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


@pytest.mark.slow
def test_nonsense_moves_no_arm_beyond_its_limits(tmp_path):
    outcome = fuzz(1500, 1, tmp_path)
    assert outcome.safe, outcome
    assert outcome.setpoints > 2000
    assert 100 < outcome.followed < 1400
    kinds = {reason.split(":")[0] for reason in outcome.reasons}
    assert {"refused", "stop"} <= kinds


@pytest.mark.alone
def test_a_process_that_runs_but_has_no_heartbeat_is_seen(tmp_path):
    heart = Heartbeat(tmp_path / "loop.beat", lease=0.1)
    watched = Watched(tmp_path / "loop.beat")
    assert watched.trouble(time.monotonic()) is None
    time.sleep(0.2)  # the main thread has not renewed its lease
    assert watched.trouble(time.monotonic()) is None
    assert watched.trouble(time.monotonic() + SILENCE) == "is silent: no heartbeat for 500 ms"
    heart.renew()
    wait_for(lambda: watched.trouble(time.monotonic() + SILENCE - 0.1) is None)
    heart.end()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system says nothing of its processes in /proc")
@pytest.mark.alone
def test_a_large_process_is_dead_before_its_memory_is_free(tmp_path):
    """The system frees a killed process's memory first: 0.1 s for a loop with torch beside other programs."""
    code = (
        "import sys,time,mmap;from action_diffusion.deploy.ipc.processes import Heartbeat;from pathlib import Path;"
        "memory=mmap.mmap(-1,3<<29,flags=mmap.MAP_PRIVATE|mmap.MAP_ANONYMOUS);memory.madvise(mmap.MADV_NOHUGEPAGE);"
        "[memory.__setitem__(i,1) for i in range(0,len(memory),4096)];"
        "h=Heartbeat(Path(sys.argv[1]),60);print('ready',flush=True);time.sleep(60)"
    )
    path = tmp_path / "loop.beat"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        watched = Watched(path)
        assert watched.trouble(time.monotonic()) is None
        process.kill()
        began = time.monotonic()
        wait_for(lambda: watched.trouble(time.monotonic()) == "has died")
        seen = time.monotonic() - began
        process.wait()
        freed = time.monotonic() - began
    assert seen < max(0.05, freed / 2)
