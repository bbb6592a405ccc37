"""Drivers of real arms and cameras, on stand-ins: what they tell the robot, how they stop, and what they refuse."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import cv2
import numpy as np
import pytest
import vendors

from action_diffusion.deploy.drivers import vendor
from action_diffusion.deploy.drivers.franka import MODELS, FrankaArm
from action_diffusion.deploy.drivers.images import fitted, image_shape
from action_diffusion.deploy.drivers.lerobot import LeRobotArm
from action_diffusion.deploy.drivers.realsense import RealSenseCamera
from action_diffusion.deploy.drivers.ur import UrArm
from action_diffusion.deploy.drivers.usb import UsbCamera
from action_diffusion.deploy.hardware.command import CommandLayout
from action_diffusion.deploy.hardware.protocols import check_arm, make_arm, make_camera
from action_diffusion.errors import InputError
from action_diffusion.registry import ARMS, CAMERAS

UR: dict[str, Any] = {"host": "10.0.0.2", "model": "ur5e"}
FRANKA: dict[str, Any] = {"host": "10.0.0.3", "model": "fer"}
KOCH: dict[str, Any] = {
    "type": "koch_follower",
    "config": {"port": "/dev/ttyACM0", "calibration_dir": "cal"},
    "motors": ["shoulder_pan", "gripper"],
}


@pytest.fixture
def ur(monkeypatch):
    return vendors.install(monkeypatch, vendors.UR)


@pytest.fixture
def franka(monkeypatch):
    return vendors.install(monkeypatch, vendors.FRANKA)


@pytest.fixture
def realsense(monkeypatch):
    world = vendors.install(monkeypatch, vendors.REALSENSE)
    world.stamp = 5.0
    return world


@pytest.fixture
def usb(monkeypatch):
    world = vendors.install(monkeypatch, {})
    monkeypatch.setattr(cv2, "VideoCapture", vendors.VideoCapture)
    world.stamp = time.monotonic()
    return world


@pytest.fixture
def koch(monkeypatch, tmp_path):
    return vendors.install_lerobot(monkeypatch, tmp_path)


# UR


def test_ur_arms_its_watchdog_before_anything_else_and_then_servos(ur):
    arm = UrArm(**UR, rate=125, watchdog_time=0.08)
    check_arm(arm)
    arm.connect()
    assert not {"setWatchdog", "servoJ"} & set(ur.names())  # a watchdog that is set has to be fed at once
    state = arm.read()
    assert state.values["joints"].tolist() == [0.1, -1.2, 1.3, -1.4, -1.5, 0.6]
    assert {group.name: group.size for group in arm.state} == {k: len(v) for k, v in state.values.items()}
    arm.send(state.values["joints"])
    assert ur.told[-2] == ("setWatchdog", (12.5,))
    assert ur.told[-1] == ("servoJ", ([0.1, -1.2, 1.3, -1.4, -1.5, 0.6], 0.0, 0.0, 0.008, 0.1, 300.0))
    arm.stop()
    arm.close()
    assert ur.names()[-4:] == ["servoStop", "stopScript", "control.disconnect", "receive.disconnect"]


def test_ur_takes_poses_and_a_gripper(ur):
    arm = UrArm(**UR, space="pose", tool_output=1)
    assert [group.name for group in arm.command] == ["position", "rotation", "gripper"]
    assert arm.limits is None
    arm.connect()
    pose = np.array([0.4, 0.1, 0.3, 3.1, 0.1, 0.0, 0.0])
    assert ur.told[-6:][0][0] != "servoL"
    arm.send(pose)
    assert ur.names()[-1] == "servoL"
    arm.send(np.append(pose[:6], 0.9))
    arm.send(np.append(pose[:6], 0.8))
    assert [told for told in ur.told if told[0] == "setToolDigitalOut"] == [
        ("setToolDigitalOut", (1, False)),
        ("setToolDigitalOut", (1, True)),
    ]
    assert arm.read().values["gripper"].tolist() == [1.0]


def test_a_dry_run_of_ur_feeds_the_watchdog_and_moves_nothing(ur):
    arm = UrArm(**UR, tool_output=0, dry_run=True)
    arm.connect()
    arm.send(np.append(arm.read().values["joints"], 1.0))
    arm.stop()
    arm.close()
    assert "kickWatchdog" in ur.names()
    assert not {"servoJ", "servoL", "servoStop", "setToolDigitalOut"} & set(ur.names())


@pytest.mark.parametrize(
    ("answer", "value", "message"),
    [
        ("getRobotMode", 5, "robot mode 5"),
        ("isEmergencyStopped", True, "emergency stop"),
        ("isProtectiveStopped", True, "protective stop"),
        ("getActualQ", [float("nan")] * 6, "finite"),
        ("getActualQ", [], "6 finite numbers"),
    ],
)
def test_ur_refuses_to_start_and_lets_go(ur, answer, value, message):
    ur.answers[answer] = value
    with pytest.raises(InputError, match=rf"UR at 10\.0\.0\.2: .*{message}"):
        UrArm(**UR).connect()
    assert ur.names()[-1] == "receive.disconnect"


def test_ur_moves_under_a_watchdog_or_not_at_all(ur):
    ur.answers["setWatchdog"] = False
    arm = UrArm(**UR)
    arm.connect()
    for _ in range(2):
        with pytest.raises(ConnectionError, match="does not take the RTDE watchdog"):
            arm.send(arm.read().values["joints"])
    ur.answers["setWatchdog"] = True
    for _ in range(3):
        arm.send(arm.read().values["joints"])
    assert ur.names().count("setWatchdog") == 3
    assert ur.names().count("servoJ") == 3


def test_ur_does_not_go_on_without_a_program_a_state_or_in_time(ur, monkeypatch):
    arm = UrArm(**UR)
    arm.connect()
    monkeypatch.setattr("action_diffusion.deploy.drivers.ur.SILENCE", 0.0)
    time.sleep(0.001)
    with pytest.raises(TimeoutError, match="no state"):
        arm.read()
    ur.stamp += 0.002
    joints = arm.read().values["joints"]
    ur.answers["servoJ"] = False
    with pytest.raises(ConnectionError, match="program has ended"):
        arm.send(joints)
    del ur.answers["servoJ"]
    monkeypatch.setattr(vendors.RTDEControlInterface, "servoJ", lambda *_: time.sleep(0.12) or True)
    with pytest.raises(TimeoutError, match="to send"):  # a new connection has no watchdog
        arm.send(joints)


@pytest.mark.slow
def test_stopping_and_closing_never_raise_nor_hang(ur, monkeypatch):
    arm = UrArm(**UR)
    arm.stop()
    arm.close()
    arm.connect()
    hanging = threading.Event()
    monkeypatch.setattr(vendors.RTDEControlInterface, "servoStop", lambda *_: hanging.wait(30))
    ur.breaks["stopScript"] = ur.breaks["control.disconnect"] = RuntimeError("the cable is out")
    began = time.monotonic()
    arm.stop()
    arm.close()
    arm.close()
    assert time.monotonic() - began < 3
    hanging.set()


# Franka


def test_franka_holds_by_a_controller_and_says_where_it_is(franka):
    arm = FrankaArm(**FRANKA, hand=True)
    check_arm(arm)
    CommandLayout(arm.command).check_limits(arm.limits)
    arm.connect()
    assert franka.names().index("start_controller") > franka.names().index("robot_mode")
    values = arm.read().values
    assert {group.name: group.size for group in arm.state} == {name: len(value) for name, value in values.items()}
    assert values["position"].tolist() == [0.3, 0.1, 0.5]
    np.testing.assert_allclose(np.abs(values["rotation"]), [np.pi, 0, 0], atol=1e-9)
    arm.send(np.append(values["joints"], 0.02))
    arm.send(np.append(values["joints"], 0.021))  # less than it is worth moving for
    deadline = time.monotonic() + 2
    while "grasp" not in franka.names() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [told for told in franka.told if told[0] in ("grasp", "move")] == [("grasp", (0.02, 0.1, 20.0, 0.08, 0.08))]
    assert arm.read().values["gripper"].tolist() == [0.02]
    arm.stop()
    arm.close()
    assert "stop_controller" in franka.names()


def test_a_dry_run_of_franka_starts_no_controller(franka):
    franka.answers["is_moving"] = False
    arm = FrankaArm(**FRANKA, hand=True, dry_run=True)
    arm.connect()
    arm.send(np.append(arm.read().values["joints"], 0.0))
    arm.stop()
    arm.close()
    assert not {"start_controller", "set_control", "stop_controller", "grasp", "move"} & set(franka.names())


@pytest.mark.parametrize(
    ("answer", "value", "message"),
    [
        ("robot_mode", vendors.RobotMode.kUserStopped, "kUserStopped"),
        ("robot_mode", vendors.RobotMode.kReflex, "kReflex"),
        ("max_width", 0.0, "not homed"),
        ("get_joint_limits_upper", np.zeros(7), "is it another one"),
        ("q", [float("inf")] * 7, "finite"),
    ],
)
def test_franka_refuses_to_start_and_lets_go(franka, answer, value, message):
    franka.answers[answer] = value
    arm = FrankaArm(**FRANKA, hand=True)
    with pytest.raises(InputError, match=message):
        arm.connect()
    assert arm._panda is None


def test_franka_says_what_stopped_it(franka):
    arm = FrankaArm(**FRANKA, hand=True)
    arm.connect()
    franka.breaks["move"] = franka.breaks["grasp"] = RuntimeError("fingers are stuck")
    joints = arm.read().values["joints"]
    arm.send(np.append(joints, 0.0))
    time.sleep(0.1)
    with pytest.raises(ConnectionError, match="fingers are stuck"):
        arm.send(np.append(joints, 0.0))
    franka.answers["is_moving"] = False
    with pytest.raises(ConnectionError, match="no longer controlled"):
        arm.read()
    franka.breaks["raise_error"] = RuntimeError("communication_constraints_violation")
    with pytest.raises(RuntimeError, match="communication_constraints_violation"):
        arm.read()
    franka.breaks["stop_controller"] = RuntimeError("gone")
    arm.stop()
    arm.close()
    assert MODELS["fr3"]["low"] != MODELS["fer"]["low"]


# lerobot


def test_lerobots_arms_are_refused_unless_something_stops_them():
    with pytest.raises(InputError, match=r"hold their last goal.*bus_watchdog"):
        LeRobotArm(**KOCH)
    arm = LeRobotArm(**KOCH, watchdog="the operator, at the power switch")
    check_arm(arm)
    assert "operator" in arm.watchdog


def test_lerobot_sets_the_motors_watchdog_and_clears_it(koch):
    arm = LeRobotArm(**KOCH, bus_watchdog=0.1)
    arm.connect()
    assert ("connect", (False,)) in koch.told  # no questions about calibration in the arm's process
    assert [told for told in koch.told if told[0] == "bus.write"] == [
        ("bus.write", ("Bus_Watchdog", name, 0)) for name in KOCH["motors"]
    ]
    config = next(arguments[0] for name, arguments in koch.told if name == "Robot")
    assert config.disable_torque_on_disconnect is False
    assert str(config.calibration_dir) == "cal"
    assert not isinstance(config.calibration_dir, str)
    arm.send(np.array([12.0, 34.0]))
    assert koch.told[-3:-1] == [("bus.write", ("Bus_Watchdog", name, 5)) for name in KOCH["motors"]]
    assert koch.told[-1] == ("send_action", ({"shoulder_pan.pos": 12.0, "gripper.pos": 34.0},))
    arm.stop()
    assert koch.told[-1] == ("send_action", ({"shoulder_pan.pos": 12.0, "gripper.pos": 34.0},))  # the last setpoint
    arm.close()
    assert koch.told[-3:-1] == [("bus.write", ("Bus_Watchdog", name, 0)) for name in KOCH["motors"]]
    assert koch.names()[-1] == "disconnect"


def test_a_dry_run_of_lerobot_leaves_the_torque_alone(koch):
    arm = LeRobotArm(**KOCH, watchdog="a person", dry_run=True)
    arm.connect()
    arm.send(arm.read().values["joints"])
    arm.stop()
    arm.close()
    assert koch.told[-1] == ("bus.disconnect", (False,))
    assert not {"connect", "send_action", "bus.write"} & set(koch.names())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "koch_folower"}, "unknown robot 'koch_folower'.*did you mean koch_follower"),
        ({"config": {"port": "x", "prot": "y"}}, "unknown option 'prot'.*did you mean port"),
        ({"motors": ["shoulder_pan"]}, "are not those of its actions: shoulder_pan.pos, gripper.pos"),
    ],
)
def test_lerobot_refuses_what_it_does_not_know(koch, change, message):
    with pytest.raises(InputError, match=message):
        LeRobotArm(**{**KOCH, **change}, watchdog="a person").connect()


def test_lerobot_refuses_uncalibrated_arms_and_reads_no_nan(koch):
    arm = LeRobotArm(**KOCH, watchdog="a person")
    koch.answers["is_calibrated"] = False
    with pytest.raises(InputError, match="lerobot-calibrate"):
        arm.connect()
    assert koch.names()[-1] == "disconnect"
    koch.answers["is_calibrated"] = True
    arm.connect()
    koch.answers["get_observation"] = {"shoulder_pan.pos": float("nan"), "gripper.pos": 0.0}
    with pytest.raises(ArithmeticError, match="finite"):
        arm.read()
    koch.breaks["get_observation"] = koch.breaks["disconnect"] = ConnectionError("no status packet")
    arm.stop()
    arm.close()


# Cameras


def test_usb_frames_are_rgb_cut_to_size_and_stamped_by_the_kernel(usb, monkeypatch):
    monkeypatch.setattr("action_diffusion.deploy.drivers.usb.OLDEST", 60.0)  # this machine may be busy
    camera = UsbCamera(device="/dev/video0", image_size=[96, 96], rate=2.0)
    camera.connect()
    frame = camera.read()
    assert camera.shape == frame.image.shape == (96, 96, 3)
    assert frame.image[0, 0].tolist() == [200, 100, 50]
    assert frame.t == pytest.approx(usb.stamp, rel=0, abs=1e-9)  # it comes in ms
    usb.stamp = 1.7e9  # of the clock of the day
    before = time.monotonic()
    times = [camera.read().t for _ in range(5)]  # the first may have been grabbed before
    assert times == sorted(times)
    assert before <= times[-1] <= time.monotonic()
    camera.close()
    assert usb.names()[-1] == "release"


@pytest.mark.alone
def test_usb_waits_two_periods_and_says_when_the_camera_is_gone(usb, monkeypatch):
    camera = UsbCamera(device=0)
    go_on = threading.Event()
    monkeypatch.setattr(vendors.VideoCapture, "read", lambda _: (not go_on.wait(5), None))
    camera.connect()
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="no frame"):
        camera.read()
    assert time.monotonic() - began < 0.2
    go_on.set()
    with pytest.raises(InputError, match="sends no more"):
        camera.read()
    camera.close()


def test_usb_refuses_a_camera_that_is_not_there_or_does_otherwise(usb):
    usb.answers["get"] = 15.0
    with pytest.raises(InputError, match="does not do 640 x 480 at 30 Hz as MJPG"):
        UsbCamera(device=0).connect()
    assert usb.names()[-1] == "release"
    usb.answers["isOpened"] = False
    with pytest.raises(InputError, match="cannot be opened"):
        UsbCamera(device="/dev/video7").connect()


@pytest.mark.alone
def test_realsense_brings_each_clock_to_ours(realsense):
    camera = RealSenseCamera(serial="123", image_size=[240, 320], exposure=80)
    camera.connect()
    assert ("enable_device", ("123",)) in realsense.told
    assert ("set_option", (vendors.option.exposure, 80.0)) in realsense.told
    first = camera.read()
    assert first.image.shape == camera.shape == (240, 320, 3)
    assert first.image[0, 0].tolist() == [200, 100, 50]
    time.sleep(0.02)
    realsense.stamp += 0.005  # by the camera's clock 5 ms later, though it arrives after 20 ms
    assert camera.read().t == pytest.approx(first.t + 0.005, abs=1e-6)
    realsense.answers["get_frame_timestamp_domain"] = vendors.timestamp_domain.global_time
    realsense.stamp = time.time() - 0.004
    assert 0.003 < time.monotonic() - camera.read().t < 0.05
    camera.close()
    camera.close()
    assert realsense.names().count("pipeline.stop") == 1


def test_realsense_shows_depth_in_mm(realsense):
    camera = RealSenseCamera(stream="depth", image_size=[240, 320])
    camera.connect()
    image = camera.read().image
    assert (image.shape, image.dtype) == (camera.shape, np.uint16)
    assert camera.shape == (240, 320)
    assert (image == 2000).all()  # of 20 000 units of 0.1 mm
    realsense.answers["get_data"] = np.repeat(np.array([[0, 60_000]], np.uint16), 320, axis=1).repeat(480, axis=0)
    assert np.unique(camera.read().image).tolist() == [0, 6000]  # nothing between the two sides of an edge


def test_realsense_says_what_is_missing(realsense):
    for step in ("resolve", "start"):
        realsense.breaks[step] = RuntimeError("No device\nconnected")
        with pytest.raises(InputError, match="No device connected"):
            RealSenseCamera().connect()
        del realsense.breaks[step]
    camera = RealSenseCamera()
    camera.connect()
    realsense.answers["try_wait_for_frames"] = (False, None)
    with pytest.raises(TimeoutError):
        camera.read()


def test_pictures_keep_their_proportions():
    image = np.zeros((480, 640, 3), np.uint8)
    image[:, 80:560] = 255  # the middle square
    assert (fitted(cv2, image, (96, 96, 3)) == 255).all()
    assert fitted(cv2, image[:, ::-1], (480, 640, 3)).flags["C_CONTIGUOUS"]
    with pytest.raises(InputError, match="at most"):
        image_shape([960, 960], 480, 640)


# All of them


@pytest.mark.parametrize(
    ("arm", "module", "extra"),
    [
        (lambda: UrArm(**UR), "rtde_receive", "ur"),
        (lambda: FrankaArm(**FRANKA), "panda_py", "franka"),
        (lambda: LeRobotArm(**KOCH, watchdog="x"), "lerobot.robots", "lerobot"),
        (lambda: RealSenseCamera(), "pyrealsense2", "realsense"),
        (lambda: UsbCamera(device=0), "cv2", "cameras"),
    ],
)
def test_a_missing_library_is_named_with_its_cure(monkeypatch, arm, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"{module} .*pip install 'action-diffusion\[{extra}\]'"):
        arm().connect()


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: UrArm(host="127.0.0.1", model="ur5e"),
        lambda: FrankaArm(host="127.0.0.1", model="fer"),
        lambda: UsbCamera(device="/dev/video-not-there"),
        lambda: RealSenseCamera(),
    ],
    ids=["ur", "franka", "usb", "realsense"],
)
def test_where_nothing_answers_the_installed_library_is_heard(make):
    """Nothing here stands in for anything."""
    driver = make()
    with pytest.raises(InputError):
        driver.connect()
    driver.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_arm("ur", host="x", model="ur5"), None),
        (lambda: make_arm("ur", host="x", model="ur7"), "unknown model 'ur7'"),
        (lambda: make_arm("ur", host="x", model="ur5", space="pos"), "did you mean pose"),
        (lambda: make_arm("ur", host="x", model="ur5", gain=10), "gain=10"),
        (lambda: make_arm("ur", host="x", model="ur5", watchdog_time=0.01), "two periods"),
        (lambda: make_arm("ur", model="ur5"), "host"),
        (lambda: make_arm("franka", host="x", model="fr2"), "unknown model 'fr2'"),
        (lambda: make_arm("lerobot", type="x", config={}, bus_watchdog=9), "bus_watchdog=9"),
        (lambda: make_camera("usb", device=0, format="JPEGS"), "four letters"),
        (lambda: make_camera("realsense", rate=0), "rate=0"),
        (lambda: make_camera("realsense", stream="dept"), "unknown stream 'dept' in camera realsense"),
    ],
)
def test_settings_are_checked_before_any_hardware(make, message):
    if message is None:
        assert make().rate == 125
        return
    with pytest.raises(InputError, match=message):
        make()


def test_every_driver_has_a_name():
    assert {"ur", "franka", "lerobot"} <= set(ARMS)
    assert {"usb", "realsense"} <= set(CAMERAS)


def test_a_remote_clock_neither_jumps_nor_runs_ahead():
    """Stamps of a clock that is 1000 s off, with 1 to 6 ms on the way, and that begins anew in the middle."""
    clock, random = vendor.RemoteClock(window=1.0), np.random.default_rng(0)
    last, errors = 0.0, []
    for i in range(2000):
        true = 50 + i * 0.002
        offset = 1000.0 if i < 1000 else -40.0
        t = clock(true - offset, true + 0.001 + 0.005 * random.random())
        assert t >= last
        last = t
        errors.append(t - true)
    assert max(errors) < 0.0062
    assert np.max(np.abs(np.array(errors[200:1000]) - 0.001)) < 3e-4


def test_numbers_refuse_what_is_none():
    assert vendor.numbers([1, 2], 2, "x").dtype == np.float64
    for bad in ([1.0], [1.0, np.nan], [np.inf, 0.0], []):
        with pytest.raises(ArithmeticError):
            vendor.numbers(bad, 2, "x")
