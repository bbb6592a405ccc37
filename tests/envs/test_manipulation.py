"""The manipulation tasks: the same episode whoever looks at it, and the one that a file recorded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

pytest.importorskip("robosuite", reason="robosuite is not installed: pip install 'action-diffusion[robomimic]'")

import mujoco

from action_diffusion.envs import recorded
from action_diffusion.envs.robosuite import headless
from action_diffusion.envs.robosuite.tasks import Manipulation
from action_diffusion.errors import InputError

SIZES = {"lift": 10, "can": 14, "square": 14, "transport": 41, "tool_hang": 44}
HAND = ("object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
SMALL = {"camera_heights": 24, "camera_widths": 24}
OSC_1_4 = {"type": "OSC_POSE", "control_delta": True, "kp": 150, "damping_ratio": 1}


@pytest.fixture(scope="module")
def pictures() -> None:
    try:
        headless.choose()
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def lift() -> Manipulation:
    return Manipulation(task="lift")


@pytest.fixture(scope="module")
def can() -> Manipulation:
    return Manipulation(task="can")


def smooth_actions(env: Manipulation, length: int, seed: int = 0) -> np.ndarray:
    """Relative actions [length, A] that wander about, grippers opening and closing."""
    random = np.random.default_rng(seed)
    phases, rates = random.uniform(0, 6, env.action_shape), random.uniform(0.1, 0.4, env.action_shape)
    return 0.5 * np.sin(phases + rates * np.arange(length)[:, None])


def play(env: Manipulation, actions: np.ndarray) -> np.ndarray:
    """States [T + 1, S] on the way."""
    states = [env.state()]
    for action in actions:
        env.step(action)
        states.append(env.state())
    return np.stack(states)


def cube_size(env: Manipulation) -> np.ndarray:
    model = env._sim.sim.model
    return model.geom_size[model.geom_name2id("cube_g0")].copy()


# The five tasks.


@pytest.mark.slow
@pytest.mark.parametrize("task", recorded.TASKS)
def test_a_task_runs_and_is_seen(task, pictures):
    env = Manipulation(
        task=task, env_args={"env_name": recorded.TASKS[task].env_name, "env_kwargs": SMALL}, max_steps=2
    )
    env.reset(0)
    rewards, dones = zip(*(env.step(action) for action in smooth_actions(env, 2)), strict=True)
    assert (rewards, dones) == ((0.0, 0.0), (False, True))
    seen = env.observe(["robot0_eye_in_hand_image", *HAND])
    assert [value.shape for value in seen.values()] == [(24, 24, 3), (SIZES[task],), (3,), (4,), (2,)]
    image = seen["robot0_eye_in_hand_image"]
    assert image.dtype == np.uint8
    assert image.std() > 10
    assert {value.dtype for key, value in seen.items() if key in HAND} == {np.dtype(np.float32)}
    picture = env.render(40)
    assert picture.shape == (40, 40, 3)
    assert picture.std() > 10
    assert env.control_rate == 20
    env.close()


@pytest.mark.slow
def test_the_image_is_upright(lift, pictures):
    lift.reset(0)
    picture = lift.render(48).astype(int)
    red = (picture[..., 0] - picture[..., 1:].max(axis=-1)) > 40
    rows, _ = np.nonzero(red)
    assert 20 < rows.mean() < 32  # the cube lies in the middle of the table
    assert picture[40:].mean() > picture[:8].mean() + 40  # the white table below, the dark robot above


@pytest.mark.slow
def test_depth_is_what_a_ray_finds_to_a_millimetre(lift, pictures):
    """Along the camera's axis, not along the ray."""
    lift.reset(0)
    depth = lift.observe(["agentview_depth"])["agentview_depth"]
    model, data = lift.compiled, lift._sim.sim.data._data
    camera, size, seen = model.camera("agentview").id, len(depth), np.array([0, 1, 1, 1, 1, 1], np.uint8)
    assert depth.dtype == np.uint16
    for row, column in ((size // 2, size // 2), (10, 20), (size - 5, 10), (60, 60)):
        across, down = (np.array([column, row]) + 0.5 - size / 2) * 2 / size
        slope = np.tan(np.radians(model.cam_fovy[camera]) / 2)
        ray = np.array([across * slope, -down * slope, -1.0])
        turned = data.cam_xmat[camera].reshape(3, 3) @ ray  # of length 1 along the axis
        found = mujoco.mj_ray(model, data, data.cam_xpos[camera], turned, seen, 1, -1, np.zeros(1, np.int32))
        assert depth[row, column] == pytest.approx(1000 * found, abs=1)


@pytest.mark.slow
def test_simulators_draw_in_turn(lift, can, pictures):
    for env in (lift, can):
        env.reset(1)
    alone = [lift.render(32), can.render(32)]
    for _ in range(2):
        np.testing.assert_array_equal(lift.render(32), alone[0])
        np.testing.assert_array_equal(can.render(32), alone[1])
    assert lift.render(64).shape == (64, 64, 3)
    np.testing.assert_array_equal(lift.render(32), alone[0])


# One seed, one episode.


@pytest.mark.slow
def test_the_seed_decides_the_start(lift):
    outside = np.random.get_state(legacy=False)["state"]["key"].copy()
    starts = []
    for seed in (3, 4, 3):
        lift.reset(seed)
        starts.append(np.append(lift.state(), cube_size(lift)))
    np.testing.assert_array_equal(starts[0], starts[2])
    assert (starts[0][-3:] != starts[1][-3:]).all()
    np.testing.assert_array_equal(np.random.get_state(legacy=False)["state"]["key"], outside)


@pytest.mark.slow
def test_looking_changes_nothing(lift, pictures):
    actions = smooth_actions(lift, 12)
    lift.reset(0)
    expected = play(lift, actions)
    lift.reset(0)
    for state, action in zip(expected, actions, strict=False):
        np.testing.assert_array_equal(lift.state(), state)
        lift.observe(["object", "agentview_image"])
        lift.step(action)
    np.testing.assert_array_equal(lift.state(), expected[-1])


@pytest.mark.slow
def test_what_is_seen_belongs_to_the_state(can):
    can.reset(0)
    play(can, smooth_actions(can, 5))
    seen, state = can.observe(HAND), can.state()
    can.reset(1)
    can.restore(state)
    for key, value in can.observe(HAND).items():
        np.testing.assert_allclose(value, seen[key], atol=1e-6)
    hand = Rotation.from_quat(seen["robot0_eef_quat"])
    position, quaternion, relative, turned = np.split(seen["object"], [3, 7, 10])
    np.testing.assert_allclose(relative, hand.inv().apply(position - seen["robot0_eef_pos"]), atol=1e-5)
    assert (hand.inv() * Rotation.from_quat(quaternion) * Rotation.from_quat(turned).inv()).magnitude() < 1e-3


@pytest.mark.slow
def test_recorded_states_and_actions_replay_to_the_last_bit(lift):
    actions = smooth_actions(lift, 15)
    lift.reset(2)
    model, expected = lift.model(), play(lift, actions)
    lift.reset(5)
    lift.restore(expected[0], model)
    np.testing.assert_array_equal(play(lift, actions), expected)
    assert lift.model() == model


# Absolute actions.


@pytest.mark.slow
@pytest.mark.parametrize("configs", [None, OSC_1_4], ids=["base frame", "world frame"])
def test_absolute_actions_do_the_same_for_two_arms(configs):
    env_args = {"env_name": "TwoArmTransport", "env_version": "1.5.1", "env_kwargs": {"controller_configs": configs}}
    relative = Manipulation(env_args=env_args)
    actions, states, goals = smooth_actions(relative, 12), [], []
    relative.reset(0)
    for action in actions:
        goals.append(relative.absolute_action(action))
        relative.step(action)
        states.append(relative.state())
    absolute = Manipulation(env_args=relative.env_args, absolute=True)
    absolute.reset(0)
    assert absolute.action_shape == goals[0].shape == (20,)
    np.testing.assert_allclose(play(absolute, np.array(goals))[1:], states, atol=1e-5)
    with pytest.raises(InputError, match="is not controlled by relative actions of OSC_POSE"):
        absolute.absolute_action(actions[0])


# Metadata.


@pytest.mark.slow
def test_metadata_makes_the_same_simulator(lift):
    metadata = json.loads(json.dumps(lift.env_args))
    again = Manipulation(env_args=metadata)
    assert again.env_args == lift.env_args
    assert (metadata["env_name"], metadata["type"], metadata["object_layout"]) == ("Lift", 1, "1.4")
    assert metadata["render"] == {"reflections": False, "samples": 0}
    for env in (lift, again):
        env.reset(7)
    actions = smooth_actions(lift, 3)
    np.testing.assert_array_equal(play(again, actions), play(lift, actions))


def test_files_without_settings_of_ours_are_as_robosuite_wrote_them():
    old = recorded.complete(recorded.TASKS["can"], {"env_name": "PickPlaceCan", "env_version": "1.2.0"})
    assert (old["object_layout"], old["env_kwargs"]["lite_physics"]) == ("1.4", False)
    assert old["render"] == {"reflections": True, "samples": 4}
    new = recorded.complete(recorded.TASKS["can"], {"env_name": "PickPlaceCan", "env_version": "1.5.1"})
    assert (new["object_layout"], new["env_kwargs"]["lite_physics"]) == ("1.5", True)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["lift", "can", "transport"])
def test_the_object_is_laid_out_as_in_the_version_that_recorded_it(task):
    name = recorded.TASKS[task].env_name
    old, new = (Manipulation(env_args={"env_name": name, "env_version": version}) for version in ("1.4.1", "1.5.1"))
    for env in (old, new):
        env.reset(0)
    native = new._sim._get_observations(force_update=True)
    np.testing.assert_allclose(new.observe(["object"])["object"], native["object-state"], atol=1e-6)
    parts = [np.atleast_1d(native[part]) for part in recorded.OBJECT_PARTS[name]]
    if task == "lift":
        parts[-1] = -parts[-1]  # in 1.4 from the cube to the hand
    np.testing.assert_allclose(old.observe(["object"])["object"], np.concatenate(parts), atol=1e-6)


@pytest.mark.slow
def test_in_1_5_the_object_s_relative_pose_lags_a_step():
    env = Manipulation(env_args={"env_name": "PickPlaceCan", "env_version": "1.5.1"})
    env.reset(0)  # the can falls onto its bin
    before = env.observe(["object"])["object"][7:10].astype(float)
    env.step(np.zeros(7))
    seen = env.observe(HAND)
    hand = Rotation.from_quat(seen["robot0_eef_quat"])
    np.testing.assert_allclose(seen["object"][:3], hand.inv().apply(before - seen["robot0_eef_pos"]), atol=1e-5)
    assert abs(seen["object"][7:10] - before).max() > 1e-4


@pytest.mark.slow
def test_the_model_of_a_demo_gives_the_sizes(lift):
    model = '<mujoco><worldbody><geom name="table_collision" size="9 9 9"/><body name="cube_main"><joint type="free"/>'
    model += '<geom name="cube_g0" type="box" size="0.03 0.02 0.01"/></body></worldbody></mujoco>'
    lift.reset(0)
    state = lift.state()
    lift.restore(state, model)
    np.testing.assert_allclose(cube_size(lift), [0.03, 0.02, 0.01])
    assert lift._sim.sim.model.geom_size.max() < 9
    np.testing.assert_array_equal(lift.state(), state)
    lift.reset(0)
    assert cube_size(lift).max() < 0.023
    with pytest.raises(InputError, match="the recorded model has cube_g7, which Lift does not have"):
        lift.restore(state, model.replace("cube_g0", "cube_g7"))
    with pytest.raises(InputError, match="the recorded model of Lift is no MJCF"):
        lift.restore(state, "<mujoco>")


@pytest.mark.slow
def test_people_s_demonstrations_from_1_4_are_where_they_were():
    folder = os.environ.get("ACTION_DIFFUSION_DATA")
    if not folder:
        pytest.skip("ACTION_DIFFUSION_DATA is not set: no demonstrations by people")
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    with h5py.File(Path(folder) / "robosuite_lift_human.hdf5") as file:
        demo, data = file["data/demo_1"], file["data"].attrs
        states, model = demo["states"][:], demo.attrs["model_file"]
        env_args = {"env_name": "Lift", "env_version": "1.4.0", "env_kwargs": json.loads(data["env_info"])}
    env = Manipulation(env_args=env_args)
    env.restore(states[0], model)
    assert cube_size(env)[0] == 0.021066
    start = env.observe(HAND)
    env.restore(states[-1])
    end = env.observe(HAND)
    assert start["object"][2] < 0.835
    assert end["object"][2] > 0.85  # lifted
    assert np.linalg.norm(end["object"][7:]) < 0.02  # in the hand
    assert env.step(np.append(np.zeros(6), 1))[0] == 1.0


# What is wrong is named.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "lifd"}, "unknown manipulation task 'lifd': did you mean lift"),
        ({}, "name a task"),
        ({"env_args": {"env_name": "Lifd"}}, "unknown environment 'Lifd' in env_args: did you mean Lift"),
        (
            {"task": "can", "env_args": {"env_name": "Lift"}},
            "task can is PickPlaceCan, but .* recorded in Lift",
        ),
        (
            {"env_args": {"env_name": "Lift", "env_kwargs": {"controller_configs": {"type": "OSC_POS"}}}},
            "unknown controller 'OSC_POS' in env_args: did you mean OSC_POSE",
        ),
        (
            {"env_args": {"env_name": "Lift", "env_kwargs": {"table_frictoin": 1}}},
            "unknown setting of Lift 'table_frictoin' in env_args: did you mean table_friction",
        ),
        (
            {"env_args": {"env_name": "Lift", "env_kwargs": {"camera_heights": [84, 96]}}},
            "camera_heights and camera_widths must be one number",
        ),
    ],
)
def test_metadata_that_fits_nothing_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Manipulation(**arguments)


