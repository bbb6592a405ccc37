"""Demonstrations by people, without a browser: the session, devices, steering, and what reaches the disk."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from action_diffusion import cli, envs
from action_diffusion.datasets.robomimic.attributes import unpack
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.deploy.arm.link import ArmSetup
from action_diffusion.deploy.hardware.command import CommandLayout
from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.hardware.protocols import Group
from action_diffusion.deploy.ipc.rings import Segments
from action_diffusion.deploy.loop.clock import MonotonicClock, VirtualClock
from action_diffusion.deploy.page.shared import Nonsense
from action_diffusion.deploy.robot.process_robot import ProcessRobot
from action_diffusion.deploy.subscribers import Subscribers
from action_diffusion.deploy.teleop.devices.device import Ask, Signals, without_drift
from action_diffusion.deploy.teleop.devices.keys import Keys
from action_diffusion.deploy.teleop.devices.terminal import names
from action_diffusion.deploy.teleop.page.app import word
from action_diffusion.deploy.teleop.scenes import describe
from action_diffusion.deploy.teleop.session import EpisodeMode, TeleopSession
from action_diffusion.deploy.teleop.steering import HAND, Speeds, steering_of
from action_diffusion.deploy.teleop.takeover import DeviceTeleoperator, teleoperator
from action_diffusion.deploy.teleop.world import RobotWorld, SteppedWorld, action_of, command_limits, gate_of
from action_diffusion.envs.demonstration import episode
from action_diffusion.envs.pusht.simulator import PushT
from action_diffusion.errors import InputError
from action_diffusion.files import writer_lock
from action_diffusion.options import configuration

PLANE = Limits(low=np.zeros(2), high=np.full(2, 512.0), max_step=np.full(2, 300.0))
SPEEDS = Speeds()
STILL = Signals(twist=np.zeros(6))


def twist(**axes: float) -> Signals:
    """A twist by the names of its axes."""
    order = ("forward", "left", "up", "roll", "pitch", "yaw")
    return Signals(twist=np.array([axes.get(name, 0.0) for name in order]))


def order(*orders: Ask) -> Signals:
    return Signals(engaged=False, why="nobody", orders=orders)


class Sink:
    """Episodes in memory."""

    def __init__(self) -> None:
        self.episodes: list[list[dict[str, Any]]] = []
        self.rows: list[dict[str, Any]] = []

    n_episodes = property(lambda self: len(self.episodes))
    n_steps = property(lambda self: len(self.rows))

    def add(self, step: Mapping[str, Any]) -> None:
        self.rows.append(dict(step))

    def keep(self) -> int:
        self.episodes.append(self.rows)
        self.rows = []
        return len(self.episodes) - 1

    def discard(self) -> None:
        self.rows = []

    def undo(self) -> int:
        self.episodes.pop()
        return len(self.episodes)


class Played:
    """A device that plays signals, one a control step; functions are called for theirs."""

    help = ""

    def __init__(self, signals: list[Any]) -> None:
        self._signals: Iterator[Any] = iter(signals)

    def connect(self) -> None:
        pass

    def poll(self) -> Signals:
        signals = next(self._signals, order(Ask.FINISH))
        return signals() if callable(signals) else signals

    def close(self) -> None:
        pass


def play(signals: list[Any], sink: Any = None, **settings: Any) -> tuple[TeleopSession, Any, list[Any]]:
    """A session on PushT that is over: it, where its episodes went, and what it told after each step."""
    world = SteppedWorld(PushT(max_steps=10**9), plane=True)
    told: list[Any] = []
    sink = sink or Sink()
    session = TeleopSession(
        world=world,
        device=Played(signals),
        steering=steering_of(world.groups, world.limits, world.control_rate, SPEEDS),
        gate=gate_of(world),
        sink=sink,
        clock=VirtualClock(),
        tell=told.append,
        **{"countdown": 0.0, **settings},
    )
    session.run()
    return session, sink, told


def finger(seed: int = 0) -> np.ndarray:
    """Where PushT's finger is at a start."""
    env = PushT()
    env.reset(seed)
    return env.observe(["agent_pos"])["agent_pos"].astype(np.float64)


