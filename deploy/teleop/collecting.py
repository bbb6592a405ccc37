"""`action-diffusion collect agent=teleop`: from a person and a device to a replay buffer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from action_diffusion import __version__, envs
from action_diffusion.datasets.recorder import Recorder
from action_diffusion.deploy import robots
from action_diffusion.deploy.clock import Clock, MonotonicClock, VirtualClock
from action_diffusion.deploy.hardware import read_cell
from action_diffusion.deploy.onlookers import page_port
from action_diffusion.deploy.process_robot import ProcessRobot
from action_diffusion.deploy.processes import Child
from action_diffusion.deploy.rings import Segments
from action_diffusion.deploy.teleop.device import Device
from action_diffusion.deploy.teleop.devices import SHOWS_PLACES, everything, make_device
from action_diffusion.deploy.teleop.page import Pictures, Shown
from action_diffusion.deploy.teleop.scenes import describe
from action_diffusion.deploy.teleop.session import Session
from action_diffusion.deploy.teleop.steering import Speeds, Steering, steering_of
from action_diffusion.deploy.teleop.world import RobotWorld, SimulatedWorld, World, gate_of
from action_diffusion.envs.demonstration import EXPERTS
from action_diffusion.errors import InputError
from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec

FIRST_TEST_SEED = 100_000
T = ([[-60, 0], [60, 0], [60, 30], [-60, 30]], [[-15, 30], [15, 30], [15, 120], [-15, 120]])
"""PushT's block in its own frame (px)."""
MODULE = "action_diffusion.deploy.teleop.page_process"


def run(config: Mapping[str, Any]) -> dict[str, Any]:
    """A session with the values of `configs/collect.yaml`; returns the numbers to report.

    Ctrl-C finishes: what is kept is on disk. Raises `InputError` for a device, a robot or a page that cannot be had,
    for an output with other columns, and where another process records to it.
    """
    _check(config)
    cell = read_cell(config["hardware"]) if config["hardware"] else {}
    driver = make_device(config, cell)
    with ExitStack() as stack:
        world, folder = _world(config, stack)
        _check_device(config, world)
        clock, countdown = _clock(config, world)
        shown, page = _page(config, world, driver, folder, stack)
        device = everything(driver, folder, page, points=world.groups is not None and _is_plane(world))
        stack.callback(device.close)
        device.connect()
        sink = stack.enter_context(_recorder(config, world))
        already = sink.n_episodes
        session = Session(
            world=world,
            device=device,
            steering=_steering(config, world),
            gate=gate_of(world),
            sink=sink,
            clock=clock,
            seed=config["seed"],
            countdown=countdown,
            max_steps=math.ceil(config["max_seconds"] * world.control_rate),
            wanted=config["episodes"],
            tell=_teller(config, world, shown),
        )
        _say_how(config, device, page)
        with suppress(KeyboardInterrupt):
            session.run()
        if isinstance(world, SimulatedWorld) and not _is_plane(world):
            seed, known = config["seed"], max(0, already - session.undone)
            describe(sink.path, lambda i: world.scene_of(seed + i), n_episodes=sink.n_episodes, known=known)
        return {"output": str(config["output"]), **session.summary(), **_unfinished(sink)}


def _check(config: Mapping[str, Any]) -> None:
    """Raises `InputError` for values that make no sense."""
    if config["episodes"] < 1:
        raise InputError(f"episodes={config['episodes']}: collect at least one")
    last = config["seed"] + config["episodes"]
    if config["seed"] < 0 or last > FIRST_TEST_SEED:
        raise InputError(f"seed={config['seed']}: demonstrations use the starts 0 to {FIRST_TEST_SEED - 1}")
    for name in ("countdown", "max_seconds"):
        if not (isinstance(config[name], int | float) and 0 <= config[name] < math.inf):
            raise InputError(f"{name}={config[name]} must be seconds")
    if str(config["output"]).endswith(".zip"):
        raise InputError("agent=teleop records to a folder, step by step: output=DIR.zarr")


def _is_plane(world: World) -> bool:
    return world.groups is not None and [group.name for group in world.groups] == ["target"]


def _check_device(config: Mapping[str, Any], world: World) -> None:
    if world.groups is None and config["device"] == "leader":
        raise InputError("a leader arm shows joints, and this simulator takes steps of the hand: robot=lerobot")
    if world.groups is None and config["device"] in SHOWS_PLACES:
        raise InputError("device=script gives places, and this simulator takes steps of the hand; it is for PushT")
    if config["device"] == "leader" and config["robot"] is None:
        raise InputError("device=leader drives a robot: robot=lerobot hardware=FILE.yaml")


def _world(config: Mapping[str, Any], stack: ExitStack) -> tuple[World, Path]:
    """What is driven, and the run's shared memory."""
    task = config["task"]
    if config["robot"] is not None:
        robot = robots.make(config["robot"], _spec(config), config)
        stack.callback(robot.close)
        assert isinstance(robot, ProcessRobot)
        world: World = RobotWorld(robot, _keys(config, robot), {})
        return world, robot.folder
    env = task["env"]
    if env is None:
        raise InputError(f"task={task['name']} has no simulator: robot=… and hardware=FILE.yaml drive a real arm")
    if env["name"] not in ("pusht", *EXPERTS):
        raise InputError(f"task={task['name']}: one person drives one arm, and only PushT, Lift, Can and Square are so")
    segments = Segments()
    stack.callback(segments.remove)
    observations: Mapping[str, Mapping[str, Any]] = task["observations"] or {}
    cameras = [key for key, value in observations.items() if value["kind"] == "image" and value["source"] == key]
    simulator: Any = envs.make(env["name"], max_steps=10**9)
    world = SimulatedWorld(simulator, cameras, plane=env["name"] == "pusht")
    stack.callback(world.close)
    return world, segments.path


