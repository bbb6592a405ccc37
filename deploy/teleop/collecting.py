"""`action-diffusion collect agent=teleop`: from a person and a device to a replay buffer."""

from __future__ import annotations

import math
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from action_diffusion import __version__, envs
from action_diffusion.datasets.record.recorder import Recorder
from action_diffusion.datasets.storage.replay_buffer import ASSUMED_RATE
from action_diffusion.deploy.ipc.rings import Segments
from action_diffusion.deploy.loop.clock import Clock, MonotonicClock, VirtualClock
from action_diffusion.deploy.robot.cell import read_cell
from action_diffusion.deploy.robot.process_robot import ProcessRobot
from action_diffusion.deploy.robot.robots import RobotTask, in_processes
from action_diffusion.deploy.teleop.devices.registry import SHOWS_PLACES, everything, make_device
from action_diffusion.deploy.teleop.scenes import describe
from action_diffusion.deploy.teleop.session import TeleopSession
from action_diffusion.deploy.teleop.showing import open_page, teller
from action_diffusion.deploy.teleop.steering import SignalMapping, Speeds, steering_of
from action_diffusion.deploy.teleop.world import RobotWorld, SteppedWorld, World, gate_of, is_plane
from action_diffusion.envs.robosuite.tasks import WRENCH
from action_diffusion.errors import InputError
from action_diffusion.options import Collect

FIRST_TEST_SEED = 100_000


def run(config: Collect) -> dict[str, object]:
    """A session with the values of `configs/collect.yaml`; returns the numbers to report.

    Ctrl-C finishes: what is kept is on disk. Raises `InputError` for a device, a robot or a page that cannot be had,
    for an output with other columns, and where another process records to it.
    """
    _check(config)
    cell = read_cell(config.hardware) if config.hardware else {}
    driver = make_device(config.device, cell, index=config.device_index, clutch=config.clutch, script=config.script)
    with ExitStack() as stack:
        world, folder = _world(config, stack)
        _check_device(config, world)
        clock, countdown = _clock(config, world)
        sink = stack.enter_context(_recorder(config, world))  # which may refuse, before anybody sees a page
        shown, page = open_page(config, world, driver, folder)
        if page is not None:
            stack.callback(page.end)
        device = everything(driver, folder, page, points=is_plane(world))
        stack.callback(device.close)
        device.connect()
        already = sink.n_episodes
        session = TeleopSession(
            world=world,
            device=device,
            steering=_steering(config, world),
            gate=gate_of(world),
            sink=sink,
            clock=clock,
            seed=config.seed,
            countdown=countdown,
            max_steps=math.ceil(config.max_seconds * world.control_rate),
            wanted=config.episodes,
            tell=teller(config, world, shown),
        )
        if config.device != "script":
            print(f"{config.device}: {device.help}", flush=True)
        with suppress(KeyboardInterrupt):
            session.run()
        if isinstance(world, SteppedWorld) and not is_plane(world):
            seed, known = config.seed, max(0, already - session.undone)
            describe(sink.path, lambda i: world.scene_of(seed + i), n_episodes=sink.n_episodes, known=known)
        return {"output": config.output, **session.summary(), **_unfinished(sink)}


def _check(config: Collect) -> None:
    """Raises `InputError` for values that make no sense."""
    last = config.seed + config.episodes
    if last > FIRST_TEST_SEED:
        raise InputError(f"seed={config.seed}: demonstrations use the starts 0 to {FIRST_TEST_SEED - 1}")
    if config.output.endswith(".zip"):
        raise InputError("agent=teleop records to a folder, step by step: output=DIR.zarr")


def _check_device(config: Collect, world: World) -> None:
    if world.groups is None and config.device == "leader":
        raise InputError("a leader arm shows joints, and this simulator takes steps of the hand: robot=lerobot")
    if world.groups is None and config.device in SHOWS_PLACES:
        raise InputError("device=script gives places, and this simulator takes steps of the hand; it is for PushT")
    if config.device == "leader" and config.robot is None:
        raise InputError("device=leader drives a robot: robot=lerobot hardware=FILE.yaml")


