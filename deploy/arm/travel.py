"""A way that is known beforehand, waypoint by waypoint, through all that a policy's commands pass too."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from action_diffusion.deploy.arm.link import ArmLink
from action_diffusion.deploy.hardware.command import CommandLayout
from action_diffusion.deploy.hardware.limits import RATES, Limits
from action_diffusion.deploy.ipc.channels import Phase

STEP = 0.05
"""Between two waypoints (s)."""
AHEAD = 8
"""Waypoints that the arm knows at once."""
PACE = (0.25, 0.5, 0.5)
"""Shares of the limits of velocity, acceleration and jerk that a way across may take."""


def travel(arm: ArmLink, times: np.ndarray, commands: np.ndarray, look: Callable[[], None] = lambda: None) -> list[str]:
    """Be at `commands` [n, A] at `times` [n], s from now on, and rest; `look` is called at each of them.

    Returns what the arm's process did against it, which ends it. Raises `InputError` where the arm does not begin.
    """
    arm.begin()
    start, events = time.monotonic() + 2 * STEP, list[str]()
    try:
        for i in range(len(times)):
            time.sleep(max(0.0, start + times[i] - STEP - time.monotonic()))
            arm.follow(start + times[i : i + AHEAD], commands[i : i + AHEAD])
            look()
            events += arm.events()
            if events or arm.phase is not Phase.MOVING:
                break
        time.sleep(4 * STEP)
    finally:
        arm.rest()
    return events + arm.events()


def way(layout: CommandLayout, limits: Limits, start: np.ndarray, goal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times [n] (s, from 0) and commands [n, A] from `start` to `goal`, [A] each, at rest at both ends.

    On the straight line, and the shortest turn, on half a cosine of time, at `PACE`. What is held, such as a gripper,
    changes first, by its `max_step` at once.
    """
    a, b = layout.to_coordinates(start), layout.to_coordinates(goal)
    distance, seconds, held = np.abs(b - a), STEP, layout.held
    for order, (name, share) in enumerate(zip(RATES, PACE, strict=True), 1):
        if len(layout.smooth):  # the largest of half a cosine: distance / 2 · (π / seconds)^order
            longest = (distance / getattr(limits, name))[layout.smooth].max()
            seconds = max(seconds, np.pi * float(longest / (2 * share)) ** (1 / order))
    most = np.zeros(0) if limits.max_step is None else limits.max_step[held]
    jumps = int(np.ceil(distance[held] / most - 1e-9).max()) if len(held) else 0
    times = STEP * np.arange(max(int(np.ceil(seconds / STEP)), jumps) + 1)
    shares = (1 - np.cos(np.pi * np.minimum(1.0, times / seconds))) / 2
    points = np.stack([layout.between(a, b, float(share)) for share in shares])
    for i, point in enumerate(points):
        point[held] += np.clip((b - a)[held], -i * most, i * most)
    return times, layout.to_command(points)
