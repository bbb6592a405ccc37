"""What simulated hardware has in common: a world that goes on in real time, an arm in it, and cameras over it.

    arm's process             simulator's process         camera's process (each)
    SimulatedArm.send ─ targets ─▶ SimulatedWorld ─ world ─▶ SimulatedCamera.read
    SimulatedArm.read ◀──── world ─────┘   ▲
                                           └─ starts ─ loop's process

The simulator is to the arm what a robot's own controller is: it follows targets while they come, and when none has come
for 0.1 s it holds the arm where it is. That is its watchdog, should the arm's process die.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from action_diffusion.deploy.hardware.protocols import ArmState, Frame
from action_diffusion.deploy.ipc.processes import Ending, prefer, report
from action_diffusion.deploy.ipc.rings import Fields, Record, RingReader, RingWriter
from action_diffusion.errors import InputError, unknown

STARTS: Fields = {"seed": ("i8", ()), "runs": ("?", ())}
COMMON: Fields = {
    "reward": ("f8", ()),
    "done": ("?", ()),
    "starts": ("i8", ()),  # orders that have been obeyed
    "runs": ("?", ()),
    "lost": ("f8", ()),  # s of real time, since the simulator began, in which the world should have moved and stood
}
MOST_LATENCY = 10.0
"""Seconds."""
STAMPED = ("capture", "arrival")
WATCHDOG = 0.1
SILENCE, PATIENCE = 0.5, 30.0
"""Without news for so long (s) a world that runs is gone, and one that is being set up."""
PRIORITY = 40
"""The world waits for nobody but the arm's process, which has more."""
_CATCH_UP = 0.05
_NEVER = float("inf")


def stood_still(seconds: float) -> str | None:
    """What is said of a world that stood still as its process was not woken; None for what is shown as 0.00 s."""
    return (
        f"the simulator stood still for {seconds:.2f} s: this machine is too busy for it" if seconds >= 0.005 else None
    )


class SimulatedWorld(ABC):
    """The simulator: reads the rings `starts` and `targets`, and writes `world`, with a record each period.

    Args:
        folder: the run's shared memory.
        fields: of the ring `world`, beside `COMMON`: what `values` gives.
        latency: from a target to its effect (s), as a slow robot has it.
    """

    rate: float
    """Periods per second (Hz)."""

    def __init__(self, folder: Path, *, fields: Fields, latency: float) -> None:
        self._folder, self._latency = folder, latency
        self._starts_ring, self._starts = RingReader(folder / "starts"), 0
        self._targets: RingReader | None = None
        self._began = _NEVER
        self._outcome = (0.0, False)
        self.lost = 0.0
        self._world = RingWriter(folder / "world", fields={**fields, **COMMON}, n_slots=256)
        self.publish(time.monotonic())

    @abstractmethod
    def reset(self, seed: int) -> None:
        """Set up start number `seed`."""

    @abstractmethod
    def advance(self, target: np.ndarray | None) -> tuple[float, bool]:
        """One period, towards `target`; None: hold the arm where it is. Returns the reward, and whether it is over."""

    @abstractmethod
    def values(self) -> Mapping[str, np.ndarray | int]:
        """The world as it is now."""

    @property
    def runs(self) -> bool:
        return self._began < _NEVER

    def step(self, now: float) -> None:
        """Whatever was asked for, and the period that ends at `now` (monotonic s)."""
        for record in self._starts_ring.after(self._starts - 1):
            if record.values["runs"]:
                self._began = record.t
            else:  # a new start stands still until it is told to run
                self._began, self._outcome = _NEVER, (0.0, False)
                self.publish(now)
                self.reset(int(record.values["seed"]))
            self._starts = record.number + 1
        if self.runs:
            self._outcome = self.advance(self._target(now - 1 / self.rate - self._latency))
        self.publish(now)

    def _target(self, then: float) -> np.ndarray | None:
        """The newest target that had been sent at `then`, unless it is of before the start, or too old."""
        if self._targets is None and (self._folder / "targets").exists():
            self._targets = RingReader(self._folder / "targets")
        if self._targets is None:
            return None
        n = 2 + int((time.monotonic() - then) * 500)
        sent = self._targets.last(min(n, self._targets.n_slots - 1))
        due = [record for record in sent if max(self._began, then - WATCHDOG) < record.t <= then]
        return due[-1].values["target"] if due else None

    def publish(self, now: float) -> None:
        """The state as it is at `now` (monotonic s)."""
        reward, done = self._outcome
        common = {"reward": reward, "done": done, "starts": self._starts, "runs": self.runs, "lost": self.lost}
        self._world.append(now, {**self.values(), **common})


