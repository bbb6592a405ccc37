"""Simulated hardware in real time: PushT with its arm and camera as three processes, and an arm without dynamics.

    arm's process          simulator (100 Hz)            camera's process
    PushTArm.send ─ targets ─▶ PushTWorld ─ world ─▶ PushTCamera.read
    PushTArm.read ◀─── world ──────┘

The simulator is to the arm what a robot's own controller is: it follows targets while they come, and when none has come
for 0.1 s it holds the finger where it is. That is its watchdog, should the arm's process die.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from action_diffusion.deploy.limits import Limits
from action_diffusion.deploy.processes import Ending, report, serve
from action_diffusion.deploy.protocols import ArmState, Frame, Group
from action_diffusion.deploy.rings import Fields, Record, RingReader, RingWriter
from action_diffusion.envs.pusht import IMAGE_SIZE, PHYSICS_RATE, PushT
from action_diffusion.errors import InputError

TARGETS: Fields = {"target": ("f8", (2,))}
WORLD: Fields = {
    "state": ("f8", (5,)),
    "reward": ("f8", ()),
    "done": ("?", ()),
    "starts": ("i8", ()),
    "runs": ("?", ()),
}
STARTS: Fields = {"seed": ("i8", ()), "runs": ("?", ())}
WATCHDOG = 0.1
_CATCH_UP = 5


class PushTWorld:
    """The simulator. `latency` (s): from a target to its effect, as a slow robot has it."""

    def __init__(self, folder: Path, *, latency: float = 0.0) -> None:
        self._env = PushT(control_rate=PHYSICS_RATE, max_steps=10**9)
        self._folder, self._latency = folder, latency
        self._world = RingWriter(folder / "world", fields=WORLD, n_slots=256)
        self._starts_ring, self._starts = RingReader(folder / "starts"), 0
        self._targets: RingReader | None = None
        self._runs, self._outcome = False, (0.0, False)
        self._env.reset(0)
        self.publish()

    def step(self) -> None:
        """0.01 s of the world, and whatever was asked for meanwhile."""
        for record in self._starts_ring.after(self._starts - 1):
            self._starts = record.number + 1
            self._runs = bool(record.values["runs"])
            if not self._runs:  # a new start stands still until it is told to run
                self._env.reset(int(record.values["seed"]))
                self._outcome = (0.0, False)
        if self._runs:
            self._outcome = self._env.step(self._target(time.monotonic()))
        self.publish()

    def _target(self, now: float) -> np.ndarray:
        if self._targets is None and (self._folder / "targets").exists():
            self._targets = RingReader(self._folder / "targets")
        n = 2 + int(self._latency * 500)
        sent = [] if self._targets is None else self._targets.last(min(n, self._targets.n_slots - 1))
        due = [record for record in sent if record.t <= now - self._latency]
        if due and now - self._latency - due[-1].t < WATCHDOG:
            return due[-1].values["target"]
        return self._env.observe(["agent_pos"])["agent_pos"]

    def publish(self) -> None:
        """The state as it is now."""
        state, (reward, done) = self._env.observe(["state"])["state"], self._outcome
        values = {"state": state, "reward": reward, "done": done, "starts": self._starts, "runs": self._runs}
        self._world.append(time.monotonic(), values)


def run(*, folder: Path, name: str, latency: float = 0.0) -> None:
    """The simulator's process, until it is asked to end or has no parent. Up to 50 ms of lost time are made up for."""
    ending = Ending()
    world = PushTWorld(folder, latency=latency)
    report(folder, name, {"rate": PHYSICS_RATE})
    start, index = time.monotonic(), 0
    while not ending:
        world.step()
        index += 1
        behind = (time.monotonic() - start) * PHYSICS_RATE - index
        if behind > _CATCH_UP:
            start += (behind - _CATCH_UP) / PHYSICS_RATE
        time.sleep(max(0.0, -behind / PHYSICS_RATE))