def lead(seed: int, n: int) -> list[Signals]:
    """Start, take hold of the finger, and lead it to the right by 5 px a step, for n steps."""
    return [order(Ask.START), *(Signals(target=finger(seed) + np.array([5.0 * i, 0])) for i in range(n))]


# The session


def test_what_is_recorded_is_what_the_simulator_did():
    _, sink, _ = play([*lead(3, 12), order(Ask.KEEP)], seed=3)
    (rows,) = sink.episodes
    assert {key: (row.dtype, row.shape) for key, row in rows[0].items()} == {
        "state": (np.float32, (5,)),
        "action": (np.float32, (2,)),
        "reward": (np.float32, ()),
    }
    env = PushT()
    env.reset(3)
    for row in rows:
        np.testing.assert_array_equal(env.observe(["state"])["state"], row["state"])
        assert np.float32(env.step(row["action"])[0]) == row["reward"]


def test_the_columns_are_those_of_the_expert():
    world = SteppedWorld(PushT(), plane=True)
    expert = episode(PushT(max_steps=300), "pusht", 2)
    assert set(world.fields) == set(expert)
    for key, (dtype, shape) in world.fields.items():
        assert (np.dtype(dtype), shape) == (expert[key].dtype, expert[key].shape[1:])


def test_keep_goes_on_discard_comes_again_and_undo_goes_back():
    signals = [
        *lead(5, 4),
        order(Ask.KEEP),
        *lead(6, 4),
        order(Ask.DISCARD),
        *lead(6, 3),
        order(Ask.KEEP),
    ]
    session, sink, told = play([*signals, order(Ask.UNDO), *lead(6, 2), order(Ask.KEEP, Ask.KEEP)], seed=5)
    assert [len(rows) for rows in sink.episodes] == [4, 2]
    starts = [PushT() for _ in range(2)]
    for env, seed, rows in zip(starts, (5, 6), sink.episodes, strict=True):
        env.reset(seed)
        np.testing.assert_array_equal(rows[0]["state"], env.observe(["state"])["state"])
    assert (session.discarded, session.undone, len(session.scores)) == (1, 1, 2)
    assert told[-1]["episodes"] == 2


def test_orders_that_make_no_sense_change_nothing():
    session, sink, told = play(
        [
            order(Ask.KEEP, Ask.DISCARD, Ask.UNDO),
            *lead(0, 3),
            order(Ask.START),
        ]
    )
    assert sink.n_episodes == 0
    assert sink.n_steps == 3
    assert session.mode is EpisodeMode.RECORDING
    _, sink, told = play([order(Ask.START), order(Ask.KEEP)])
    assert sink.n_episodes == 0
    assert "nothing to keep" in told[1]["message"]


def test_the_countdown():
    _, sink, told = play([order(Ask.START), *[Signals(target=finger())] * 9], countdown=0.5)
    assert [said["countdown"] for said in told[:5]] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    assert [said["mode"] for said in told[:6]] == ["COUNTDOWN"] * 5 + ["RECORDING"]
    assert sink.n_steps == 5


def test_a_pointer_takes_hold_before_anything_moves():
    away = Signals(target=finger() + 100)
    _, sink, told = play([order(Ask.START), away, away, *lead(0, 3)[1:]])
    assert sink.n_steps == 3
    assert told[1]["message"] == HAND