def keep_time(world: SimulatedWorld, folder: Path, name: str, said: dict[str, object]) -> None:
    """Say that it is there, and what it is (`said`), and live until the process is asked to end or has no parent.

    A period is lived through at its end, with the target of its beginning, and stamped with its end on the simulator's
    own clock. Up to 50 ms of lost time are made up for; more are lost, and counted.
    """
    ending = Ending()
    report(folder, name, {"rate": world.rate, "priority": prefer(PRIORITY), **said})
    start, index = time.monotonic(), 0
    while not ending:
        index += 1
        now = start + index / world.rate
        time.sleep(max(0.0, now - time.monotonic()))
        world.step(now)
        behind = time.monotonic() - now
        if behind > _CATCH_UP:
            start += behind - _CATCH_UP
            world.lost += (behind - _CATCH_UP) * world.runs


class SimulatedArm(ABC):
    """What a driver of a simulated arm has to do, beside saying what its commands are: `size` numbers of a target."""

    size: int
    watchdog = f"the simulator holds the arm where it is when no target has come for {WATCHDOG} s"

    def __init__(self, *, world: str) -> None:
        self._folder = Path(world)

    def connect(self) -> None:
        self._world = RingReader(self._folder / "world")
        self._targets = RingWriter(self._folder / "targets", fields={"target": ("f8", (self.size,))}, n_slots=512)

    def read(self) -> ArmState:
        """Raises `TimeoutError` where the simulator has been silent for half a second."""
        record = self._world.latest()
        if record is None or time.monotonic() - record.t > (SILENCE if record.values["runs"] else PATIENCE):
            raise TimeoutError("the simulator is silent")
        return self.state_of(record)

    @abstractmethod
    def state_of(self, record: Record) -> ArmState:
        """Of a record of the world."""

    def send(self, setpoint: np.ndarray) -> None:
        self._targets.append(time.monotonic(), {"target": setpoint})

    def stop(self) -> None:  # noqa: B027
        """Nothing to do: without targets the simulator holds the arm."""

    def close(self) -> None:  # noqa: B027
        pass


class SimulatedCamera(ABC):
    """A camera that takes pictures of the world at its own rate.

    Args:
        world: the folder of the run's shared memory, in which the simulator is.
        image_size: of its frames, [image_size, image_size, 3].
        rate: frames per second (Hz).
        latency, jitter: a frame arrives so long (s) after its exposure, and up to so much more.
        drop: share of frames that never arrive, in [0, 1).
        die_after: the process dies after so many seconds, as kill -9 would have it; 0: it does not.
        seed: of jitter and drops.
        stamped: with the frame's exposure ("capture"), or its "arrival", as by a camera that does not know better.
    """

    def __init__(
        self,
        *,
        world: str,
        image_size: int,
        rate: float = 20.0,
        latency: float = 0.0,
        jitter: float = 0.0,
        drop: float = 0.0,
        die_after: float = 0.0,
        seed: int = 0,
        stamped: str = "capture",
    ) -> None:
        if not (0 < rate <= 1000 and 0 <= latency <= MOST_LATENCY and 0 <= jitter <= MOST_LATENCY and 0 <= drop < 1):
            raise InputError(f"a camera with rate={rate}, latency={latency}, jitter={jitter}, drop={drop} cannot be")
        self.shape: tuple[int, ...] = (image_size, image_size, 3)
        self.rate = rate
        self._folder, self._latency, self._jitter, self._drop = Path(world), latency, jitter, drop
        if stamped not in STAMPED:
            raise unknown("simulated.camera.stamped", stamped, STAMPED)
        self._die_after, self._on_arrival = die_after, stamped == "arrival"
        self._random = np.random.default_rng(seed)

    def connect(self) -> None:
        self._world = RingReader(self._folder / "world")
        self.prepare()
        self._start, self._index = time.monotonic(), 0

    @abstractmethod
    def prepare(self) -> None:
        """Be ready to draw."""

    @abstractmethod
    def drawn(self, record: Record) -> np.ndarray:
        """The picture of a record of the world, as `shape` has it: see `protocols.Frame`."""

    def read(self) -> Frame:
        """The next frame. Raises `TimeoutError` for one that is dropped, and while a world that runs is silent."""
        now = time.monotonic()
        if self._die_after and now - self._start > self._die_after:
            os._exit(9)
        self._index = max(self._index + 1, int((now - self._start) * self.rate))
        time.sleep(max(0.0, self._start + self._index / self.rate - now))
        record = self._next()
        if record is None or self._random.random() < self._drop:
            raise TimeoutError("no frame")
        if time.monotonic() - record.t > (2 / self.rate if record.values["runs"] else PATIENCE):
            raise TimeoutError("no frame: the simulator is silent")
        arrives = record.t + self._latency + self._jitter * self._random.random()
        frame = Frame(arrives if self._on_arrival else record.t, self.drawn(record))
        time.sleep(max(0.0, arrives - time.monotonic()))
        return frame

    def _next(self) -> Record | None:
        """The world as it becomes next, since what is there is up to a period old; as it was, while it is set up."""
        count, deadline = self._world.count, time.monotonic() + 0.02
        while self._world.count == count and time.monotonic() < deadline:
            time.sleep(0.001)
        return self._world.latest()

    def close(self) -> None:  # noqa: B027
        pass
