"""A Panda in real time: what it shows is what its task's own simulator shows, and it goes where it is told to."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from action_diffusion.cli import main
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.deploy.collect.expert import PACE, action_of, goal, within, wrong_beliefs
from action_diffusion.deploy.hardware.command import CommandLayout
from action_diffusion.deploy.ipc.channels import Phase
from action_diffusion.deploy.ipc.rings import RingReader, shared_folder
from action_diffusion.deploy.loop.clock import MonotonicClock, Pacer
from action_diffusion.deploy.robot.process_robot import ProcessRobot
from action_diffusion.deploy.robot.robots import RobotTask, in_processes
from action_diffusion.deploy.sim.panda import LIMITS, PandaArm, check_task
from action_diffusion.envs.robosuite.expert import lift as lift_expert
from action_diffusion.envs.robosuite.tasks import Manipulation
from action_diffusion.errors import InputError
from action_diffusion.options import configuration
from action_diffusion.rotations import axis_angle_to_6d
from benchmarks.scores import sim_arm

CAMERAS = ("agentview_image", "robot0_eye_in_hand_image")
STATES = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "robot0_joint_pos", "object")
LAYOUT = CommandLayout(PandaArm.command)


def panda(*keys: str, **env: Any) -> ProcessRobot:
    task = RobotTask(env={"name": "lift", "absolute": True, **env}, cameras=keys)
    return in_processes("sim_arm", task, configuration.settings("deploy", []))


@pytest.fixture(scope="module")
def robot() -> Iterator[ProcessRobot]:
    made = panda(*CAMERAS)
    yield made
    folder = made.folder
    made.close()
    assert not folder.exists()


@pytest.fixture(scope="module")
def lift() -> Iterator[Manipulation]:
    env = Manipulation(task="lift")
    yield env
    env.close()


def hand(robot: ProcessRobot) -> np.ndarray:
    """Its pose [6]."""
    values = robot.observe(["position", "rotation"], time.monotonic()).values
    return np.concatenate([values["position"], values["rotation"]]).astype(np.float64)


def drive(robot: ProcessRobot, command: np.ndarray, n: int) -> None:
    """`n` control steps of one command."""
    pacer = Pacer(clock=MonotonicClock(), rate=robot.control_rate)
    for _ in range(n):
        robot.command([command], pacer.wait()[0])


# Before `robot` is there, whose cameras keep a core busy.


@pytest.mark.slow
@pytest.mark.alone
def test_recorded_trained_deployed_and_evaluated(tmp_path, capsys, monkeypatch):
    """The benchmark's small form: a demonstration, two optimiser steps, one short episode each way."""
    felt = ["task.observations.agentview_depth={kind: depth}", "task.observations.robot0_wrench={}"]
    small = {"train": ["train.batch_size=4", "policy.encoder.width=0.25", "policy.denoiser.channels=[16,32]"]}
    small = {"train": [*small["train"], "dataset.val_windows=4", *felt], "collect": felt}
    monkeypatch.setattr(sim_arm, "action_diffusion", lambda words: main([*words, *small.get(words[0], [])]))
    words = ["episodes=1", "steps=2", "n_episodes=1", "max_steps=10", "sampling=2", f"output_dir={tmp_path}"]
    assert sim_arm.main(words) == 0
    said = capsys.readouterr().out
    assert "deadline misses: " in said
    assert "stood still for" in said
    buffer = ReplayBuffer.open(tmp_path / "demos.zarr")
    assert buffer.n_episodes == 1
    episode = buffer.episode(0)
    assert episode["reward"][-1] == 1.0
    assert (episode["reward"][:-1] == 0).all()
    assert episode["action"].shape[1:] == (10,)
    assert episode["agentview_image"].shape[1:] == (84, 84, 3)
    assert (episode["agentview_depth"].shape[1:], episode["agentview_depth"].dtype) == ((84, 84), np.uint16)
    assert episode["robot0_wrench"].shape[1:] == (6,)
    # The hand follows what it was told to, a little later.
    lag = episode["action"][:-4, :3] - episode["robot0_eef_pos"][4:]
    assert np.abs(lag).max() < 0.06
    steps = np.diff(episode["action"][:, :3], axis=0)
    assert np.abs(steps).max() <= PACE * LIMITS.velocity[0] / 20 + 1e-6
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["deploy"]["latency"]["steps"] == 10
    record = ReplayBuffer.open(tmp_path / "deploy" / "record.zarr")
    assert record["action"].shape == (10, 10)
    depth = record["agentview_depth"]
    assert (depth.shape, depth.dtype) == ((10, 84, 84), np.uint16)
    assert 500 < np.median(depth[:]) < 2000  # mm, from a camera that stands 0.7 m from the table's middle
    assert set(results["deploy"]["cores"]) >= {"policy", "simulator", "arm", "camera agentview_image"}
    assert sim_arm.main(words) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.slow
