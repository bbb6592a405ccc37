"""Stand-ins of the vendors' libraries: the part of each that our drivers use, and a robot or camera behind it.

Their signatures are those of the libraries: test_vendors.py compares every class here, method by method, with the
installed one. `World` is what a test looks at, and what it breaks.
"""

from __future__ import annotations

import enum
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np


class World:
    """What the stand-ins share. told: (method, arguments), as drivers called them, in order.

    Any method can be broken: `breaks["getActualQ"] = error` raises it, `answers["servoJ"] = False` returns it.
    """

    def __init__(self) -> None:
        self.told: list[tuple[str, tuple[Any, ...]]] = []
        self.breaks: dict[str, Exception] = {}
        self.answers: dict[str, Any] = {}
        self.stamp = 100.0

    def call(self, name: str, *arguments: Any, answer: Any = None) -> Any:
        self.told.append((name, arguments))
        if name in self.breaks:
            raise self.breaks[name]
        return self.answers.get(name, answer)

    def names(self) -> list[str]:
        return [name for name, _ in self.told]


WORLD = World()


class RTDEControlInterface:
    def __init__(
        self,
        hostname: str,
        frequency: float = -1.0,
        flags: int = 1,
        ur_cap_port: int = 50002,
        rt_priority: int = 0,
    ) -> None:
        WORLD.call("RTDEControlInterface", hostname)

    def isConnected(self) -> bool:
        return bool(WORLD.answers.get("isConnected", True))

    def setWatchdog(self, min_frequency: float = 10.0) -> bool:
        return WORLD.call("setWatchdog", min_frequency, answer=True)

    def kickWatchdog(self) -> bool:
        return WORLD.call("kickWatchdog", answer=True)

    def servoJ(
        self, q: list[float], speed: float, acceleration: float, time: float, lookahead_time: float, gain: float
    ) -> bool:
        return WORLD.call("servoJ", q, speed, acceleration, time, lookahead_time, gain, answer=True)

    def servoL(
        self, pose: list[float], speed: float, acceleration: float, time: float, lookahead_time: float, gain: float
    ) -> bool:
        return WORLD.call("servoL", pose, speed, acceleration, time, lookahead_time, gain, answer=True)

    def servoStop(self, a: float = 10.0) -> bool:
        return WORLD.call("servoStop", a, answer=True)

    def stopScript(self) -> None:
        return WORLD.call("stopScript")

    def disconnect(self) -> None:
        return WORLD.call("control.disconnect")


class RTDEReceiveInterface:
    def __init__(
        self,
        hostname: str,
        frequency: float = -1.0,
        variables: list[str] = [],  # noqa: B006 - as in the library
        verbose: bool = False,
        use_upper_range_registers: bool = False,
        rt_priority: int = 0,
    ) -> None:
        WORLD.call("RTDEReceiveInterface", hostname)

    def getRobotMode(self) -> int:
        return WORLD.call("getRobotMode", answer=7)

    def isEmergencyStopped(self) -> bool:
        return WORLD.call("isEmergencyStopped", answer=False)

    def isProtectiveStopped(self) -> bool:
        return WORLD.call("isProtectiveStopped", answer=False)

    def getTimestamp(self) -> float:
        return WORLD.call("getTimestamp", answer=WORLD.stamp)

    def getActualQ(self) -> list[float]:
        return WORLD.call("getActualQ", answer=[0.1, -1.2, 1.3, -1.4, -1.5, 0.6])

    def getActualQd(self) -> list[float]:
        return WORLD.call("getActualQd", answer=[0.0] * 6)

    def getActualTCPPose(self) -> list[float]:
        return WORLD.call("getActualTCPPose", answer=[0.4, 0.1, 0.3, 3.1, 0.1, 0.0])

    def disconnect(self) -> None:
        return WORLD.call("receive.disconnect")


class RTDEIOInterface:
    def __init__(self, hostname: str, verbose: bool = False, use_upper_range_registers: bool = False) -> None:
        WORLD.call("RTDEIOInterface", hostname)

    def setToolDigitalOut(self, output_id: int, signal_level: bool) -> bool:
        return WORLD.call("setToolDigitalOut", output_id, signal_level, answer=True)

    def disconnect(self) -> None:
        return WORLD.call("io.disconnect")


class RealtimeConfig(enum.Enum):
    kEnforce, kIgnore = 0, 1


class RobotMode(enum.Enum):
    kOther, kIdle, kMove, kGuiding, kReflex, kUserStopped, kAutomaticErrorRecovery = range(7)


