"""A robot made of processes: PushT in real time, observations of one instant, and what happens when one dies."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployments import deploy, save_bundle
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from action_diffusion import envs
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.deploy.arm.loop import ArmLoop
from action_diffusion.deploy.cameras.alignment import interpolated, latest_common, nearest
from action_diffusion.deploy.hardware.protocols import ArmState, Group
from action_diffusion.deploy.ipc.channels import CommandWriter, Phase
from action_diffusion.deploy.ipc.rings import RingReader, RingWriter, shared_folder
from action_diffusion.deploy.loop.clock import MonotonicClock, Pacer, VirtualClock
from action_diffusion.deploy.robot.process_robot import ProcessRobot
from action_diffusion.deploy.robot.robots import RobotTask, in_processes
from action_diffusion.deploy.run import run
from action_diffusion.deploy.sim.pusht import PushTArm, PushTCamera
from action_diffusion.errors import InputError
from action_diffusion.options import configuration
from benchmarks.robustness.kills import child_of


def pusht(*keys: str, latency: float = 0.0, **camera: float) -> ProcessRobot:
    task = RobotTask(env={"name": "pusht", "max_steps": 300}, cameras=tuple(key for key in keys if key == "image"))
    options = configuration.settings("deploy", [f"simulated.latency={latency}"])
    vars(options.simulated.camera).update(camera)  # also what cannot be, for the driver to refuse
    return in_processes("sim_pusht", task, options)


@pytest.fixture
def seeing() -> Iterator[ProcessRobot]:
    robot = pusht("agent_pos", "image")
    yield robot
    robot.close()


def walk(robot: ProcessRobot, n: int, target: np.ndarray) -> list[tuple[float | None, bool]]:
    """`n` commands to go to `target`, at the control rate."""
    pacer, feedback = Pacer(clock=MonotonicClock(), rate=robot.control_rate), []
    for _ in range(n):
        tick, _ = pacer.wait()
        feedback.append(robot.command([target], tick))
    return feedback


def until_over(robot: ProcessRobot, target: np.ndarray) -> float:
    """Keep commanding until the robot says that it is over; returns when (monotonic s)."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if robot.command([target], time.monotonic())[1]:
            return time.monotonic()
        time.sleep(0.01)
    raise AssertionError("the arm went on")


# Real time.


@pytest.mark.slow
def test_pusht_moves_in_real_time_as_it_does_in_step():
    """The finger and the block end where the simulator in step puts them, but for what a message takes."""
    env = envs.make("pusht")
    env.reset(100003)
    robot = pusht("state", "keypoint", "agent_pos")
    try:
        robot.begin(100003)
        start = robot.observe(["state"], time.monotonic()).values["state"]
        np.testing.assert_allclose(start, env.observe(["state"])["state"], atol=1e-3)
        target = np.array([300.0, 250.0])
        for _ in range(12):
            env.step(target)
        walk(robot, 12, target)
        time.sleep(0.1)
        seen = robot.observe(["state", "keypoint", "agent_pos"], time.monotonic())
        expected = env.observe(["state", "keypoint"])
        np.testing.assert_allclose(seen.values["state"], expected["state"], atol=2.0)
        np.testing.assert_allclose(seen.values["keypoint"], expected["keypoint"], atol=3.0)
        assert {key: (value.dtype, value.shape) for key, value in seen.values.items()} == {
            "state": (np.float32, (5,)),
            "keypoint": (np.float32, (9, 2)),
            "agent_pos": (np.float32, (2,)),
        }
        assert robot.events() == []
        robot.stop()
        robot.begin(100004)  # the next episode begins at its own start
        env.reset(100004)
        again = robot.observe(["state"], time.monotonic()).values["state"]
        np.testing.assert_allclose(again, env.observe(["state"])["state"], atol=1e-3)
    finally:
        robot.close()
    assert not list(shared_folder().glob(f"action-diffusion-{os.getpid()}-*"))


@pytest.mark.slow
@pytest.mark.alone
def test_pictures_and_states_are_of_one_instant(seeing):
    """The finger in the picture is where the state says, while it moves at hundreds of px/s."""
    seeing.begin(100000)
    drawn = envs.make("pusht")
    for target in ([450.0, 450.0], [60.0, 450.0]):
        walk(seeing, 4, np.array(target))
        tick = time.monotonic()
        seen = seeing.observe(["agent_pos", "image"], tick)
        assert 0 <= tick - seen.t < 0.3
        image = seen.values["image"]
        assert image.shape == drawn.observe(["image"])["image"].shape
        blue = (image[..., 2].astype(int) - image[..., 0]) > 80
        y, x = (float(index.mean()) * 512 / 96 for index in np.nonzero(blue))
        np.testing.assert_allclose([x, y], seen.values["agent_pos"], atol=15)
    with pytest.raises(InputError, match="unknown observation 'imag' in the robot's sources: did you mean image"):
        seeing.observe(["imag"], time.monotonic())


