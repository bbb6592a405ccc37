"""The first motion of a real arm: look at what it and its cameras say, then move one joint slowly, and back.

    python -m action_diffusion.deploy.bringup robot=ur hardware=cell.yaml dry_run=true
    python -m action_diffusion.deploy.bringup robot=ur hardware=cell.yaml number=5 distance=0.1 speed=0.1

    dry_run     connect and look; nothing moves
    seconds     how long to look, with the states once a second: move the arm by hand and pull cables
    number      which number of a command moves, from 0; without one, nothing does
    distance    how far, in its unit; to the other side where a limit is near
    speed       the largest velocity of the motion, as a share of the limit's, in (0, 1]

The motion goes through all that a policy's does: waypoints to the arm's process, its gate, its shaper, the driver.
Exit code: 0; 1 where the arm intervened or did not follow; 2 for bad input; 130 after Ctrl-C, which stops the arm.
docs/bringup.md says what to look at.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import yaml

from action_diffusion.deploy.arm.link import ArmLink
from action_diffusion.deploy.arm.travel import STEP, travel
from action_diffusion.deploy.ipc.channels import Phase
from action_diffusion.deploy.ipc.processes import prefer
from action_diffusion.deploy.ipc.rings import RingReader, Segments
from action_diffusion.deploy.robot.cell import arm_setup, camera_setups, read_cell
from action_diffusion.deploy.robot.process_robot import ProcessRobot
from action_diffusion.errors import InputError, unknown

OPTIONS: dict[str, Any] = {"robot": "", "hardware": "", "dry_run": False}
OPTIONS |= {"seconds": 2.0, "number": None, "distance": 0.05, "speed": 0.1}
PRIORITY = 30
"""Waypoints wait for no other program: only for the arm's process, and an emulated arm."""


def parse(words: Sequence[str]) -> dict[str, Any]:
    """Options from `name=value` words. Raises `InputError`."""
    options = dict(OPTIONS)
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in OPTIONS:
            raise unknown("option", name, OPTIONS)
        options[name] = value if isinstance(OPTIONS[name], str) else yaml.safe_load(value)
    if not options["robot"]:
        raise InputError("robot=NAME is missing, such as robot=ur")
    for name in ("seconds", "distance", "speed"):
        if not isinstance(options[name], int | float) or not options[name] > 0:
            raise InputError(f"{name}={options[name]} must be a number above 0")
    if not isinstance(options["dry_run"], bool) or not isinstance(options["number"], int | None):
        raise InputError("dry_run is true or false, and number a whole number")
    if options["speed"] > 1:
        raise InputError(f"speed={options['speed']} must be at most 1, the limit's")
    return options


def look(robot: ProcessRobot, segments: Segments, seconds: float) -> None:
    """Print what the arm is and where, and how often it and its cameras say something, and how late.

    Raises `InputError` when one of them is gone.
    """
    arm = robot.arm
    print(f"when our process dies: {arm.watchdog}")
    print(f"setpoints at {arm.rate:g} Hz; the process runs with priority {arm.priority}")
    rings = {"arm": arm.states} | {key: RingReader(segments.path / f"camera {key}") for key in robot.cameras}
    times: dict[str, list[float]] = {name: [] for name in rings}
    ages: dict[str, list[float]] = {name: [] for name in rings}
    start, shown = time.monotonic(), 0
    while (now := time.monotonic()) < start + seconds:
        for name, ring in rings.items():
            record = ring.latest()
            if record is not None and record.t not in times[name][-1:]:
                times[name].append(record.t)
                ages[name].append(now - record.t)
        if now - start >= shown:
            _check_alive(robot)
            _show(arm)
            shown += 1
        time.sleep(0.002)
    for name in rings:
        rate, age = len(times[name]) / seconds, 1e3 * float(np.median(ages[name] or [np.nan]))
        print(f"{name}: {rate:.0f} new per second, {age:.0f} ms old when they are seen")


def _show(arm: ArmLink) -> None:
    arm.renew()
    record = arm.states.latest()
    assert record is not None
    groups = (f"{group.name} {record.values[group.name].round(3).tolist()} {group.unit}" for group in arm.state)
    print("; ".join(groups))


