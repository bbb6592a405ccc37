"""What an arm does when its policy has gone mad: n messages of nonsense through the gate, as the arm's process has it.

    python -m benchmarks.robustness.fuzz [n=1000000] [seed=0]

The process's own loop runs on a virtual clock with an arm that notes every setpoint; nothing here looks at what the
loop thinks of them. Messages are waypoints that are NaN, infinite, huge, stale, out of order, of a wrong shape, or
right, and now and then a stop or the bytes of no message at all. Exit code: 0, 1 where a setpoint left the limits or
the loop broke, 2 for bad input.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from action_diffusion.deploy.arm.loop import ArmLoop
from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.ipc.channels import COMMANDS, CommandWriter, Phase, text
from action_diffusion.deploy.ipc.rings import RingReader
from action_diffusion.deploy.loop.clock import VirtualClock
from action_diffusion.deploy.sim.pusht import IdealArm
from benchmarks.command import command, options, whole

N_JOINTS = 6
RATES = ("velocity", "acceleration", "jerk")


@dataclass
class FuzzOutcome:
    """messages, setpoints: how many. followed: messages that passed. reasons: of refusals, counted by how
    they begin. worst: the largest share of each limit that a setpoint used. broken: why the loop broke, or None."""

    messages: int = 0
    setpoints: int = 0
    followed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    worst: dict[str, float] = field(default_factory=dict)
    broken: str | None = None

    @property
    def safe(self) -> bool:
        return self.broken is None and all(share <= 1 + 1e-2 for share in self.worst.values())


class _Noted(IdealArm):
    """Compares every setpoint with the limits, by differences, in blocks."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(n_joints=N_JOINTS)
        self.bounds, self.worst, self.count = limits, dict.fromkeys(("range", "step", *RATES), 0.0), 0
        self._rows: list[np.ndarray] = [self._at] * 4

    def send(self, setpoint: np.ndarray) -> None:
        super().send(setpoint)
        self._rows.append(setpoint.copy())
        self.count += 1
        if len(self._rows) >= 4096:
            self.compare()

    def compare(self) -> None:
        """Look at what was sent since the last time."""
        rows, limits = np.array(self._rows), self.bounds
        shares = {"range": np.abs(2 * rows - limits.low - limits.high) / (limits.high - limits.low)}
        assert limits.max_step is not None
        shares["step"] = np.abs(np.diff(rows[:, -1], axis=0)) / limits.max_step[-1]
        for order, name in enumerate(RATES, start=1):
            shares[name] = np.abs(np.diff(rows[:, :-1], n=order, axis=0)) * self.rate**order
            shares[name] = shares[name] / getattr(limits, name)[:-1]
        for name, share in shares.items():
            worst = float(share.max()) if np.isfinite(share).all() else float("inf")
            self.worst[name] = max(self.worst[name], worst)
        self._rows = self._rows[-4:]


def fuzz(n: int, seed: int, folder: Path, progress: Callable[[int], None] = lambda done: None) -> FuzzOutcome:
    """Send `n` messages; `folder` is for the rings."""
    random, clock = np.random.default_rng(seed), VirtualClock()
    clock.advance(100.0)
    full = np.ones(N_JOINTS + 1)
    limits = Limits(low=-full, high=full, max_step=full, velocity=2 * full, acceleration=10 * full, jerk=200 * full)
    arm = _Noted(limits)
    writer = CommandWriter(folder, clock.now)
    loop = ArmLoop(arm=arm, limits=limits, folder=folder)
    events, heard = RingReader(folder / "events"), -1
    outcome = FuzzOutcome()
    for number in range(n):
        if loop.phase is Phase.STILL:
            writer.begin()
        _send(writer, random, clock.now())
        for _ in range(random.integers(1, 4)):
            clock.advance(loop.period)
            loop.cycle(clock.now(), clock.now)
        for event in events.after(heard):
            heard = event.number
            words = text(event.values["why"])
            outcome.reasons[f"{text(event.values['kind'])}: {words[:24]}"] += 1
        if loop.phase is Phase.BROKEN:
            outcome.broken = words
            break
        if number % 1000 == 0:
            progress(number)
    arm.compare()
    outcome.messages, outcome.setpoints, outcome.worst = number + 1, arm.count, arm.worst
    refused = sum(count for words, count in outcome.reasons.items() if words.startswith("refused"))
    outcome.followed = outcome.messages - refused
    return outcome


def _send(writer: CommandWriter, random: np.random.Generator, now: float) -> None:
    """One message, right or wrong in one of many ways, or in several."""
    n = int(random.choice([1, 2, 4, 16, 64]))
    times = now + random.uniform(-0.05, 0.2) + np.cumsum(random.uniform(0.005, 0.2, n))
    values = np.cumsum(random.normal(0, 0.02, (n, N_JOINTS + 1)), axis=0) + random.uniform(-0.9, 0.9, N_JOINTS + 1)
    values = np.clip(values, -1, 1)
    what = random.integers(0, 16)
    bad = random.random(values.shape) < random.choice([0.02, 0.5, 1.0])
    if what == 0:
        values[bad] = random.choice([np.nan, np.inf, -np.inf])
    elif what == 1:
        values[bad] *= 10.0 ** random.uniform(0, 300)
    elif what == 2:
        times += 10.0 ** random.uniform(-2, 12) * random.choice([-1, 1])
    elif what == 3:
        random.shuffle(times)
    elif what == 4:
        times[random.integers(n)] = random.choice([np.nan, np.inf, -np.inf, now])
    elif what == 5:
        values = values[:, : random.integers(0, N_JOINTS + 1)]
    elif what == 6:
        values = np.zeros((random.integers(0, 3) * 70, random.integers(0, 40)))
        times = np.arange(float(len(values)))
    elif what == 7:
        times = times[: random.integers(0, n)]
    elif what == 8 and random.random() < 0.05:
        writer.stop("nonsense")
        return
    elif what == 9:
        values = random.uniform(-1, 1, values.shape)
    elif what == 10 and random.random() < 0.3:
        _garbage(writer, random, now)
        return
    writer.follow(times, values)


def _garbage(writer: CommandWriter, random: np.random.Generator, now: float) -> None:
    """A record whose fields are random bytes, but for a kind that exists."""
    record: dict[str, np.ndarray] = {}
    for name, (dtype, shape) in COMMANDS.items():
        size = int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize
        record[name] = np.frombuffer(random.bytes(size), dtype=dtype).reshape(shape)
    record["kind"] = np.array(random.integers(0, 4), np.int32)
    writer.send_record(now - random.choice([0.0, 1.0, -1.0, np.nan]), record)


@command
def main(words: Sequence[str]) -> int:
    """See the module."""
    given = options(words, {"n": "1000000", "seed": "0"})
    n, seed = whole("n", given["n"]), whole("seed", given["seed"], least=0)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        outcome = fuzz(n, seed, Path(folder), lambda done: print(f"\r{done}", end="", flush=True))
    print(f"\r{outcome.messages} messages, {outcome.followed} followed, {outcome.setpoints} setpoints")
    for reason, count in outcome.reasons.most_common(20):
        print(f"{count:9d}  {reason} …")
    print("largest share of a limit:", ", ".join(f"{name} {share:.4f}" for name, share in outcome.worst.items()))
    print("no setpoint left the limits" if outcome.safe else f"UNSAFE: {outcome.broken or outcome.worst}")
    return 0 if outcome.safe else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
