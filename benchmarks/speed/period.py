"""How well the arm's process keeps its period on a machine that is busy, and whether it ever stops for nothing.

    python -m benchmarks.speed.period [seconds=30] [load=2] [rate=200]

`load` processes compute all the time, as a policy and a recording would, while a loop at 10 Hz sends waypoints to an
arm without motors. Exit code: 0, 1 where the 99th percentile of the period is off by more than 2 ms or where the arm
stopped for nothing, 2 for bad input. A long one, `seconds=1800`, is the test for false stops.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from action_diffusion.deploy.arm.link import ArmLink, ArmSetup
from action_diffusion.deploy.ipc.rings import Segments
from benchmarks.command import command, options, positive, whole

SPIN = "import numpy as np\na = np.ones((200, 200))\nwhile True: a = np.tanh(a @ a / 200)"
LIMITS = {"low": [-2.0] * 7, "high": [2.0] * 7, "max_step": [1.0] * 7}
LIMITS |= {"velocity": [2.0] * 7, "acceleration": [10.0] * 7, "jerk": [200.0] * 7}


@dataclass(frozen=True)
class Periods:
    """periods: all of them (s). events: what the arm's process said. priority: how it runs."""

    periods: np.ndarray
    events: list[str]
    priority: str
    period: float

    @property
    def off(self) -> float:
        """The 99th percentile of how far a period is from what it should be (s)."""
        return float(np.percentile(np.abs(self.periods - self.period), 99))


def measure(*, seconds: float, load: int, rate: float) -> Periods:
    """Run it. Raises `InputError` where the arm does not start."""
    segments = Segments()
    spinning = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(load)]
    try:
        setup = ArmSetup(driver="ideal", settings={"n_joints": 6, "rate": rate}, limits=LIMITS)
        arm = ArmLink(folder=segments.path, setup=setup)
        try:
            arm.begin()
            times, events = _follow(arm, seconds)
        finally:
            arm.close()
    finally:
        for process in spinning:
            process.kill()
            process.wait()
        segments.remove()
    return Periods(np.diff(times), events, arm.priority, 1 / rate)


def _follow(arm: ArmLink, seconds: float) -> tuple[np.ndarray, list[str]]:
    """Send the arm to and fro; returns when each setpoint was sent, and what happened."""
    start, times, last = time.monotonic(), [], arm.setpoints.count
    events: list[str] = []
    while (now := time.monotonic()) < start + seconds:
        ahead = now + 0.1 * np.arange(8)
        place = np.sin(ahead - start)[:, None] * np.array([0.5] * 6 + [0.0])
        arm.follow(ahead, place)
        events += arm.events()
        records = arm.setpoints.after(last - 1)
        times += [record.t for record in records]
        last = arm.setpoints.count
        time.sleep(max(0.0, now + 0.1 - time.monotonic()))
    return np.array(times), events


@command
def main(words: Sequence[str]) -> int:
    """See the module."""
    given = options(words, {"seconds": "30", "load": "2", "rate": "200"})
    seconds, rate = positive("seconds", given["seconds"]), positive("rate", given["rate"])
    measured = measure(seconds=seconds, load=whole("load", given["load"], least=0), rate=rate)
    shares = (0, 0.1, 1, 50, 99, 99.9, 100)
    percentiles = ", ".join(f"{q} %: {1e3 * np.percentile(measured.periods, q):.2f}" for q in shares)
    print(f"{len(measured.periods)} periods of {1e3 * measured.period:g} ms, priority {measured.priority}")
    print(f"period (ms)  {percentiles}")
    print(f"99th percentile of the difference: {1e3 * measured.off:.2f} ms")
    print(f"stops and refusals for nothing: {measured.events or 0}")
    return 0 if measured.off <= 0.002 and not measured.events else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