class Duration:
    def to_sec(self) -> float:
        return WORLD.stamp


class RobotState:
    @property
    def q(self) -> list[float]:
        return WORLD.call("q", answer=[0.0, -0.8, 0.0, -2.4, 0.0, 1.6, 0.8])

    @property
    def dq(self) -> list[float]:
        return WORLD.call("dq", answer=[0.0] * 7)

    @property
    def O_T_EE(self) -> list[float]:
        return WORLD.call("O_T_EE", answer=[1.0, 0, 0, 0, 0, -1.0, 0, 0, 0, 0, -1.0, 0, 0.3, 0.1, 0.5, 1.0])

    @property
    def time(self) -> Duration:
        return WORLD.call("time", answer=Duration())

    @property
    def robot_mode(self) -> RobotMode:
        return WORLD.call("robot_mode", answer=RobotMode.kIdle)


class JointPosition:
    def __init__(
        self,
        stiffness: np.ndarray = np.ones(7),  # noqa: B008 - as in the library
        damping: np.ndarray = np.ones(7),  # noqa: B008
        filter_coeff: float = 1.0,
    ) -> None:
        WORLD.call("JointPosition", stiffness, damping, filter_coeff)

    def set_control(self, position: np.ndarray, velocity: np.ndarray = np.zeros(7)) -> None:  # noqa: B008
        return WORLD.call("set_control", position)


class TorqueController:
    """The base class of panda-python's controllers."""


class Panda:
    def __init__(
        self, hostname: str, name: str = "panda", realtime_config: RealtimeConfig = RealtimeConfig.kIgnore
    ) -> None:
        WORLD.call("Panda", hostname, name, realtime_config)

    def get_state(self) -> RobotState:
        return WORLD.call("get_state", answer=RobotState())

    def get_joint_limits_lower(self) -> np.ndarray:
        return WORLD.call("get_joint_limits_lower", answer=np.full(7, -4.0))

    def get_joint_limits_upper(self) -> np.ndarray:
        return WORLD.call("get_joint_limits_upper", answer=np.full(7, 5.0))

    def start_controller(self, controller: TorqueController) -> None:
        return WORLD.call("start_controller")

    def stop_controller(self) -> None:
        return WORLD.call("stop_controller")

    def is_moving(self) -> bool:
        return WORLD.call("is_moving", answer=True)

    def raise_error(self) -> None:
        return WORLD.call("raise_error")


class GripperState:
    @property
    def width(self) -> float:
        return WORLD.call("width", answer=0.08)

    @property
    def max_width(self) -> float:
        return WORLD.call("max_width", answer=0.08)


class Gripper:
    def __init__(self, franka_address: str) -> None:
        WORLD.call("Gripper", franka_address)

    def read_once(self) -> GripperState:
        return WORLD.call("read_once", answer=GripperState())

    def move(self, width: float, speed: float) -> bool:
        return WORLD.call("move", width, speed, answer=True)

    def grasp(
        self, width: float, speed: float, force: float, epsilon_inner: float = 0.005, epsilon_outer: float = 0.005
    ) -> bool:
        return WORLD.call("grasp", width, speed, force, epsilon_inner, epsilon_outer, answer=True)


class stream(enum.Enum):
    depth = 1
    color = 2


class format(enum.Enum):
    z16 = 1
    rgb8 = 5


class option(enum.Enum):
    global_time_enabled, enable_auto_exposure, exposure = range(3)


class timestamp_domain(enum.Enum):
    hardware_clock, system_time, global_time = range(3)


class config:
    def __init__(self) -> None:
        pass

    def enable_device(self, serial: str) -> None:
        return WORLD.call("enable_device", serial)

    def enable_stream(self, stream_type: stream, width: int, height: int, format: format, framerate: int) -> None:
        return WORLD.call("enable_stream", stream_type, width, height, format, framerate)

    def resolve(self, p: pipeline_wrapper) -> pipeline_profile:
        return WORLD.call("resolve", answer=pipeline_profile())


class video_frame:
    def get_data(self) -> np.ndarray:
        return WORLD.call("get_data", answer=np.full((480, 640, 3), (200, 100, 50), np.uint8))

    def get_timestamp(self) -> float:
        return WORLD.call("get_timestamp", answer=1e3 * WORLD.stamp)

    def get_frame_timestamp_domain(self) -> timestamp_domain:
        return WORLD.call("get_frame_timestamp_domain", answer=timestamp_domain.hardware_clock)


