"""Our driver on lerobot itself, on an emulated SO-101, and on plugins of lerobot's.

    PYTHONPATH=FOLDERS_WITH_LEROBOT_AND_THIS_PACKAGE python feetech_peer.py

Prints what it found as JSON, for test_emulated_so101.py.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import plugins

from action_diffusion.deploy.drivers.lerobot import LeRobotArm
from action_diffusion.deploy.drivers.lerobot_camera import LeRobotCamera
from action_diffusion.deploy.sim.feetech import GOAL, TORQUE, Bus, files, so101
from action_diffusion.deploy.teleop.devices.leader import Leader


def said(call: Callable[[], Any]) -> str:
    """What the exception of `call` says, and of which type it is."""
    try:
        return f"none: {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def drive(folder: Path) -> dict[str, Any]:
    """An SO-101 through connecting, moving, damages and stopping."""
    found: dict[str, Any] = {}
    goals: list[dict[int, int]] = []
    motors = so101()
    motors[2].at += 300
    with Bus(motors, told=lambda _t, told: goals.append(told)) as bus:
        files(folder, bus)
        where: dict[str, Any] = {"port": bus.port, "id": "so101", "calibration_dir": str(folder)}
        settings: dict[str, Any] = {"type": "so101_follower", "watchdog": "a person"}

        dry = LeRobotArm(**settings, config=where, dry_run=True)
        dry.connect()
        dry.send(dry.read().values["joints"] + 5)
        dry.stop()
        dry.close()
        found["dry"] = [goals.copy(), [motor.torque for motor in motors.values()]]

        motors[1].write(GOAL, (3000).to_bytes(2, "little"))  # an old goal, of a motor that is limp
        before = {number: motor.at for number, motor in motors.items()}
        arm = LeRobotArm(**settings, config=where)
        bus.damage("lost")  # the first word of the first motor
        arm.connect()
        time.sleep(0.3)
        found["jump"] = [motors[number].at - at for number, at in before.items()]
        found["torque"] = [motor.torque for motor in motors.values()]
        start = arm.read().values["joints"]
        found["start"] = start.tolist()

        goals.clear()
        for step in range(1, 21):
            arm.read()
            arm.send(start + step * np.array([1.0, -1.0, 0.5, 0.0, 0.0, 1.0]))
            time.sleep(0.01)
        time.sleep(0.3)
        found["moved"] = (arm.read().values["joints"] - start).tolist()
        found["goals"] = [goals[0], goals[-1]]

        found["damaged"] = []
        place = arm.read().values["joints"]
        for kind, there, seconds in (
            *((kind, there, 0.2) for kind in ("lost", "wrong", "out") for there in (False, True)),
            ("late", False, 0.08),
        ):
            bus.damage(kind, there=there, seconds=seconds)
            for _ in range(3):
                found["damaged"].append(float(np.abs(arm.read().values["joints"] - place).max()))

        bus.damage("late", seconds=0.1)  # the state before a motion, which must not come after it
        busy = time.thread_time()
        arm.read()
        found["busy"] = time.thread_time() - busy
        with bus.lock:
            motors[4].at -= 100
            motors[4].write(TORQUE, b"\0")
        found["fresh"] = float((arm.read().values["joints"] - place)[3])

        with bus.lock:
            motors[1].at += 500  # somebody pushes it while it is stopped
        goals.clear()
        arm.stop()
        until = time.monotonic() + 5
        while not goals and time.monotonic() < until:
            time.sleep(0.01)  # nothing answers it
        found["stop"] = goals.copy()
        bus.damage("out", seconds=1.5)
        found["gone"] = said(arm.read)
        arm.close()
        found["kept"] = [motor.torque for number, motor in motors.items() if number != 4]

        time.sleep(1.5)
        leader = Leader(type="so101_leader", config=where)
        bus.damage("wrong", there=True)
        leader.connect()
        bus.damage("wrong")
        target = leader.poll().target
        assert target is not None
        found["leader"] = target.tolist()
        leader.close()
        for trouble in ("missing", "overloaded", "calibration"):
            with bus.lock:
                bus.missing = {5} if trouble == "missing" else set()
                motors[3].overloaded = trouble == "overloaded"
                motors[6].write(31, bytes([0, 8 if trouble == "calibration" else 0]))
            found[trouble] = said(LeRobotArm(**settings, config=where).connect)
    found["unplugged"] = said(LeRobotArm(**settings, config=where).connect)
    return found


def plug(folder: Path) -> dict[str, Any]:
    """Robots, a leader and a camera of plugins."""
    found: dict[str, Any] = {}
    plugins.install(folder)
    sys.path.insert(0, str(folder))
    settings: dict[str, Any] = {"motors": ["lift", "turn"], "watchdog": "a person"}
    arm = LeRobotArm(type="toy", config={"port": "x", "calibration_dir": str(folder)}, **settings)
    arm.connect()
    arm.send(np.array([5.0, 6.0]))
    found["arm"] = arm.read().values["joints"].tolist()
    arm.close()
    leader = Leader(type="toy", config={"calibration_dir": str(folder)}, motors=["lift", "turn"])
    leader.connect()
    target = leader.poll().target
    assert target is not None
    found["leader"] = target.tolist()
    shape = {"width": 8, "height": 6, "fps": 30}
    camera = LeRobotCamera(type="toy", config={**shape, "shade": 7}, image_size=[3, 4])
    camera.connect()
    image = camera.read().image
    found["camera"] = [list(image.shape), int(image.mean())]
    camera.close()
    made = LeRobotArm(type="brand_seven", plugin="lerobot_robot_brand", config={"port": "x"}, **settings)
    made.connect()
    for name, kind, plugin in (
        ("unnamed", "brand_seven", ""),
        ("near", "toi", ""),
        ("broken", "broken", ""),
        ("absent", "brand_nine", "lerobot_robot_brnd"),
        ("foreign", "toy2", "os.path"),
    ):
        found[name] = said(
            LeRobotArm(type=kind + "_x" * (name == "unnamed"), plugin=plugin, config={}, **settings).connect
        )
    found["camera_near"] = said(LeRobotCamera(type="toi", config=shape).connect)
    found["camera_shape"] = said(lambda: LeRobotCamera(type="toy", config={"width": 8}))
    found["imported"] = (folder / "imported").exists()
    return found


def main() -> None:
    sys.setswitchinterval(2e-4)  # the motors are a thread of this process, and have 35 ms to answer
    report: dict[str, Any] = {"version": importlib.metadata.version("lerobot")}
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        report |= {"so101": drive(Path(first)), "plugins": plug(Path(second))}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