class PushTArm:
    """PushT's finger. Commands are targets in px, held until the next, and followed by the simulator with a lag.

    Args:
        world: the folder of the run's shared memory, in which the simulator is.
        max_step: how far a target may be from the one before (px). People's are up to 135 apart, and 176 from the
            finger.
    """

    rate = 200.0
    command = (Group(name="target", size=2, kind="hold", unit="px", at_stop="present"),)
    state = (
        Group(name="target", size=2, kind="linear", unit="px"),
        Group(name="agent_pos", size=2, kind="linear", unit="px"),
        Group(name="state", size=5, kind="hold", unit="px, px, px, px, rad"),
    )
    watchdog = f"the simulator holds the finger where it is when no target has come for {WATCHDOG} s"

    def __init__(self, *, world: str, max_step: float = 300.0) -> None:
        self._folder = Path(world)
        self.limits: Limits | None = Limits(
            low=np.zeros(2), high=np.full(2, 512.0), max_step=np.full(2, float(max_step))
        )

    def connect(self) -> None:
        self._world = RingReader(self._folder / "world")
        self._targets = RingWriter(self._folder / "targets", fields=TARGETS, n_slots=512)

    def read(self) -> ArmState:
        """Raises `TimeoutError` where the simulator has been silent for half a second."""
        record = self._world.latest()
        if record is None or time.monotonic() - record.t > 0.5:
            raise TimeoutError("the simulator is silent")
        state = record.values["state"]
        return ArmState(record.t, {"target": state[:2], "agent_pos": state[:2], "state": state})

    def send(self, setpoint: np.ndarray) -> None:
        self._targets.append(time.monotonic(), {"target": setpoint})

    def stop(self) -> None:
        """Nothing to do: without targets the simulator holds the finger."""

    def close(self) -> None:
        pass


class PushTCamera:
    """A camera over PushT's table, [image_size, image_size, 3].

    Args:
        world: as for `PushTArm`.
        rate: frames per second (Hz).
        latency, jitter: a frame arrives so long (s) after its exposure, and up to so much more.
        drop: share of frames that never arrive, in [0, 1).
        die_after: the process dies after so many seconds, as kill -9 would have it; 0: it does not.
        seed: of jitter and drops.
    """

    def __init__(
        self,
        *,
        world: str,
        image_size: int = IMAGE_SIZE,
        rate: float = 20.0,
        latency: float = 0.0,
        jitter: float = 0.0,
        drop: float = 0.0,
        die_after: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not (rate > 0 and latency >= 0 and jitter >= 0 and 0 <= drop < 1):
            raise InputError(f"a camera with rate={rate}, latency={latency}, jitter={jitter}, drop={drop} cannot be")
        self.shape, self.rate = (image_size, image_size, 3), rate
        self._folder, self._latency, self._jitter, self._drop = Path(world), latency, jitter, drop
        self._die_after = die_after
        self._random = np.random.default_rng(seed)

    def connect(self) -> None:
        self._world = RingReader(self._folder / "world")
        self._env = PushT(image_size=self.shape[0])
        self._start, self._index = time.monotonic(), 0

    def read(self) -> Frame:
        """The next frame. Raises `TimeoutError` for one that is dropped, and while the simulator is silent."""
        now = time.monotonic()
        if self._die_after and now - self._start > self._die_after:
            os._exit(9)
        self._index = max(self._index + 1, int((now - self._start) * self.rate))
        time.sleep(max(0.0, self._start + self._index / self.rate - now))
        record = self._world.latest()
        if record is None or time.monotonic() - record.t > 2 / self.rate or self._random.random() < self._drop:
            raise TimeoutError("no frame")
        frame = Frame(record.t, self._drawn(record))
        arrives = record.t + self._latency + self._jitter * self._random.random()
        time.sleep(max(0.0, arrives - time.monotonic()))
        return frame

    def _drawn(self, record: Record) -> np.ndarray:
        self._env.restore(record.values["state"])
        return self._env.observe(["image"])["image"]

    def close(self) -> None:
        self._env.close()


class IdealArm:
    """An arm that is where its setpoints are, for tests and benchmarks: n joints (rad) and a gripper.

    Its limits have to be given by the user. `start` [n + 1]: where it stands.
    """

    watchdog = "it has no motors"
    limits: Limits | None = None

    def __init__(self, *, n_joints: int = 6, rate: float = 200.0, start: Sequence[float] | None = None) -> None:
        self.rate = rate
        self.command = (
            Group(name="joints", size=n_joints, kind="linear", unit="rad"),
            Group(name="gripper", size=1, kind="hold"),
        )
        self.state = self.command
        self._at = np.zeros(n_joints + 1) if start is None else np.array(start, dtype=np.float64)

    def connect(self) -> None:
        pass

    def read(self) -> ArmState:
        return ArmState(time.monotonic(), {"joints": self._at[:-1], "gripper": self._at[-1:]})

    def send(self, setpoint: np.ndarray) -> None:
        self._at = setpoint.copy()

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


def main() -> int:
    return serve(run)


if __name__ == "__main__":
    sys.exit(main())