def _check_alive(robot: ProcessRobot) -> None:
    for key, child in robot.cameras.items():
        if not child.alive:
            child.wait_ready()  # raises what it has said
            raise InputError(f"camera {key}: its process has died")
    if robot.arm.phase is Phase.BROKEN:
        raise InputError(f"the arm: {'; '.join(robot.arm.events()) or 'its process has ended'}")


def motion(arm: ArmLink, number: int, distance: float, speed: float) -> tuple[np.ndarray, np.ndarray]:
    """Times (s, from 0) and commands [n, A]: number `number` on half a cosine to `distance` and back.

    Slow enough for `speed` of its largest velocity, and for half of its acceleration and jerk.
    """
    record, limits = arm.last_setpoint(), arm.limits
    kinds = [group.kind for group in arm.command for _ in range(group.size)]
    if not 0 <= number < len(kinds) or kinds[number] != "linear":
        moving = [i for i, kind in enumerate(kinds) if kind == "linear"]
        raise InputError(f"number={number} is none that moves on a line; those are {moving}")
    start = record.values["command"]
    if start[number] + distance > limits.high[number]:
        distance = -distance
    if start[number] + distance < limits.low[number]:
        raise InputError(f"distance={abs(distance)} has no room on either side of {start[number]:.4f}")
    assert limits.velocity is not None
    assert limits.acceleration is not None
    assert limits.jerk is not None
    most = (speed * limits.velocity[number], 0.5 * limits.acceleration[number], 0.5 * limits.jerk[number])
    omega = min((2 * value / abs(distance)) ** (1 / order) for order, value in enumerate(most, 1))
    times = np.arange(0, 2 * np.pi / omega + 2 * STEP, STEP)
    commands = np.tile(start, (len(times), 1))
    commands[:, number] += distance / 2 * (1 - np.cos(np.minimum(omega * times, 2 * np.pi)))
    return times, commands


def move(arm: ArmLink, times: np.ndarray, commands: np.ndarray, number: int) -> tuple[list[str], np.ndarray]:
    """Go through it, and rest. Returns what the arm's process did against it, and [n, 2]: sent and measured.

    From here on this process runs before others, where the system lets it.
    """
    prefer(PRIORITY)
    seen: list[tuple[float, float]] = []
    events = travel(arm, times, commands, lambda: seen.append(_sent_and_measured(arm, number)))
    return events, np.array(seen)


def _sent_and_measured(arm: ArmLink, number: int) -> tuple[float, float]:
    """Where number `number` is now, by the last setpoint and by the arm's own encoders."""
    name, index = [(group.name, i) for group in arm.command for i in range(group.size)][number]
    sent, measured = arm.last_setpoint(), arm.states.latest()
    assert measured is not None
    return float(sent.values["command"][number]), float(measured.values[name][index])


def run(options: dict[str, Any]) -> int:
    """Look, and move where it was asked for. Returns the exit code."""
    cell = read_cell(options["hardware"])
    setup, cameras = arm_setup(options["robot"], cell, dry_run=options["dry_run"]), camera_setups(cell)
    segments = Segments()
    robot = ProcessRobot(segments=segments, arm=setup, cameras=cameras, control_rate=1 / STEP, max_steps=1)
    try:
        look(robot, segments, float(options["seconds"]))
        number = options["number"]
        if number is None:
            print("nothing was asked to move: number=N moves that number of a command")
            return 0
        times, commands = motion(robot.arm, number, float(options["distance"]), float(options["speed"]))
        path = commands[:, number]
        far = path[np.abs(path - path[0]).argmax()]
        print(f"number {number} goes from {path[0]:.4f} to {far:.4f} and back, in {times[-1]:.1f} s")
        return _moved(robot.arm, times, commands, number, dry=options["dry_run"])
    finally:
        robot.close()


def _moved(arm: ArmLink, times: np.ndarray, commands: np.ndarray, number: int, *, dry: bool) -> int:
    events, seen = move(arm, times, commands, number)
    for event in events:
        print(f"the arm's process intervened: {event}")
    told, went = np.ptp(seen, axis=0)
    print(f"it was told to go {told:.4f}, and went {went:.4f}" + (", as in a dry run it should not" if dry else ""))
    return 1 if events or (not dry and abs(went - told) > 0.2 * told) else 0


def main(words: Sequence[str]) -> int:
    try:
        return run(parse(words))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the arm is stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
