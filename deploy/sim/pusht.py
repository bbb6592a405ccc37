"""PushT in real time, its arm and camera as three processes (see `world`), and an arm without dynamics."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.hardware.protocols import ArmState, Group
from action_diffusion.deploy.ipc.processes import serve
from action_diffusion.deploy.ipc.rings import Record
from action_diffusion.deploy.sim.world import SimulatedArm, SimulatedCamera, SimulatedWorld, keep_time
from action_diffusion.envs.pusht.simulator import IMAGE_SIZE, PHYSICS_RATE, PushT


class PushTWorld(SimulatedWorld):
    """The simulator, at 100 Hz."""

    rate = PHYSICS_RATE

    def __init__(self, folder: Path, *, latency: float = 0.0) -> None:
        self._env = PushT(control_rate=PHYSICS_RATE, max_steps=10**9)
        self._env.reset(0)
        super().__init__(folder, fields={"state": ("f8", (5,))}, latency=latency)

    def reset(self, seed: int) -> None:
        self._env.reset(seed)

    def advance(self, target: np.ndarray | None) -> tuple[float, bool]:
        return self._env.step(self._env.observe(["agent_pos"])["agent_pos"] if target is None else target)

    def values(self) -> dict[str, np.ndarray]:
        return self._env.observe(["state"])


def run(*, folder: Path, name: str, latency: float = 0.0) -> None:
    """The simulator's process."""
    keep_time(PushTWorld(folder, latency=latency), folder, name, {})


class PushTArm(SimulatedArm):
    """PushT's finger. Commands are targets in px, held until the next, and followed by the simulator with a lag.

    Args:
        world: the folder of the run's shared memory, in which the simulator is.
        max_step: how far a target may be from the one before (px). People's are up to 135 apart, and 176 from the
            finger.
    """

    rate = 200.0
    control_rate = 10.0
    size = 2
    command: tuple[Group, ...] = (Group(name="target", size=2, kind="hold", unit="px", at_stop="present"),)
    state: tuple[Group, ...] = (
        Group(name="target", size=2, kind="linear", unit="px"),
        Group(name="agent_pos", size=2, kind="linear", unit="px"),
        Group(name="state", size=5, kind="hold", unit="px, px, px, px, rad"),
    )

    def __init__(self, *, world: str, max_step: float = 300.0) -> None:
        super().__init__(world=world)
        self.limits: Limits | None = Limits(
            low=np.zeros(2), high=np.full(2, 512.0), max_step=np.full(2, float(max_step))
        )

    def state_of(self, record: Record) -> ArmState:
        state = record.values["state"]
        return ArmState(record.t, {"target": state[:2], "agent_pos": state[:2], "state": state})


class PushTCamera(SimulatedCamera):
    """A camera over PushT's table."""

    def __init__(self, *, world: str, image_size: int = IMAGE_SIZE, **settings: Any) -> None:
        super().__init__(world=world, image_size=image_size, **settings)

    def prepare(self) -> None:
        self._env = PushT(image_size=self.shape[0])

    def drawn(self, record: Record) -> np.ndarray:
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
        self.command: tuple[Group, ...] = (
            Group(name="joints", size=n_joints, kind="linear", unit="rad"),
            Group(name="gripper", size=1, kind="hold"),
        )
        self.state: tuple[Group, ...] = self.command
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