def test_without_the_arms_process_the_simulator_holds_the_arm():
    robot = panda()
    try:
        robot.begin(100000)
        there = np.append(hand(robot) + np.array([0.1, 0.1, 0.0, 0, 0, 0]), 0.0)
        drive(robot, there, 4)
        robot.arm.child.process.kill()
        robot.arm.child.process.wait()
        assert robot.hold()[1]
        assert robot.arm.phase is Phase.BROKEN
        time.sleep(0.8)
        world = RingReader(robot.folder / "world")
        held = world.latest().values["position"]
        time.sleep(0.2)
        np.testing.assert_allclose(world.latest().values["position"], held, atol=2e-3)
        assert np.abs(held - there[:3]).max() > 0.02
    finally:
        robot.close()


# One arm for all.


@pytest.mark.slow
@pytest.mark.parametrize("seed", [100000, 100003])
def test_a_start_looks_as_it_does_where_policies_are_evaluated(robot, lift, seed):
    """States and pictures, of objects of another size in each, also after an episode elsewhere."""
    lift.reset(seed)
    expected = lift.observe([*STATES, *CAMERAS])  # before, since it keeps this process busy
    robot.begin(seed)
    seen = robot.observe([*STATES, *CAMERAS], time.monotonic())
    for key in STATES:
        np.testing.assert_allclose(seen.values[key], expected[key], atol=2e-3, err_msg=key)
    for key in CAMERAS:
        off = np.abs(seen.values[key].astype(int) - expected[key])
        assert off.mean() < 0.2, key
    assert np.abs(hand(robot)[:3] - expected["robot0_eef_pos"]).max() < 2e-3
    assert robot.hold() == (0.0, False)
    drive(robot, np.append(hand(robot) + np.array([0.05, 0.0, -0.03, 0, 0, 0]), 1.0), 5)
    robot.stop()
    assert robot.events() == []


@pytest.mark.slow
def test_it_goes_where_it_is_told_to_in_either_form_of_a_rotation(robot):
    robot.begin(100001)
    start = hand(robot)
    turned = Rotation.from_euler("z", 0.2) * Rotation.from_rotvec(start[3:])
    there = np.concatenate([start[:3] + np.array([0.04, -0.05, 0.05]), turned.as_rotvec()])
    drive(robot, np.concatenate([there[:3], axis_angle_to_6d(there[3:]), [-1.0]]), 30)
    assert np.abs(hand(robot)[:3] - there[:3]).max() < 0.015
    off = turned.inv() * Rotation.from_rotvec(hand(robot)[3:])
    assert off.magnitude() < 0.06
    seen = robot.observe(["robot0_gripper_qpos", "gripper"], time.monotonic()).values
    assert seen["gripper"] == -1
    assert seen["robot0_gripper_qpos"] @ [1, -1] > 0.07  # open
    drive(robot, np.append(there, 1.0), 15)
    assert robot.observe(["robot0_gripper_qpos"], time.monotonic()).values["robot0_gripper_qpos"] @ [1, -1] < 0.01
    robot.stop()
    assert robot.events() == []


@pytest.mark.slow
def test_what_is_no_pose_is_refused_and_the_arm_holds(robot):
    robot.begin(100001)
    present = hand(robot)
    flat = np.concatenate([present[:3], np.zeros(6), [0.0]])
    assert robot.command([flat], time.monotonic()) == (0.0, False)
    below = np.append(present, 0.0)
    below[2] = 0.5
    robot.command([below], time.monotonic())
    time.sleep(0.1)
    first, second = robot.events()
    assert first.startswith("refused: rotation [0] of [1]: its axes are zero")
    assert second.startswith("refused: waypoint[2] = 0.5 is outside [0.79, 1.5]")
    np.testing.assert_allclose(hand(robot), present, atol=5e-3)
    robot.stop()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "keys", "words"),
    [
        ({"name": "transport"}, (), "robot=sim_arm does lift, can, square; this is transport"),
        ({"absolute": False}, (), "takes absolute poses: train with task.env.absolute=true"),
        ({}, ("front_image",), "unknown camera 'front_image' in robot=sim_arm on lift: did you mean frontview_image"),
    ],
)
def test_what_it_cannot_do_is_said(env, keys, words):
    before = set(shared_folder().glob(f"action-diffusion-{os.getpid()}-*"))
    with pytest.raises(InputError, match=words):
        panda(*keys, **env)
    assert set(shared_folder().glob(f"action-diffusion-{os.getpid()}-*")) == before