class depth_frame(video_frame):
    def get_data(self) -> np.ndarray:
        return WORLD.call("get_data", answer=np.full((480, 640), 20_000, np.uint16))


class composite_frame:
    def get_depth_frame(self) -> depth_frame:
        return WORLD.call("get_depth_frame", answer=depth_frame())

    def get_color_frame(self, index: int = 0) -> video_frame:
        return WORLD.call("get_color_frame", answer=video_frame())


class color_sensor:
    def supports(self, option: option) -> bool:
        return WORLD.call("supports", option, answer=True)

    def set_option(self, option: option, value: float) -> None:
        return WORLD.call("set_option", option, value)


class depth_sensor(color_sensor):
    def get_depth_scale(self) -> float:
        return WORLD.call("get_depth_scale", answer=1e-4)


class device:
    def first_depth_sensor(self) -> depth_sensor:
        return WORLD.call("first_depth_sensor", answer=depth_sensor())

    def first_color_sensor(self) -> color_sensor:
        return WORLD.call("first_color_sensor", answer=color_sensor())


class pipeline_profile:
    def get_device(self) -> device:
        return WORLD.call("get_device", answer=device())


class pipeline_wrapper:
    def __init__(self, pipeline: pipeline) -> None:
        pass


class pipeline:
    def __init__(self) -> None:
        pass

    def start(self, config: config) -> pipeline_profile:
        return WORLD.call("start", config, answer=pipeline_profile())

    def try_wait_for_frames(self, timeout_ms: int = 5000) -> tuple[bool, composite_frame]:
        return WORLD.call("try_wait_for_frames", timeout_ms, answer=(True, composite_frame()))

    def stop(self) -> None:
        return WORLD.call("pipeline.stop")


class VideoCapture:
    """OpenCV's: see `test_vendors.test_opencvs_capture_is_like_the_stand_in`. WORLD.stamp is the kernel's (s)."""

    def __init__(self, device: str | int, backend: int) -> None:
        WORLD.call("VideoCapture", device, backend)
        self._values: dict[int, float] = {}

    def isOpened(self) -> bool:
        return WORLD.call("isOpened", answer=True)

    def set(self, name: int, value: float) -> bool:
        self._values[name] = value
        return WORLD.call("set", name, value, answer=True)

    def get(self, name: int) -> float:
        return 1e3 * WORLD.stamp if name == 0 else WORLD.answers.get("get", self._values.get(name, 0.0))

    def read(self) -> tuple[bool, np.ndarray | None]:
        time.sleep(0.005)
        return WORLD.call("read", answer=(True, np.full((480, 640, 3), (50, 100, 200), np.uint8)))  # BGR

    def release(self) -> None:
        return WORLD.call("release")


class Motor:
    model = "xl330-m288"


class MotorsBus:
    """lerobot's bus: of Dynamixel motors, as Koch has it."""

    model_ctrl_table: ClassVar = {"xl330-m288": {"Bus_Watchdog": (98, 1)}}

    def __init__(self) -> None:
        self.motors = {"shoulder_pan": Motor(), "gripper": Motor()}

    def connect(self, handshake: bool = True) -> None:
        return WORLD.call("bus.connect", handshake)

    def disconnect(self, disable_torque: bool = True) -> None:
        return WORLD.call("bus.disconnect", disable_torque)

    def write(self, data_name: str, motor: str, value: float, *, normalize: bool = True, num_retry: int = 0) -> None:
        return WORLD.call("bus.write", data_name, motor, value)


class RobotConfig:
    """lerobot's base of configurations, with its registry (draccus' ChoiceRegistry)."""

    known: ClassVar[dict[str, type]] = {}

    @classmethod
    def get_known_choices(cls) -> dict[str, type]:
        return cls.known

    @classmethod
    def get_choice_class(cls, name: str) -> type:
        return cls.known[name]


@dataclass(kw_only=True)
class KochFollowerConfig(RobotConfig):
    port: str
    id: str | None = None
    calibration_dir: Path | None = None
    disable_torque_on_disconnect: bool = True


class Robot:
    action_features: ClassVar = {"shoulder_pan.pos": float, "gripper.pos": float}

    def __init__(self, config: RobotConfig) -> None:
        WORLD.call("Robot", config)
        self.bus = MotorsBus()

    @property
    def is_calibrated(self) -> bool:
        return WORLD.call("is_calibrated", answer=True)

    def connect(self, calibrate: bool = True) -> None:
        return WORLD.call("connect", calibrate)

    def get_observation(self) -> dict[str, float]:
        return WORLD.call("get_observation", answer={"shoulder_pan.pos": 10.0, "gripper.pos": 50.0})

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        return WORLD.call("send_action", action, answer=action)

    def disconnect(self) -> None:
        return WORLD.call("disconnect")