def test_wrong_input_is_refused(lift):
    lift.reset(0)
    for seed in (-1, 2**32):
        with pytest.raises(InputError, match="Lift seeds run from 0"):
            lift.reset(seed)
    for action in (np.zeros(6), np.full(7, np.nan)):
        with pytest.raises(InputError, match="an action of Lift is 7 finite numbers"):
            lift.step(action)
    with pytest.raises(InputError, match="a state of Lift has 32 values, got \\[31\\]"):
        lift.restore(np.zeros(31))
    with pytest.raises(InputError, match="unknown observation of Lift 'agentview_imag': did you mean agentview_image"):
        lift.observe(["agentview_imag"])


@pytest.mark.slow
def test_without_opengl_only_images_fail(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(headless, "_works", lambda backend: False)
    monkeypatch.setattr(headless, "_contexts", {})
    env = Manipulation(task="lift")
    env.reset(0)
    assert env.observe(["object"])["object"].shape == (10,)
    with pytest.raises(InputError, match="neither EGL nor OSMesa works here: apt-get install libegl1"):
        env.observe(["agentview_image"])
    assert "MUJOCO_GL" not in os.environ


@pytest.mark.parametrize("working", headless.BACKENDS)
def test_the_first_that_works_is_chosen(monkeypatch, working):
    monkeypatch.setattr(headless, "_works", lambda backend: backend == working)
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    headless.choose()
    assert os.environ["MUJOCO_GL"] == "glfw"
    monkeypatch.delenv("MUJOCO_GL")
    headless.choose()
    assert os.environ["MUJOCO_GL"] == working


def test_a_backend_that_breaks_does_not_work():
    assert not headless._works("no_such_backend")


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
def test_points_are_where_things_are_wherever_the_camera_stands() -> None:
    args = recorded.complete(recorded.TASKS["lift"], {"env_name": "Lift", "env_version": "1.5.1", "env_kwargs": {}})
    points, pictures = {}, {}
    for degrees in (0.0, 10.0):
        env = Manipulation(env_args=args, points={"n": 256}, turned={"agentview": degrees})
        env.reset(5)
        found = env.observe(["points", "object", "agentview_image", "agentview_depth"])
        cube, half = found["object"][:3], cube_size(env)[:3]
        red = found["points"][(found["points"][:, 3] > 0.4) & (found["points"][:, 4] < 0.25), :3]
        assert len(red) >= 5
        assert red[:, 2].max() == pytest.approx(cube[2] + half[2], abs=0.002)
        assert (np.linalg.norm(red[:, :2] - cube[:2], axis=1) < 1.5 * half[0]).all()
        assert 300 < found["agentview_depth"].min() < 1000
        points[degrees], pictures[degrees] = found["points"], found["agentview_image"]
        env.close()
    assert not np.array_equal(pictures[0.0], pictures[10.0])
    with pytest.raises(InputError, match="robot0_eye_in_hand is fixed to a part that moves"):
        Manipulation(env_args=args, turned={"robot0_eye_in_hand": 10.0})
    with pytest.raises(InputError, match="unknown camera of Lift 'front'"):
        Manipulation(env_args=args, turned={"front": 10.0})