def test_a_task_without_a_simulator_is_none_of_its():
    with pytest.raises(InputError, match="this is no simulated task"):
        check_task(None, absolute=True)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1.5, 1.5), min_size=3, max_size=3), st.integers(1, 4))
def test_6d_actions_become_the_commands_that_they_mean(turn, n):
    commands = np.tile([0.1, 0.2, 1.0, *turn, -1.0], (n, 1))
    wide = np.concatenate([commands[:, :3], axis_angle_to_6d(commands[:, 3:6]), commands[:, 6:]], axis=1)
    np.testing.assert_allclose(LAYOUT.from_actions(wide), commands, atol=1e-7)
    np.testing.assert_allclose(LAYOUT.to_actions(commands, 10), wide, atol=1e-12)
    np.testing.assert_array_equal(LAYOUT.from_actions(commands), commands)
    np.testing.assert_array_equal(LAYOUT.to_actions(commands, 7), commands)
    assert LAYOUT.groups_of(10) == [("position", 3, "m"), ("rotation", 6, "6D"), ("gripper", 1, "")]
    with pytest.raises(InputError, match="an action of 8 values is no command: the arm takes 7, or 10 with 6D"):
        LAYOUT.from_actions(wide[:, :8])


@pytest.mark.slow
def test_the_limits_are_complete_and_hold_every_start(lift):
    LAYOUT.check_limits(LIMITS)
    for seed in range(2):
        lift.reset(seed)
        at = LAYOUT.to_coordinates(np.append(lift.hands()[0], 0.0))
        assert ((LIMITS.low < at) & (at < LIMITS.high)).all()


# The expert, in real time.


@pytest.mark.slow
def test_what_the_expert_asks_for_is_what_the_controller_would_do(lift):
    """The pose that a relative action means, but within the arm's limits on the way."""
    lift.reset(100002)
    action = np.array([0.4, -0.2, 0.3, 0.1, -0.3, 0.2, 1.0])
    present = lift.hands()[0]
    wanted = goal(present, action)
    np.testing.assert_allclose(action_of(wanted), lift.absolute_action(action), atol=1e-6)
    before = np.append(present, -1.0)
    for _ in range(20):
        following = within(before, wanted, LAYOUT, LIMITS, 20.0)
        step = np.abs(LAYOUT.to_coordinates(following) - LAYOUT.to_coordinates(before))[:6]
        assert (step <= PACE * LIMITS.velocity[:6] / 20 + 1e-9).all()
        assert following[6] == 1.0
        before = following
    np.testing.assert_allclose(before[:3], wanted[:3], atol=1e-9)
    assert (Rotation.from_rotvec(before[3:6]).inv() * Rotation.from_rotvec(wanted[3:6])).magnitude() < 1e-6


def test_many_episodes_begin_where_the_expert_went_wrong():
    begun = [wrong_beliefs(lift_expert(seed=0), np.random.default_rng(seed)) for seed in range(300)]
    share = np.mean([len(errors) > 0 for errors in begun])
    assert 0.6 < share < 0.8
    assert all(len(errors) < 60 for errors in begun)
    assert all(errors[-1] is not None for errors in begun if errors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("robot=ur", "unknown robot of agent=expert 'ur'"),
        ("task=pusht_state", "robot=sim_arm does lift, can, square; this is pusht"),
        ("visited_by=a", "no bundle at a"),
        ("episodes=0", "episodes=0 must be at least 1"),
        ("output=a.zarr.zip", "output=a.zarr.zip exists, or is no folder"),
    ],
)
def test_a_recording_that_cannot_be_is_refused_at_once(word, message, capsys):
    assert main(["collect", "task=lift_image", "robot=sim_arm", "output=new.zarr", word]) == 2
    assert message in capsys.readouterr().err
