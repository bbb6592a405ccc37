"""The arm's process: it alone talks to the arm, and it trusts nobody.

    commands ring ─▶ WaypointGate ─▶ Path ─▶ Shaper ─▶ SetpointCheck ─▶ Arm.send
                         └ refused              └ brakes before a limit     └ vendor's stop
    heartbeats, parent, emergency stop ─▶ controlled stop

It begins a controlled stop when the loop's process dies (pidfd), when the loop or a camera dies, is halted or hangs
(its state in /proc, its heartbeat), when anybody marks the emergency stop, when it is asked to, and when it is to end.
A driver that raises gets the vendor's stop. Where this process itself dies, the robot's own watchdog must act:
`Arm.watchdog`.

What it leaves in shared memory, for anybody to read: `state`, `setpoints` (both at the arm's rate), and `events`.
"""

from __future__ import annotations

import contextlib
import gc
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from action_diffusion.deploy.arm.loop import ArmLoop
from action_diffusion.deploy.hardware.command import CommandLayout
from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.hardware.obstacles import Obstacles
from action_diffusion.deploy.hardware.protocols import Arm, check_arm, make_arm
from action_diffusion.deploy.ipc.channels import Phase
from action_diffusion.deploy.ipc.processes import USUAL, Ending, Watched, prefer, report, serve
from action_diffusion.deploy.ipc.rings import Moment
from action_diffusion.errors import InputError

_LATE = 0.2
"""A period that is late by a larger share of it is left out: setpoints sent at once are a jump to the arm."""
PRIORITY = 50
LONGEST_STOP = 5.0
"""After so many seconds (s) of braking the vendor's stop takes over, and the process ends."""


def run(
    *,
    folder: Path,
    name: str,
    driver: str,
    settings: Mapping[str, object],
    limits: Mapping[str, object] | None,
    obstacles: Mapping[str, object] | None,
    watch: Sequence[str],
) -> None:
    """Connect, say so in NAME.json, and serve until asked to end, or until the parent is gone and the arm at rest.

    Args:
        folder: the run's shared memory; removed at the end where the parent can no longer do so.
        driver, settings: see `protocols.make_arm`.
        limits: the user's, as `Limits.of` reads them; the vendor's are added.
        obstacles: as `Obstacles.of` reads them.
        watch: names of heartbeats in `folder`, without ".beat", that the arm needs to move.

    Raises:
        InputError: for an arm that must not be started.
    """
    ending = Ending()
    arm = make_arm(driver, **settings)
    check_arm(arm)
    combined = _combined(arm, limits)
    arm.connect()
    try:
        loop = ArmLoop(
            arm=arm,
            limits=combined,
            obstacles=Obstacles.of(obstacles),
            folder=folder,
            watch={watched: Watched(folder / f"{watched}.beat") for watched in watch},
            emergency=Moment(folder / "emergency"),
            ending=lambda: _why(ending),
        )
        priority = prefer(PRIORITY, everything=getattr(arm, "threaded", False))
        if priority == USUAL:
            print("arm: no right to a higher priority, so setpoints may be late: docs/deploy.md", file=sys.stderr)
        told = {"rate": arm.rate, "watchdog": arm.watchdog, "limits": combined.plain(), "priority": priority}
        groups = {"command": [asdict(group) for group in arm.command], "state": [asdict(group) for group in arm.state]}
        report(folder, name, told | groups)
        _cycle(loop, ending)
    finally:
        with contextlib.suppress(Exception):
            arm.stop()
        arm.close()
        if ending.orphaned:
            shutil.rmtree(folder, ignore_errors=True)


def _combined(arm: Arm, limits: Mapping[str, object] | None) -> Limits:
    """The user's limits and the vendor's, complete."""
    if limits:
        user = Limits.of(limits)
    elif arm.limits is not None:
        user = arm.limits
    else:
        raise InputError("limits has no values, and the arm's driver knows none: nothing moves without")
    combined = user.within(arm.limits)
    CommandLayout(arm.command).check_limits(combined)
    return combined


def _why(ending: Ending) -> str | None:
    if ending.orphaned:
        return "the process of the loop died"
    return "the arm's process was asked to end" if ending.asked else None


def _cycle(loop: ArmLoop, ending: Ending) -> None:
    """Periods on an absolute schedule; one that comes too late is left out, and not made up for."""
    gc.collect()
    gc.freeze()
    gc.disable()
    start, index, last = time.monotonic(), 0, float("inf")
    while loop.phase is not Phase.BROKEN:
        loop.cycle(start + index * loop.period, time.monotonic)
        now = time.monotonic()
        if ending:
            last = min(last, now + LONGEST_STOP)
            if loop.phase is Phase.STILL or now > last:
                return
        index = max(index + 1, math.ceil((now - start) / loop.period - _LATE))
        time.sleep(max(0.0, start + index * loop.period - now))


def main() -> int:
    return serve(run)


if __name__ == "__main__":
    sys.exit(main())