@pytest.mark.slow
@pytest.mark.parametrize("latency", [0.0, 0.2])
@pytest.mark.alone
def test_commands_take_effect_after_the_injected_latency(latency):
    robot = pusht("agent_pos", latency=latency)
    try:
        robot.begin(100000)
        time.sleep(latency + 0.05)  # what was commanded before the start has passed
        start = robot.observe(["agent_pos"], time.monotonic()).values["agent_pos"]
        sent = time.monotonic()
        robot.command([start + np.sign(256 - start) * 100], sent)
        moved = start
        while np.linalg.norm(moved - start) < 2 and time.monotonic() < sent + 2:
            time.sleep(0.002)
            seen = robot.observe(["agent_pos"], time.monotonic())
            moved = seen.values["agent_pos"]
        assert latency <= seen.t - sent < latency + 0.15
        assert robot.events() == []
    finally:
        robot.close()


# Deaths.


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.alone
def test_without_its_camera_the_arm_stops(seeing, sent):
    seeing.begin(100000)
    walk(seeing, 3, np.array([400.0, 100.0]))
    killed = time.monotonic()
    os.kill(seeing.cameras["image"].process.pid, sent)
    assert until_over(seeing, np.array([300.0, 300.0])) - killed < 0.2
    (reason,) = seeing.events()
    assert reason == f"stop: camera image {'has died' if sent == signal.SIGKILL else 'is halted'}"
    assert seeing.arm.phase in (Phase.STOPPING, Phase.STILL)
    seeing.stop()
    if sent == signal.SIGKILL:
        seeing.cameras["image"].process.wait()  # its threads end one after the other
    with pytest.raises(InputError, match=f"camera image: its process {reason.removeprefix('stop: camera image ')}"):
        seeing.begin(100001)


@pytest.mark.slow
def test_a_camera_that_dies_by_itself_and_one_that_loses_frames():
    robot = pusht("image", die_after=3.0, drop=0.5, latency=0.05, jitter=0.05)
    try:
        robot.begin(100000)
        times = {robot.observe(["image"], time.monotonic()).t for _ in range(30) if not time.sleep(0.02)}
        assert 2 <= len(times) <= 12
        until_over(robot, np.array([256.0, 256.0]))
        assert "camera image has died" in robot.events()[0]
    finally:
        robot.close()


@pytest.mark.slow
def test_without_the_arms_process_the_simulators_own_watchdog_holds_the_finger():
    robot = pusht("agent_pos")
    try:
        robot.begin(100000)
        start = robot.observe(["agent_pos"], time.monotonic()).values["agent_pos"]
        target = start + np.sign(256 - start) * 250
        walk(robot, 2, target)
        robot.arm.child.process.kill()
        robot.arm.child.process.wait()
        assert robot.hold()[1]
        assert robot.events() == ["the arm's process has died"]
        assert robot.events() == []
        world = RingReader(robot._segments.path / "world")
        time.sleep(0.6)
        before = world.latest().values["state"][:2]
        time.sleep(0.3)
        np.testing.assert_allclose(world.latest().values["state"][:2], before, atol=1.0)
        assert np.linalg.norm(before - target) > 20
    finally:
        robot.close()


@pytest.mark.slow
def test_without_the_simulator_the_driver_says_so():
    robot = pusht("agent_pos")
    try:
        robot.begin(100000)
        scene: Any = robot._scene
        scene.child.process.kill()
        until_over(robot, np.array([100.0, 100.0]))
        assert any("TimeoutError: the simulator is silent" in said for said in robot.events())
    finally:
        robot.close()


@pytest.mark.slow
def test_a_camera_that_cannot_be_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match=r"camera image: a camera with .*drop=1.5"):
        pusht("image", drop=1.5)
    assert not list(shared_folder().glob(f"action-diffusion-{os.getpid()}-*"))
    with pytest.raises(InputError):
        PushTCamera(world=str(tmp_path), rate=0)


@pytest.mark.slow
def test_deploy_says_why_the_arm_stopped_and_keeps_the_log(tmp_path, capfd):
    bundle = save_bundle(tmp_path / "bundle", env={"name": "pusht", "max_steps": 300})

    def kill() -> None:
        os.kill(child_of(os.getpid(), "deploy.sim"), signal.SIGKILL)

    timer = threading.Timer(4.0, kill)
    timer.start()
    try:
        assert run(deploy(bundle, tmp_path / "out")) == 0
    finally:
        timer.cancel()
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert 1 <= len(rows) < 100
    (said,) = [reason for row in rows for reason in row["interventions"] if "outside" not in reason]
    assert said == "broken: TimeoutError: the simulator is silent"
    assert f": {said}" in capfd.readouterr().err


