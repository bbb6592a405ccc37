"""From a hardware file to processes, and the first motion: on an arm without motors and a camera that is simulated."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from action_diffusion.deploy import bringup
from action_diffusion.deploy.drivers.vendor import numbers
from action_diffusion.deploy.hardware.command import CommandLayout
from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.hardware.protocols import Frame, check_frame, make_arm, make_camera
from action_diffusion.deploy.page.view import RunView
from action_diffusion.deploy.robot import cell as hardware
from action_diffusion.deploy.robot.robots import RobotTask
from action_diffusion.deploy.sim.pusht import IdealArm
from action_diffusion.deploy.teleop.world import RobotWorld
from action_diffusion.errors import InputError
from action_diffusion.options import Deploy, configuration
from action_diffusion.registry import ROBOTS

LIMITS = {"low": [-1.0] * 3, "high": [1.0] * 3, "max_step": [1.0] * 3}
LIMITS |= {"velocity": [2.0] * 3, "acceleration": [10.0] * 3, "jerk": [200.0] * 3}
CELL = {"arm": {"n_joints": 2}, "limits": LIMITS, "observations": {"state": ["joints", "gripper"]}, "seconds": 3.0}


class StillArm(IdealArm):
    """Takes setpoints, and stays where it is; has a dry run that says so."""

    def __init__(self, *, dry_run: bool = False) -> None:
        super().__init__(n_joints=2)

    def send(self, setpoint: np.ndarray) -> None:
        numbers(setpoint.tolist(), 3, "a setpoint")


class BreakingArm(StillArm):
    """Is gone after half a second."""

    sent = 0

    def send(self, setpoint: np.ndarray) -> None:
        self.sent += 1
        if self.sent > 100:
            raise ConnectionError("the cable is out")


class GreyCamera:
    """So many frames, and no more. depth: each 40 m away."""

    def __init__(self, *, size: int, frames: int = 10**9, depth: bool = False) -> None:
        self.shape, self.rate, self._left = (size, size) if depth else (size, size, 3), 50.0, frames

    def connect(self) -> None:
        pass

    def read(self) -> Frame:
        self._left -= 1
        if self._left < 0:
            raise InputError("somebody pulled the cable")
        time.sleep(1 / self.rate)
        far = len(self.shape) == 2
        return Frame(time.monotonic(), np.full(self.shape, 40_000 if far else 128, np.uint16 if far else np.uint8))

    def close(self) -> None:
        pass


def write(folder: Path, **changes: Any) -> str:
    path = folder / "cell.yaml"
    path.write_text(yaml.safe_dump({**CELL, **changes}))
    return str(path)


def options(path: str) -> Deploy:
    return configuration.settings("deploy", ["robot=ideal", f"hardware={path}"])


@pytest.mark.slow
def test_a_file_becomes_an_arm_and_a_camera(tmp_path):
    grey = {"driver": "test_hardware:GreyCamera", "size": 24}
    path = write(tmp_path, cameras={"front": grey, "far": {**grey, "depth": True}})
    robot = hardware.robot(RobotTask(cameras=("front", "far")), options(path))
    try:
        assert (robot.max_steps, robot.control_rate) == (30, 10.0)
        time.sleep(0.2)
        seen = robot.observe(["state", "front", "gripper"], time.monotonic())
        assert list(seen.values) == ["state", "front", "gripper"]
        assert seen.values["state"].tolist() == [0.0, 0.0, 0.0]
        assert seen.values["front"].shape == (24, 24, 3)
        world = RobotWorld(robot, ["state", "far"], {})
        assert world.fields["far"] == ("<u2", (24, 24))
        assert (world.observe()["far"] == 40_000).all()
        about: Any = {"trials": False}
        _, shown = RunView(robot.folder, about).picture("far") or (0, b"")
        assert np.asarray(Image.open(io.BytesIO(shown))).tolist() == np.full((24, 24, 3), 255).tolist()
    finally:
        robot.close()


@pytest.mark.parametrize(
    ("shape", "image", "message"),
    [
        ((2, 2), np.ones((2, 2), np.float32), "a frame is float32 [2, 2]; this camera's are uint16 [2, 2], in mm"),
        ((2, 2, 3), np.ones((2, 2), np.uint8), "a frame is uint8 [2, 2]; this camera's are uint8 [2, 2, 3]"),
        ((2, 2, 1), np.ones((2, 2, 1), np.uint16), "frames of shape [2, 2, 1]: a camera's are uint8 [H, W, 3], depth"),
    ],
)
def test_a_frame_that_would_be_cut_off_is_refused(shape, image, message):
    with pytest.raises(InputError, match=re.escape(message)):
        check_frame(Frame(0.0, image), shape)


def test_the_guides_cell_is_complete(tmp_path):
    guide = (Path(__file__).parents[2] / "docs" / "bringup.md").read_text()
    (tmp_path / "cell.yaml").write_text(guide.split("```yaml")[1].split("```")[0])
    cell = hardware.read_cell(str(tmp_path / "cell.yaml"))
    arm = make_arm("ur", **cell["arm"])
    CommandLayout(arm.command).check_limits(Limits.of(cell["limits"]).within(arm.limits))
    assert {group.name for group in arm.state} >= set(cell["observations"]["state"])
    for setup in hardware.camera_setups(cell).values():
        assert make_camera(setup.driver, **setup.settings).shape == (96, 96, 3)


def test_the_command_lines_limits_and_dry_run_go_before_the_files():
    setup = hardware.arm_setup("ur", CELL, dry_run=True, limits={"low": [0.0]})
    assert setup.limits == {"low": [0.0]}
    assert setup.settings == {"n_joints": 2, "dry_run": True}
    assert hardware.arm_setup("ur", CELL).limits == LIMITS
    assert {"ur", "franka", "lerobot"} <= set(ROBOTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"camera": {}}, "did you mean cameras"),
        ({"arm": [1]}, "arm must be values by name"),
        ({"cameras": {"front": {"device": 0}}}, "camera front names no driver"),
        ({"cameras": {"side": {"driver": "usb", "device": 0}}}, "unknown camera 'front'"),
        ({"seconds": float("nan")}, "seconds=nan must be a number above 0"),
        ({"seconds": "long"}, "seconds=long must be a number above 0"),
        ({"seconds": 0}, "seconds=0 must be a number above 0"),
        ({"observations": {"state": 5}}, r"observations\.state=5 must be names of states"),
        ({"observations": {"state": []}}, r"observations\.state=\[\] must be names of states"),
        (
            {
                "limits": {"low": [1.0, 0.0], "high": [0.0, 1.0]},
                "cameras": {"front": {"driver": "test_hardware:GreyCamera", "size": 24}},
            },
            "limits leave no room",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        hardware.robot(RobotTask(cameras=("front",)), options(write(tmp_path, **changes)))


@pytest.mark.slow
def test_an_observation_that_the_arm_does_not_have_is_named(tmp_path):
    with pytest.raises(InputError, match=r"unknown state 'joint'.*did you mean joints"):
        hardware.robot(RobotTask(), options(write(tmp_path, observations={"state": "joint"})))


@pytest.mark.parametrize("path", [None, "nowhere.yaml"])
def test_without_a_file_there_is_no_arm(path):
    with pytest.raises(InputError, match="hardware="):
        hardware.read_cell(path)


def test_a_file_that_is_no_yaml_is_refused_in_one_line(tmp_path):
    (tmp_path / "bad.yaml").write_text("arm: {host: [")
    with pytest.raises(InputError, match=r"bad\.yaml") as error:
        hardware.read_cell(str(tmp_path / "bad.yaml"))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_first_motion_goes_there_and_back(tmp_path, capsys):
    path = write(tmp_path, cameras={"front": {"driver": "test_hardware:GreyCamera", "size": 24}})
    words = ["robot=ideal", f"hardware={path}", "number=1", "distance=0.2", "speed=0.5", "seconds=0.3"]
    assert bringup.main(words) == 0
    said = capsys.readouterr().out
    assert "when our process dies: it has no motors" in said
    assert "front: " in said
    assert "number 1 goes from 0.0000 to 0.19" in said
    told, went = re.search(r"told to go ([\d.]+), and went ([\d.]+)", said).groups()
    told, went = float(told), float(went)
    assert told == pytest.approx(0.2, abs=0.02)
    assert went == pytest.approx(told, abs=0.01)


@pytest.mark.slow
def test_an_arm_that_does_not_follow_is_seen_and_in_a_dry_run_expected(tmp_path, capsys):
    path = write(tmp_path, arm={})
    words = ["robot=test_hardware:StillArm", f"hardware={path}", "number=0", "distance=0.05", "speed=1", "seconds=0.1"]
    assert bringup.main(words) == 1
    assert bringup.main([*words, "dry_run=true"]) == 0
    assert "went 0.0000" in capsys.readouterr().out


@pytest.mark.slow
def test_an_arm_that_breaks_while_it_is_looked_at_is_named(tmp_path, capsys):
    path = write(tmp_path, arm={})
    assert bringup.main(["robot=test_hardware:BreakingArm", f"hardware={path}", "seconds=9"]) == 2
    assert "the cable is out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_camera_that_falls_silent_is_named(tmp_path, capsys):
    cameras = {"front": {"driver": "test_hardware:GreyCamera", "size": 24, "frames": 20}}
    assert bringup.main(["robot=ideal", f"hardware={write(tmp_path, cameras=cameras)}", "seconds=9"]) == 2
    assert "camera front: somebody pulled the cable" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sped=1"], "did you mean speed"),
        ([], "robot=NAME is missing"),
        (["robot=ideal", "speed=2"], "at most 1"),
        (["robot=ideal", "distance=far"], "above 0"),
        (["robot=ideal", "number=0.5"], "whole number"),
        (["robot=ideal"], "hardware=FILE.yaml is missing"),
    ],
)
def test_bad_options_are_refused(words, message, capsys):
    assert bringup.main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_number_that_cannot_move_is_refused(tmp_path, capsys):
    path = write(tmp_path)
    assert bringup.main(["robot=ideal", f"hardware={path}", "number=2", "seconds=0.05"]) == 2
    assert "those are [0, 1]" in capsys.readouterr().err
    assert bringup.main(["robot=ideal", f"hardware={path}", "number=0", "distance=3", "seconds=0.05"]) == 2
    assert "no room" in capsys.readouterr().err