def _spec(config: Mapping[str, Any]) -> PolicySpec:
    """What a robot wants to know of a task; there is no policy."""
    task = config["task"]
    env, rate = task["env"], float(task["control_rate"])
    seen = {"state": ObservationSpec(shape=(5,))} if config["robot"] == "sim_pusht" else {}
    action = ActionSpec(shape=(1,))
    return PolicySpec(seen, action, n_obs_steps=1, horizon=1, n_action_steps=1, control_rate=rate, env=env)


def _keys(config: Mapping[str, Any], robot: ProcessRobot) -> list[str]:
    """What is recorded of a robot: the keys that its hardware's file names, else all states; and all cameras."""
    if config["robot"] == "sim_pusht":
        return ["state", *robot.cameras]
    cell = read_cell(config["hardware"])
    states = list(cell.get("observations") or {}) or [group.name for group in robot.arm.state]
    return [*states, *robot.cameras]


def _recorder(config: Mapping[str, Any], world: World) -> Recorder:
    attrs = {
        "task": config["task"]["name"] if config["robot"] else config["task"]["env"]["name"],
        "source": "teleoperation",
        "robot": config["robot"] or "simulator",
        "seed": config["seed"],
        **world.attrs,
    }
    if not Path(config["output"]).expanduser().exists():  # of the first session; later ones may differ in these
        attrs |= {"device": config["device"], "version": __version__}
    images = [key for key, (_, shape) in world.fields.items() if len(shape) == 3]
    return Recorder.open(config["output"], world.fields, attrs, video=images if config["video"] else ())


def _clock(config: Mapping[str, Any], world: World) -> tuple[Clock, float]:
    """Real time, but for a script in a simulator, which nobody watches; and the countdown."""
    if config["device"] == "script":
        return (VirtualClock() if world.waits else MonotonicClock()), 0.0
    return MonotonicClock(), float(config["countdown"])


def _steering(config: Mapping[str, Any], world: World) -> Steering:
    speeds = Speeds().scaled(float(config["speed"]))
    options: dict[str, Any] = {"grab": config["device"] != "script"}
    if isinstance(world, RobotWorld):
        options |= {"arm_limits": world.robot.arm.limits, "gripper_closed": config["gripper_closed"]}
    return steering_of(world.groups, world.limits, world.control_rate, speeds, **options)


def _page(
    config: Mapping[str, Any], world: World, driver: Device | None, folder: Path, stack: ExitStack
) -> tuple[Shown | None, Child | None]:
    """The page's process, where there is to be one."""
    wanted = config["page"]
    if config["device"] == "script" and wanted is None:
        wanted = False
    if driver is None and wanted is None:
        wanted = True
    port = page_port(wanted, print)
    if port is None:
        return None, None
    shown = Shown(folder)
    about = {
        "task": config["task"]["name"],
        "help": "" if driver is None else driver.help,
        "points": driver is None and _is_plane(world),
        "emergency": not world.waits,
        "board": board() if _is_plane(world) else None,
    }
    if driver is None:
        from action_diffusion.deploy.teleop.keys import HELP

        about["help"] = "lead the finger with the mouse, or a finger on the screen" if about["points"] else HELP
    address = {"host": str(config["page_host"]), "port": port, "token_file": config["page_token_file"]}
    page = Child(MODULE, folder, "page", {**address, "about": about})
    stack.callback(page.end)
    said = page.wait_ready()
    host = address["host"]
    print(f"page: http://{f'[{host}]' if ':' in str(host) else host}:{said['port']}", flush=True)
    return shown, page


def board() -> dict[str, Any]:
    """What the page draws of PushT: size, the block's polygons, the finger's radius (px), and the goal's pose."""
    from action_diffusion.envs.pusht import GOAL_POSE

    return {"size": 512, "polygons": T, "goal": list(GOAL_POSE), "radius": 15}


def _teller(config: Mapping[str, Any], world: World, shown: Shown | None) -> Callable[[dict[str, Any]], None]:
    """Shows a session's status on the page, or says it to the program that writes the script."""
    if shown is not None:
        pictures = Pictures(world.picture, shown)

        def show(status: dict[str, Any]) -> None:
            shown.tell({**status, **world.scene()})
            pictures(status["mode"], status["step"])

        return show
    if config["script"] == "-":
        return lambda status: print(json.dumps({**status, **world.scene()}), flush=True)
    return lambda status: None


def _say_how(config: Mapping[str, Any], device: Device, page: Child | None) -> None:
    if config["device"] != "script":
        print(f"{config['device']}: {device.help}", flush=True)
    if page is not None:
        print("from another machine: ssh -L PORT:localhost:PORT, then the same address", flush=True)


def _unfinished(sink: Recorder) -> dict[str, Any]:
    """What an open episode comes to."""
    if not sink.n_steps:
        return {}
    return {"open": f"{sink.n_steps} steps of an episode that was neither kept nor discarded: the next session asks"}