def test_where_nobody_drives_time_stands_still():
    silent = Signals(engaged=False, why="the page is silent or hidden: paused")
    far = Signals(target=finger() + 90)
    _, sink, told = play([*lead(0, 4), silent, silent, far, *lead(0, 4)[2:], order(Ask.KEEP)])
    (rows,) = sink.episodes
    assert len(rows) == 7
    assert [said["driven"] for said in told[1:10]] == [True] * 4 + [False] * 3 + [True] * 2
    assert told[5]["message"] == silent.why
    env = PushT()
    env.reset(0)
    for row in rows:  # one steady motion, as if nothing had been between
        np.testing.assert_array_equal(env.observe(["state"])["state"], row["state"])
        env.step(row["action"])


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ([np.nan, 0.0], "not finite"),
        ([600.0, 100.0], r"command\[0\] = 600 is outside"),
        ([512.0, 512.0], "away from the last one"),
    ],
)
def test_what_the_gate_refuses_is_neither_executed_nor_recorded(target, reason):
    bad = Signals(target=np.array(target))
    session, sink, told = play([*lead(0, 3), bad, *lead(0, 1)[1:], order(Ask.KEEP)])
    assert session.refused == 1
    assert len(sink.episodes[0]) == 4
    assert re.search(reason, told[4]["message"])
    assert np.isfinite([row["action"] for row in sink.episodes[0]]).all()


def test_an_episode_that_is_over_waits_for_a_word():
    _, sink, told = play([*lead(0, 8), order(Ask.KEEP)], max_steps=5)
    assert [len(rows) for rows in sink.episodes] == [5]
    assert told[5]["mode"] == "OVER"


def test_an_interrupted_episode_is_asked_for_first():
    sink = Sink()
    sink.rows = [{}, {}]
    session, sink, _ = play([order(Ask.START), order(Ask.KEEP)], sink)
    assert [len(rows) for rows in sink.episodes] == [2]
    assert session.mode is EpisodeMode.READY


def test_recording_begins_with_the_first_motion():
    _, sink, told = play([order(Ask.START), STILL, STILL, twist(forward=1.0), STILL, order(Ask.KEEP)])
    (rows,) = sink.episodes
    np.testing.assert_allclose([row["action"] for row in rows], [finger() - [0, 30]] * 2, atol=1e-3)
    assert "begins" in told[1]["message"]


def test_a_robot_that_is_not_ready_says_why(monkeypatch):
    def begin(world: SteppedWorld) -> None:
        raise InputError("the emergency stop is set")

    monkeypatch.setattr(SteppedWorld, "begin", begin)
    session, sink, told = play([*lead(0, 3)])
    assert (session.mode, sink.n_steps) == (EpisodeMode.READY, 0)
    assert told[0]["message"] == "the emergency stop is set"


def test_scenes_are_kept_and_made_again_where_they_are_missing(tmp_path):
    """Two episodes, then one that is taken back and two that follow; the third session was killed."""
    (tmp_path / "zarr.json").write_text('{"attributes": {"task": "lift"}, "zarr_format": 3}')
    made: list[tuple[int, str]] = []

    def scene(session: str) -> Any:
        def scene_of(index: int) -> dict[str, str]:
            made.append((index, session))
            return {"model_file": f"{session}{index}"}

        return scene_of

    for session, n_episodes, known in (("a", 2, 0), ("b", 3, 1), ("d", 5, 4)):
        describe(tmp_path, scene(session), n_episodes=n_episodes, known=known)
    attrs = json.loads((tmp_path / "zarr.json").read_text())["attributes"]
    kept = dict(unpack(attrs["hdf5_attributes"], "there"))
    assert [kept[f"data/demo_{index}"]["model_file"] for index in range(5)] == ["a0", "b1", "b2", "d3", "d4"]
    assert made == [(0, "a"), (1, "a"), (1, "b"), (2, "b"), (3, "d"), (4, "d")]
    assert attrs["task"] == "lift"


# The command