@dataclass(kw_only=True)
class KochLeaderConfig(RobotConfig):
    port: str
    id: str | None = None
    calibration_dir: Path | None = None


class Teleoperator:
    """lerobot's base of leader arms."""

    action_features: ClassVar = {"shoulder_pan.pos": float, "gripper.pos": float}

    def __init__(self, config: RobotConfig) -> None:
        WORLD.call("Teleoperator", config)

    @property
    def is_calibrated(self) -> bool:
        return WORLD.call("leader.is_calibrated", answer=True)

    def connect(self, calibrate: bool = True) -> None:
        return WORLD.call("leader.connect", calibrate)

    def get_action(self) -> dict[str, float]:
        return WORLD.call("get_action", answer={"shoulder_pan.pos": 10.0, "gripper.pos": 50.0})

    def disconnect(self) -> None:
        return WORLD.call("leader.disconnect")


UR: dict[str, list[type]] = {
    "rtde_control": [RTDEControlInterface],
    "rtde_receive": [RTDEReceiveInterface],
    "rtde_io": [RTDEIOInterface],
}
FRANKA: dict[str, list[type]] = {
    "panda_py": [Panda],
    "panda_py.controllers": [JointPosition],
    "panda_py.libfranka": [RealtimeConfig, RobotMode, RobotState, Duration, Gripper, GripperState],
}
REALSENSE: dict[str, list[type]] = {
    "pyrealsense2": [
        *(stream, format, option, timestamp_domain, config, video_frame, depth_frame, composite_frame),
        *(color_sensor, depth_sensor, device, pipeline_profile, pipeline_wrapper, pipeline),
    ]
}


def install(monkeypatch: Any, modules: dict[str, list[type]]) -> World:
    """Put stand-ins in the place of libraries, for one test."""
    WORLD.__init__()  # type: ignore[misc]
    for name, classes in modules.items():
        module = types.ModuleType(name)
        for given in classes:
            setattr(module, given.__name__, given)
        monkeypatch.setitem(sys.modules, name, module)
    return WORLD


def install_lerobot(monkeypatch: Any, folder: Path) -> World:
    """lerobot with one robot, koch_follower, which registers when its package, koch_follower, is imported."""
    world = install(monkeypatch, {"lerobot": [], "lerobot.robots": [RobotConfig]})
    for name in ("koch_follower", "so_follower"):
        (folder / name).mkdir()
        text = "import sys; known = sys.modules['lerobot.robots'].RobotConfig.known\n"
        text += "known['koch_follower'] = sys.modules['lerobot.robots'].KochFollowerConfig\n"
        (folder / name / "__init__.py").write_text(
            text if name == "koch_follower" else "import scservo_sdk_not_there\n"
        )
        monkeypatch.delitem(sys.modules, f"lerobot.robots.{name}", raising=False)
    robots = sys.modules["lerobot.robots"]
    monkeypatch.setattr(RobotConfig, "known", {})
    robots.__path__ = [str(folder)]
    robots.KochFollowerConfig = KochFollowerConfig  # type: ignore[attr-defined]
    robots.make_robot_from_config = Robot  # type: ignore[attr-defined]
    return world


def install_lerobot_leader(monkeypatch: Any, folder: Path) -> World:
    """lerobot with one leader arm, koch_leader, which registers as robots do."""
    world = install(monkeypatch, {"lerobot": [], "lerobot.teleoperators": []})
    (folder / "koch_leader").mkdir()
    text = "import sys; module = sys.modules['lerobot.teleoperators']\n"
    text += "module.TeleoperatorConfig.known['koch_leader'] = module.KochLeaderConfig\n"
    (folder / "koch_leader" / "__init__.py").write_text(text)
    monkeypatch.delitem(sys.modules, "lerobot.teleoperators.koch_leader", raising=False)
    teleoperators = sys.modules["lerobot.teleoperators"]
    monkeypatch.setattr(RobotConfig, "known", {})
    teleoperators.__path__ = [str(folder)]
    teleoperators.TeleoperatorConfig = RobotConfig  # type: ignore[attr-defined]
    teleoperators.KochLeaderConfig = KochLeaderConfig  # type: ignore[attr-defined]
    teleoperators.make_teleoperator_from_config = Teleoperator  # type: ignore[attr-defined]
    return world
