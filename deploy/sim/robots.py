"""Simulated robots behind the loop's `Robot` protocol: PushT, and a Panda, each in real time and in processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from action_diffusion.deploy.arm.link import ArmSetup
from action_diffusion.deploy.ipc.processes import Child
from action_diffusion.deploy.ipc.rings import RingReader, RingWriter, Segments
from action_diffusion.deploy.robot.process_robot import CameraSetup, ProcessRobot
from action_diffusion.deploy.robot.robots import Feedback, RobotOptions, RobotTask
from action_diffusion.deploy.sim.world import MOST_LATENCY, PATIENCE, STARTS
from action_diffusion.errors import InputError, unknown

T = ([[-60, 0], [60, 0], [60, 30], [-60, 30]], [[-15, 30], [15, 30], [15, 120], [-15, 120]])
"""PushT's block in its own frame (px)."""


def board() -> dict[str, object]:
    """What a page draws of PushT: size, the block's polygons, the finger's radius (px), and the goal's pose."""
    from action_diffusion.envs.pusht.simulator import GOAL_POSE

    return {"size": 512, "polygons": T, "goal": list(GOAL_POSE), "radius": 15}


class SimulatedScene:
    """A simulator (`world`) in a process of its own; see `process_robot.Scene`.

    Args:
        segments: of the run.
        module: with the simulator's process; `settings` are its arguments.

    Attributes:
        said: what it says of itself.
    """

    def __init__(self, segments: Segments, module: str, settings: Mapping[str, object]) -> None:
        folder = segments.path
        self._starts = RingWriter(folder / "starts", fields=STARTS, n_slots=8)
        self.child = Child(module, folder, "simulator", settings)
        try:
            self.said = self.child.wait_ready()
        except BaseException:
            self.child.end()
            raise
        self._world = RingReader(folder / "world")

    def begin(self, seed: int) -> None:
        self._tell(seed, runs=False)

    def run(self) -> None:
        self._tell(0, runs=True)

    def _tell(self, seed: int, *, runs: bool) -> None:
        number = self._starts.append(time.monotonic(), {"seed": seed, "runs": runs})
        deadline = time.monotonic() + PATIENCE
        while (record := self._world.latest()) is None or record.values["starts"] <= number:
            if time.monotonic() > deadline or not self.child.alive:
                raise InputError("the simulator does not answer")
            time.sleep(0.002)

    def feedback(self) -> Feedback:
        record = self._world.latest()
        assert record is not None
        return float(record.values["reward"]), bool(record.values["done"])

    @property
    def lost(self) -> float:
        """Real time (s) in which the world should have moved and stood, so far."""
        record = self._world.latest()
        return 0.0 if record is None else float(record.values["lost"])

    def close(self) -> None:
        self.child.end()


def _assembled(
    module: str, settings: Mapping[str, Any], put_together: Callable[[Segments, SimulatedScene], ProcessRobot]
) -> ProcessRobot:
    """The robot of a simulator that has started; nothing is left behind where either does not."""
    if not 0 <= settings["latency"] <= MOST_LATENCY:
        raise InputError(f"simulated.latency={settings['latency']} must be from 0 to {MOST_LATENCY:g} s")
    segments = Segments()
    try:
        scene = SimulatedScene(segments, module, settings)
    except BaseException:
        segments.remove()
        raise
    try:
        return put_together(segments, scene)
    except BaseException:
        scene.close()
        segments.remove()
        raise


def _camera(driver: str, settings: Mapping[str, Any]) -> CameraSetup:
    """`stamp_latency` is for the camera's process; all else is the driver's."""
    rest = dict(settings)
    late = float(rest.pop("stamp_latency", 0.0))
    return CameraSetup(driver=driver, settings=rest, stamp_latency=late)


def _which(key: str) -> dict[str, object]:
    """`front_image` is what the camera `front` sees, `front_depth` how far away that is."""
    name, _, kind = key.rpartition("_")
    return {"camera": name, "depth": kind == "depth"}


def sim_pusht(task: RobotTask, options: RobotOptions) -> ProcessRobot:
    """PushT in real time, with the bundle's settings of the simulator, and the configuration's `simulated`."""
    from action_diffusion.deploy.sim.pusht import PushTArm
    from action_diffusion.envs.pusht.simulator import IMAGE_SIZE, keypoints

    env = task.env if task.env is not None and task.env.get("name") == "pusht" else {}
    simulated = options.simulated

    def put_together(segments: Segments, scene: SimulatedScene) -> ProcessRobot:
        world = {"world": str(segments.path)}
        cameras = {}
        if "image" in task.cameras:
            size = {"image_size": env.get("image_size", IMAGE_SIZE)}
            cameras["image"] = _camera("sim_pusht", world | size | vars(simulated.camera))
        made = ProcessRobot(
            segments=segments,
            arm=ArmSetup(driver="sim_pusht", settings=world, limits=options.limits, obstacles=options.obstacles),
            cameras=cameras,
            control_rate=PushTArm.control_rate,
            max_steps=int(env.get("max_steps", 300)),
            scene=scene,
            derived={"keypoint": ("state", lambda state: keypoints(state[None])[0])},
        )
        made.plane = {"camera": "image" if cameras else None, "size": [512.0, 512.0], "board": board()}
        return made

    return _assembled("action_diffusion.deploy.sim.pusht", {"latency": simulated.latency}, put_together)


def sim_arm(task: RobotTask, options: RobotOptions) -> ProcessRobot:
    """robosuite's Panda in real time on the bundle's task, with the images, and the depth, that it looks at as cameras.

    Raises `InputError` for a policy of another robot, and for one of relative actions.
    """
    from action_diffusion.deploy.sim.panda import check_task
    from action_diffusion.envs.robosuite import headless

    env = check_task(task.env, absolute=bool((task.env or {}).get("absolute")))
    images = task.cameras
    if images:
        headless.choose()  # once, for all cameras
    simulated = options.simulated

    def put_together(segments: Segments, scene: SimulatedScene) -> ProcessRobot:
        said, world = scene.said, {"world": str(segments.path)}
        for key in images:
            if key not in said["cameras"]:
                raise unknown("camera", key, said["cameras"], f"robot=sim_arm on {env['name']}")
        look = {"image_size": said["image_size"], "render": said["env_args"]["render"], **vars(simulated.camera)}
        return ProcessRobot(
            segments=segments,
            arm=ArmSetup(driver="sim_arm", settings=world, limits=options.limits, obstacles=options.obstacles),
            cameras={key: _camera("sim_arm", {**world, **_which(key), **look}) for key in images},
            control_rate=float(said["control_rate"]),
            max_steps=int(said["max_steps"]),
            scene=scene,
        )

    settings = {"env": dict(env), "latency": simulated.latency}
    return _assembled("action_diffusion.deploy.sim.panda", settings, put_together)