def _world(config: Collect, stack: ExitStack) -> tuple[World, Path]:
    """What is driven, and the run's shared memory."""
    task = config.task
    if config.robot is not None:
        robot = in_processes(config.robot, _task(config), config)
        stack.callback(robot.close)
        world: World = RobotWorld(robot, _keys(config, robot), {})
        return world, robot.folder
    env = task.env
    if env is None:
        raise InputError(f"task={task.name} has no simulator: robot=… and hardware=FILE.yaml drive a real arm")
    if env["name"] not in ("pusht", "lift", "can", "square"):
        raise InputError(f"task={task.name}: one person drives one arm, and only PushT, Lift, Can and Square are so")
    segments = Segments()
    stack.callback(segments.remove)
    cameras = [key for key, value in task.seen.items() if value.kind == "image" and value.source == key]
    simulator: Any = envs.make(env["name"], max_steps=10**9)
    world = SteppedWorld(simulator, cameras, plane=env["name"] == "pusht")
    stack.callback(world.close)
    return world, segments.path


def _task(config: Collect) -> RobotTask:
    """What a robot wants to know of a task; there is no policy."""
    task, simulated = config.task, config.robot == "sim_arm"
    images = [key for key, value in task.seen.items() if value.kind in ("image", "depth")] if simulated else []
    env = {**(task.env or {}), "absolute": True} if simulated else task.env
    return RobotTask(control_rate=float(task.control_rate or ASSUMED_RATE), env=env, cameras=tuple(images))


def _keys(config: Collect, robot: ProcessRobot) -> list[str]:
    """What is recorded of a robot: the keys that its hardware's file names, else all states; and all cameras.

    Of simulated ones what is recorded of their simulators.
    """
    states = [group.name for group in robot.arm.state]
    if config.robot == "sim_pusht":
        states = ["state"]
    elif config.robot == "sim_arm":
        named = [value.source or key for key, value in config.task.seen.items()]
        states = [name for name in states if name == "object" or name.startswith("robot0_")]
        states = [name for name in states if name != WRENCH or WRENCH in named]
    elif config.hardware:
        states = list(read_cell(config.hardware).get("observations") or {}) or states
    return [*states, *robot.cameras]


def _recorder(config: Collect, world: World) -> Recorder:
    attrs = {
        "task": config.task.name if config.robot else (config.task.env or {})["name"],
        "source": "teleoperation",
        "robot": config.robot or "simulator",
        "seed": config.seed,
        **world.attrs,
    }
    if not Path(config.output).expanduser().exists():  # of the first session; later ones may differ in these
        attrs |= {"device": config.device, "version": __version__}
    images = [key for key, (_, shape) in world.fields.items() if len(shape) == 3]
    return Recorder.open(config.output, world.fields, attrs, video=images if config.video else ())


def _clock(config: Collect, world: World) -> tuple[Clock, float]:
    """Real time, but for a script in a simulator, which nobody watches; and the countdown."""
    if config.device == "script":
        return (VirtualClock() if world.waits else MonotonicClock()), 0.0
    return MonotonicClock(), float(config.countdown)


def _steering(config: Collect, world: World) -> SignalMapping:
    speeds = Speeds().scaled(float(config.speed))
    options: dict[str, Any] = {"grab": config.device != "script"}
    if isinstance(world, RobotWorld):
        options |= {"arm_limits": world.robot.arm.limits, "gripper": _gripper(config)}
    return steering_of(world.groups, world.limits, world.control_rate, speeds, **options)


def _gripper(config: Collect) -> tuple[float, float] | None:
    """(open, closed)."""
    given = config.gripper or ([-1.0, 1.0] if config.robot == "sim_arm" else None)
    if given is None:
        return None
    return float(given[0]), float(given[1])


def _unfinished(sink: Recorder) -> dict[str, object]:
    """What an open episode comes to."""
    if not sink.n_steps:
        return {}
    return {"open": f"{sink.n_steps} steps of an episode that was neither kept nor discarded: the next session asks"}
