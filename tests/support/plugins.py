"""A plugin of lerobot's with a robot, a camera and a leader, written into a folder as pip would install it."""

from __future__ import annotations

from pathlib import Path

ROBOT = """
from dataclasses import dataclass, field
from lerobot.cameras import CameraConfig
from lerobot.robots import Robot, RobotConfig

@RobotConfig.register_subclass("{type}")
@dataclass
class ToyArmConfig(RobotConfig):
    port: str = ""
    cameras: dict[str, CameraConfig] = field(default_factory=dict)

class ToyArm(Robot):
    config_class = ToyArmConfig
    name = "{type}"
    observation_features = action_features = {{"lift.pos": float, "turn.pos": float}}
    is_calibrated = True

    def __init__(self, config):
        super().__init__(config)
        self.place, self._connected = {{"lift.pos": 1.0, "turn.pos": 2.0}}, False

    @property
    def is_connected(self):
        return self._connected

    def connect(self, calibrate=True):
        self._connected = True

    def calibrate(self): ...
    def configure(self): ...

    def get_observation(self):
        return dict(self.place)

    def send_action(self, action):
        self.place = dict(action)
        return action

    def disconnect(self):
        self._connected = False
"""
LEADER = """
from dataclasses import dataclass
from lerobot.teleoperators import Teleoperator, TeleoperatorConfig

@TeleoperatorConfig.register_subclass("{type}")
@dataclass
class ToyLeaderConfig(TeleoperatorConfig):
    port: str = ""

class ToyLeader(Teleoperator):
    config_class = ToyLeaderConfig
    name = "{type}"
    action_features = {{"lift.pos": float, "turn.pos": float}}
    feedback_features = {{}}
    is_connected = is_calibrated = True
    def connect(self, calibrate=True): ...
    def calibrate(self): ...
    def configure(self): ...
    def send_feedback(self, feedback): ...
    def disconnect(self): ...
    def get_action(self):
        return {{"lift.pos": 3.0, "turn.pos": 4.0}}
"""
CAMERA = """
from dataclasses import dataclass
import numpy as np
from lerobot.cameras import Camera, CameraConfig

@CameraConfig.register_subclass("{type}")
@dataclass
class ToyCameraConfig(CameraConfig):
    shade: int = 0

class ToyCamera(Camera):
    is_connected = True
    def __init__(self, config):
        super().__init__(config)
        self.config = config
    @staticmethod
    def find_cameras():
        return []
    def connect(self, warmup=True): ...
    def disconnect(self): ...
    def read(self):
        return np.full((self.height, self.width, 3), self.config.shade, np.uint8)
    def async_read(self, timeout_ms=200):
        return self.read()
"""


def install(folder: Path) -> None:
    """Four packages: lerobot_robot_toy, lerobot_teleoperator_toy and lerobot_camera_toy, each with the type "toy", and
    lerobot_robot_brand, whose type is "brand_seven"; and lerobot_robot_other, which must not be imported."""
    texts = {
        "lerobot_robot_toy": ROBOT.format(type="toy"),
        "lerobot_teleoperator_toy": LEADER.format(type="toy"),
        "lerobot_camera_toy": CAMERA.format(type="toy"),
        "lerobot_robot_brand": ROBOT.format(type="brand_seven"),
        "lerobot_robot_broken": "raise RuntimeError('its library is\\nmissing')",
        "lerobot_robot_other": f"open({str(folder / 'imported')!r}, 'w').close()",
    }
    for name, text in texts.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(text)
        (folder / f"{name}-1.0.dist-info").mkdir()
        (folder / f"{name}-1.0.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