@pytest.mark.slow
def test_a_script_records_and_a_second_run_goes_on(tmp_path, capsys):
    steps = "\n".join(f"{x} 300  # px" for x in range(200, 230, 3))
    (tmp_path / "script").write_text(f"start\n{steps}\nkeep\n\nstart\n{steps}\nkeep\nundo\n")
    words = ["task=pusht_state", "agent=teleop", "device=script", f"script={tmp_path}/script", "seed=4"]
    for n in (1, 2):
        assert cli.main(["collect", *words, f"output={tmp_path}/a.zarr"]) == 0
        assert f"episodes: {n}" in capsys.readouterr().out
    buffer = ReplayBuffer.open(tmp_path / "a.zarr")
    assert (buffer.n_episodes, buffer.n_steps) == (2, 20)
    assert (buffer.attrs["source"], buffer.attrs["control_rate"]) == ("teleoperation", 10.0)
    env = PushT()
    env.reset(5)
    np.testing.assert_array_equal(buffer["state"][10], env.observe(["state"])["state"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["device=mouse"], "unknown device 'mouse'"),
        (["device=script"], "device=script needs script=FILE"),
        (["device=script", "script=/nowhere"], "script=/nowhere: No such file"),
        (["device=keyboard", "page=false"], "there is none: device=browser has keys"),
        (["device=leader"], "device=leader needs hardware=FILE.yaml"),
        (["device=browser", "page=false"], "device=browser needs its page"),
        (["task=transport_state"], "one person drives one arm"),
        (["task=custom"], "has no simulator: robot=…"),
        (["episodes=0"], "episodes=0 must be at least 1"),
        (["seed=99999"], "demonstrations use the starts 0 to 99999"),
        (["max_seconds=-1", "device=script"], "max_seconds=-1 must be above 0"),
        (["output=a.zarr.zip"], "records to a folder"),
        (["speed=0", "device=script", "script=/dev/null"], "speed=0 must be above 0"),
    ],
)
def test_bad_options(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    assert cli.main(["collect", "task=pusht_state", "agent=teleop", "output=a.zarr", *words]) == 2
    assert message in capsys.readouterr().err


def test_an_output_that_another_process_writes_is_refused_before_a_page_opens(tmp_path, capsys):
    with writer_lock(tmp_path / "a.zarr"):
        words = ["task=pusht_state", "agent=teleop", "device=browser", f"output={tmp_path}/a.zarr"]
        assert cli.main(["collect", *words]) == 2
    said = capsys.readouterr()
    assert "a.zarr is being written by process" in said.err
    assert said.err.count("\n") == 1
    assert "page:" not in said.out


@pytest.mark.parametrize("line", ["jump", "1 two", "start now"])
def test_a_script_that_makes_no_sense(tmp_path, capsys, line):
    (tmp_path / "script").write_text(f"start\n{line}\n")
    words = ["agent=teleop", "device=script", f"script={tmp_path}/script", f"output={tmp_path}/a.zarr"]
    assert cli.main(["collect", *words]) == 2
    assert "script, line 2:" in capsys.readouterr().err


@pytest.mark.slow
def test_keys_of_a_terminal(tmp_path):
    """In a pseudo-terminal, as SSH gives one: start, drive, keep, Ctrl-C."""
    ours, theirs = pty.openpty()
    words = ["task=pusht_state", "agent=teleop", "device=keyboard", "countdown=0", "page=false"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "action_diffusion", "collect", *words, f"output={tmp_path}/a.zarr"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    try:
        said = b""
        while b"keyboard:" not in said:
            said += os.read(ours, 4096)
        time.sleep(0.3)
        for keys in (b"\r", *[b"d"] * 20, b"\x1b[A", b"k", b"\x03"):
            os.write(ours, keys)
            time.sleep(0.05 if keys == b"d" else 0.3)
        with contextlib.suppress(OSError):  # its end of the terminal is gone
            while read := os.read(ours, 4096):
                said += read
        process.wait(10)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, said
    buffer = ReplayBuffer.open(tmp_path / "a.zarr")
    assert buffer.n_episodes == 1
    moved = buffer["action"][-1] - buffer["action"][0]
    assert moved[0] > 60  # d: to the right
    assert moved[1] < 0  # up


# Devices


def test_keys_are_held_pressed_and_scale_the_speed():
    keys = Keys()
    said = keys.signals(["w", "ArrowLeft", "q"], [" ", "u", "k"])
    assert said.twist is not None
    assert said.twist.tolist() == [1, 1, 0, 0, 0, 0]
    assert said.toggle
    assert said.orders == (Ask.UNDO, Ask.KEEP)
    assert keys.signals(["w", "s"], ["+", "+"]).twist.tolist() == [0.0] * 6
    assert keys.signals([], ["-"]).speed == pytest.approx(1.25)
    assert keys.signals([], ["-"] * 99).speed == pytest.approx(0.1)


def test_names_of_what_a_terminal_types():
    assert names(b"W\x1b[Aa\r\x7f") == ["w", "ArrowUp", "a", "Enter", "Backspace"]
    assert names(b"\xff\x1b[D") == ["ArrowLeft"]


def test_drift_is_nothing_and_neither_is_nonsense():
    values = without_drift(np.array([0.05, -0.05, 0.55, -1.0, 2.0, np.nan, np.inf]), 0.1)
    np.testing.assert_allclose(values, [0, 0, 0.5, -1, 1, 0, 0])


@pytest.mark.parametrize(
    "message",
    [
        *("nonsense", "[]", '"start"', "{}", '{"order": "explode"}', '{"order": 3}', '{"pointer": [1, null]}'),
        '{"pointer": [1, 2, 3], "down": [], "pressed": []}',
        '{"pointer": [1e999, 2], "down": [], "pressed": []}',
        '{"pointer": null, "down": 3, "pressed": []}',
    ],
)
def test_what_a_page_cannot_mean_is_nonsense(message):
    with pytest.raises(Nonsense):
        word(message)


def test_what_a_page_means():
    assert word('{"order": "undo"}') == {"order": int(Ask.UNDO)}
    with pytest.raises(Nonsense):
        word('{"pointer": [1, 2], "down": ["w", "\\t", "F13", ["x"]], "pressed": [" "]}')
    said = word('{"pointer": [1, 2], "down": ["w", "F13"], "pressed": [" "]}')
    assert said is not None
    assert (said["pointer"].tolist(), said["down"], said["pressed"]) == ([1, 2], "w", " ")


# Steering

ARM = Limits(
    low=np.array([0.2, -0.3, 0.0, -3.0, -3.0, -3.0, 0.0]),
    high=np.array([0.6, 0.3, 0.4, 3.0, 3.0, 3.0, 1.0]),
    velocity=np.array([0.5] * 3 + [2.0] * 3 + [np.inf]),
    max_step=np.array([np.inf] * 6 + [1.0]),
)
POSE = (
    Group(name="position", size=3, kind="linear", unit="m"),
    Group(name="rotation", size=3, kind="rotation", unit="rad"),
    Group(name="gripper", size=1, kind="hold"),
)


def acted(steering: Any, signals: Signals, present: np.ndarray) -> np.ndarray:
    """The action that `signals` become, which is none of the refusals."""
    action = steering.action(signals, present)
    assert isinstance(action, np.ndarray)
    return action


def test_twists_become_relative_actions():
    limits = Limits(low=np.full(7, -1.0), high=np.ones(7))
    steering = steering_of(None, limits, 20.0, SPEEDS)
    nothing = np.zeros(0)
    action = acted(steering, twist(forward=1.0, yaw=-1.0), nothing)
    np.testing.assert_allclose(action, [0.25, 0, 0, 0, 0, -0.1, -1])  # 0.0125 m of 0.05, 0.05 rad of 0.5
    closing = steering.action(STILL._replace(toggle=True), nothing)
    assert (closing[-1], steering.action(STILL, nothing)[-1]) == (1.0, 1.0)
    assert steering.action(STILL._replace(gripper=-1), nothing)[-1] == -1.0
    fast = steering.action(twist(up=1.0)._replace(speed=40.0), nothing)
    assert fast[2] == 1.0
    assert isinstance(steering.action(Signals(target=np.zeros(7)), nothing), str)


def test_twists_move_a_pose_within_its_limits():
    steering = steering_of(POSE, command_limits(CommandLayout(POSE), ARM), 10.0, SPEEDS, arm_limits=ARM)
    at = np.array([0.4, 0.0, 0.2, 3.1, 0.0, 0.0, 0.0])
    steering.begin(at)
    action = acted(steering, twist(forward=1.0, yaw=1.0), at)
    np.testing.assert_allclose(action[:3], [0.425, 0, 0.2])
    turned = Rotation.from_rotvec([0, 0, 0.1]) * Rotation.from_rotvec(at[3:6])
    np.testing.assert_allclose(Rotation.from_rotvec(action[3:6]).as_matrix(), turned.as_matrix(), atol=1e-9)
    for _ in range(20):
        action = acted(steering, twist(forward=1.0), at)
    assert action[0] == ARM.high[0]
    assert steering.action(STILL._replace(toggle=True), at)[6] == 1.0
    assert steering.action(STILL._replace(toggle=True), at)[6] == 0.0


def test_a_leader_is_followed_no_faster_than_the_arm_may():
    joints = (Group(name="joints", size=2, kind="linear", unit="rad"),)
    limits = Limits(low=np.full(2, -1.0), high=np.ones(2), velocity=np.array([1.0, 2.0]))
    steering = steering_of(joints, limits, 10.0, SPEEDS, arm_limits=limits)
    steering.begin(np.zeros(2))
    leader = Signals(target=np.array([0.9, -5.0]))
    first = acted(steering, leader, np.zeros(2))
    np.testing.assert_allclose(first, [0.1, -0.2])
    for _ in range(20):
        last = acted(steering, leader, np.zeros(2))
    np.testing.assert_allclose(last, [0.9, -1.0])
    assert "3 numbers" in steering.action(Signals(target=np.zeros(3)), np.zeros(2))
    steering.begin(np.zeros(2))
    np.testing.assert_allclose(acted(steering, twist(forward=1.0, left=-1.0), np.zeros(2)), [0.05, -0.05])


def test_which_end_closes_a_gripper():
    for gripper, expected in ((None, 1.0), ((0.0, 1.0), 1.0), ((1.0, 0.0), 0.0)):
        steering = steering_of(POSE, ARM, 10.0, SPEEDS, arm_limits=ARM, gripper=gripper)
        steering.begin(np.array([0.4, 0, 0.2, 3.1, 0, 0, 1.0 - expected]))
        assert steering.action(STILL._replace(gripper=1), np.zeros(7))[6] == expected


def test_actions_of_a_robot_have_6d_rotations():
    command = np.array([0.4, 0.0, 0.2, 3.1, 0.2, 0.0, 1.0])
    action = action_of(CommandLayout(POSE), command)
    assert (action.dtype, action.shape) == (np.float32, (10,))
    np.testing.assert_allclose(CommandLayout(POSE).from_actions(action[None])[0], command, atol=1e-5)


# Arms


@pytest.mark.slow
def test_lift_by_twists(tmp_path):
    """Down onto the cube, the gripper shut, and up: the person sees the cube, and so does this test."""
    pytest.importorskip("robosuite")
    lift: Any = envs.make("lift", max_steps=10**9)
    world = SteppedWorld(lift, plane=False)
    steering = steering_of(world.groups, world.limits, world.control_rate, SPEEDS.scaled(4.0))

    def towards(height: float, shut: int) -> Any:
        def signals() -> Signals:
            seen = world.observe()
            error = seen["object"][:3] + np.array([0, 0, height]) - seen["robot0_eef_pos"]
            return twist(**dict(zip(("forward", "left", "up"), np.clip(20 * error, -1, 1), strict=True)))._replace(
                gripper=shut
            )

        return signals

    grasp = [towards(0.1, -1)] * 15 + [towards(0.0, -1)] * 15 + [towards(0.0, 1)] * 8 + [towards(0.2, 1)] * 25
    sink = Sink()
    session = TeleopSession(
        world=world,
        device=Played([order(Ask.START), *grasp, order(Ask.KEEP)]),
        steering=steering,
        gate=gate_of(world),
        sink=sink,
        clock=VirtualClock(),
        countdown=0.0,
    )
    session.run()
    world.close()
    (rows,) = sink.episodes
    assert max(row["reward"] for row in rows) == 1.0
    assert session.refused == 0
    assert rows[-1]["action"].shape == (7,)
    assert {"states", "object", "robot0_eef_pos"} <= set(rows[0])


# Robots, which do not wait

LIMITS = {"low": [-2.0, -2.0, 0.0], "high": [2.0, 2.0, 1.0], "max_step": [0.25] * 3}
LIMITS |= {"velocity": [2.0] * 3, "acceleration": [10.0] * 3, "jerk": [200.0] * 3}


@pytest.fixture
def robot() -> Iterator[ProcessRobot]:
    """An arm without motors, of two joints and a gripper, in a process of its own."""
    setup = ArmSetup(driver="ideal", settings={"n_joints": 2}, limits=LIMITS)
    one = ProcessRobot(segments=Segments(), arm=setup, cameras={}, control_rate=20.0, max_steps=100)
    yield one
    one.close()


@pytest.mark.slow
def test_an_arm_in_real_time_through_all_gates(robot):
    """Two joints and a gripper; where nobody drives the arm holds, and nothing is recorded."""
    world = RobotWorld(robot, ["joints", "gripper"], {})
    assert world.groups is not None
    nobody = Signals(engaged=False, why="hold the right bumper to drive")
    turning = [twist(forward=1.0, left=-1.0)] * 10
    signals = [
        order(Ask.START),
        *turning,
        *[nobody] * 4,
        STILL._replace(toggle=True),
        *turning,
        order(Ask.KEEP),
    ]
    sink = Sink()
    session = TeleopSession(
        world=world,
        device=Played(signals),
        steering=steering_of(world.groups, world.limits, 20.0, SPEEDS, arm_limits=robot.arm.limits),
        gate=gate_of(world),
        sink=sink,
        clock=MonotonicClock(),
        countdown=0.0,
    )
    session.run()
    (rows,) = sink.episodes
    actions = np.array([row["action"] for row in rows])
    assert len(actions) == 21
    np.testing.assert_allclose(actions[0], 0.0, atol=1e-6)  # where it is; each further one for its own tick
    np.testing.assert_allclose(actions[9], [0.225, -0.225, 0.0], atol=0.03)
    assert actions[-1][2] == 1.0
    for row in rows[5:10]:
        assert abs(row["joints"][0] - row["action"][0]) < 0.06
    assert {"joints", "gripper", "action"} == set(rows[0])
    assert robot.events() == []


@pytest.mark.slow
def test_taking_over_from_a_policy_with_a_device(robot):
    robot.begin(0)
    limits = robot.arm.limits
    steering = steering_of(robot.arm.command, limits, 20.0, SPEEDS, arm_limits=limits)
    nobody = Signals(engaged=False)
    taken = DeviceTeleoperator(Played([twist(forward=1.0)] * 2 + [nobody, twist(forward=1.0)]), steering, lambda: at)
    at = np.array([1.0, 0.0, 0.0])
    for expected in (1.025, 1.05, None, 0.525):
        command = taken.command(time.monotonic())
        if expected is None:
            assert command is None
            at = np.array([0.5, 0.0, 0.0])  # what happens while nobody drives does not come back
        else:
            np.testing.assert_allclose(command, [expected, 0, 0])
    taken.close()


@pytest.mark.slow
def test_bad_take_overs(robot):
    with pytest.raises(InputError, match="unknown device 'mouse' in teleop"):
        teleoperator(configuration.settings("deploy", ["teleop=mouse"]), robot, robot.arm.limits)
    without = configuration.settings("deploy", ["teleop=gamepad", "page=false"])
    with pytest.raises(InputError, match="teleop=gamepad waits for somebody at the page"):
        Subscribers(without, robot, None, limits=robot.arm.limits, output_dir=Path())