# What people did passes.


class _Recorded(PushTArm):
    """Stands where the recording says."""

    def __init__(self) -> None:
        super().__init__(world=".")
        self.at, self.sent = np.full(2, 256.0), np.zeros(2)

    def read(self) -> ArmState:
        return ArmState(0.0, {"target": self.at, "agent_pos": self.at, "state": np.zeros(5)})

    def send(self, setpoint: np.ndarray) -> None:
        self.sent = setpoint


@pytest.mark.slow
def test_no_human_episode_meets_an_intervention(tmp_path):
    folder = os.environ.get("ACTION_DIFFUSION_DATA")
    if not folder:
        pytest.skip("ACTION_DIFFUSION_DATA is not set: no demonstrations by people")
    buffer = ReplayBuffer.open(Path(folder) / "pusht_cchi_v7_replay.zarr.zip")
    action, state, ends = buffer["action"][:], buffer["state"][:], buffer.episode_ends
    assert len(ends) == 206
    clock, arm = VirtualClock(), _Recorded()
    clock.advance(10.0)
    writer = CommandWriter(tmp_path, clock.now)
    assert arm.limits is not None
    loop = ArmLoop(arm=arm, limits=arm.limits, folder=tmp_path)
    events = RingReader(tmp_path / "events")
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        arm.at = state[start, :2].astype(np.float64)
        writer.begin()
        for row in range(start, end):
            arm.at = state[row, :2].astype(np.float64)
            writer.follow([clock.now()], action[row : row + 1])
            clock.advance(0.05)
            loop.cycle(clock.now(), clock.now)
            clock.advance(0.05)
            np.testing.assert_array_equal(arm.sent, action[row])
        writer.stop("the episode is over")
        for _ in range(3):
            loop.cycle(clock.now(), clock.now)
    assert [record.values["why"].item() for record in events.last(200)] == [b"the episode is over"] * 200


# Alignment.


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0.001, 0.1), min_size=1, max_size=12), st.floats(-0.2, 1.4), st.integers(0, 2**31))
def test_states_are_interpolated_in_their_own_way(tmp_path_factory, steps, t, seed):
    random = np.random.default_rng(seed)
    groups = [
        Group(name="x", size=2, kind="linear"),
        Group(name="turn", size=3, kind="rotation"),
        Group(name="open", size=1, kind="hold"),
    ]
    ring = tmp_path_factory.mktemp("ring") / "state"
    writer = RingWriter(ring, fields={group.name: ("f8", (group.size,)) for group in groups}, n_slots=64)
    times, turns = np.cumsum(steps), random.normal(0, 0.8, (len(steps), 3))
    for i, moment in enumerate(times):
        writer.append(moment, {"x": [3 * moment, -moment], "turn": turns[i], "open": [i]})
    reader = RingReader(ring)
    state = interpolated(reader, groups, t)
    inside = float(np.clip(t, times[0], times[-1]))
    np.testing.assert_allclose(state["x"], [3 * inside, -inside], atol=1e-9)
    assert state["open"] == max(0, np.searchsorted(times, t, side="right") - 1)
    i = int(np.clip(np.searchsorted(times, inside, side="right") - 1, 0, len(times) - 1))
    j = min(i + 1, len(times) - 1)
    share = 0.0 if i == j else (inside - times[i]) / (times[j] - times[i])
    whole = Rotation.from_rotvec(turns[i]).inv() * Rotation.from_rotvec(turns[j])
    part = Rotation.from_rotvec(turns[i]).inv() * Rotation.from_rotvec(state["turn"])
    assert part.magnitude() == pytest.approx(share * whole.magnitude(), abs=1e-6)


def test_the_instant_is_the_latest_that_all_sources_know(tmp_path):
    fast = RingWriter(tmp_path / "fast", fields={"x": ("f8", ())}, n_slots=32)
    slow = RingWriter(tmp_path / "slow", fields={"x": ("f8", ())}, n_slots=32)
    rings = [RingReader(tmp_path / "fast"), RingReader(tmp_path / "slow")]
    assert latest_common(1.0, rings) is None
    with pytest.raises(LookupError):
        nearest(rings[0], 1.0)
    for i in range(10):
        fast.append(0.1 * i, {"x": i})
    slow.append(0.0, {"x": 0})
    slow.append(0.54, {"x": 1})
    assert latest_common(2.0, rings) == 0.54
    assert latest_common(0.3, rings) == 0.3
    assert nearest(rings[0], 0.54).values["x"] == 5
