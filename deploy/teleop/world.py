"""What is driven, behind one protocol: a simulator that waits for the person, or a robot, which does not.

The columns are those of `collect agent=expert`: what is worth recording of a simulator, its cameras, `action` and
`reward`. An observation is of the moment before the action that it is recorded with.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from action_diffusion.datasets.images.pictures import preview
from action_diffusion.datasets.storage.growing_column import Fields
from action_diffusion.deploy.hardware.command import CommandLayout
from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.hardware.protocols import Group
from action_diffusion.deploy.loop.gate import Gate
from action_diffusion.deploy.robot.process_robot import ProcessRobot
from action_diffusion.deploy.robot.robots import Feedback
from action_diffusion.envs.demonstration import Simulator
from action_diffusion.rotations import axis_angle_to_6d

PUSHT_STEP = 300.0
"""How far one of PushT's targets may be from the one before (px), as for `deploy.sim.PushTArm`."""


class World(Protocol):
    """Something that takes actions [A], one a control step.

    Attributes:
        control_rate: actions per second (Hz).
        fields: of a recorded step.
        groups: of an action; None where it is a relative one of a simulated arm.
        limits: of actions, for the gate.
        waits: time stands still while nobody drives.
        attrs: what a recording says of it.
    """

    control_rate: float
    fields: Fields
    groups: tuple[Group, ...] | None
    limits: Limits
    waits: bool
    attrs: dict[str, object]

    def prepare(self, seed: int) -> None:
        """The next episode begins at the start that `seed` stands for; show it."""

    def begin(self) -> None:
        """Be ready for actions. Raises `InputError` where a robot is not."""

    def present(self) -> np.ndarray:
        """Where it is in terms of an action, [A]; empty for relative actions."""
        ...

    def observe(self) -> dict[str, np.ndarray]:
        """A recorded step, but for action and reward."""
        ...

    def resume(self, present: np.ndarray) -> None:
        """The person drives from now on, also after a pause, from `present`."""

    def step(self, action: np.ndarray, tick: float) -> tuple[np.ndarray, Feedback]:
        """Execute `action` [A] in the control step that began at `tick` (monotonic s).

        Also returns what is recorded as this step's action, float32.
        """
        ...

    def hold(self) -> bool:
        """For this control step nobody drives. Returns whether the episode is over because of it."""
        ...

    def scene(self) -> dict[str, list[float]]:
        """What the page draws, beside pictures."""
        ...

    def picture(self) -> np.ndarray | None:
        """For people, uint8 [H, W, 3]; None where `scene` says it all."""
        ...

    def events(self) -> list[str]:
        """What its own guards did since the last call, and why."""
        ...

    def stop(self) -> None:
        """The episode is over."""

    def close(self) -> None:
        """Let go of it."""


class SteppedWorld:
    """A simulator in this process. Its clock is the person's: no step, no time.

    Args:
        env: a simulator.
        cameras: keys of images to record, beside what it says is worth recording.
        plane: actions are targets in PushT's plane; otherwise relative ones of an arm.
    """

    waits = True

    def __init__(self, env: Simulator, cameras: Sequence[str] = (), *, plane: bool) -> None:
        self._env, self._keys, self._flat = env, [*env.recorded, *cameras], plane
        self.control_rate = env.control_rate
        (size,) = env.action_shape
        if self._flat:
            self.groups: tuple[Group, ...] | None = (Group(name="target", size=2, kind="hold", unit="px"),)
            self.limits = Limits(low=np.zeros(2), high=np.full(2, 512.0), max_step=np.full(2, PUSHT_STEP))
        else:
            self.groups = None
            self.limits = Limits(low=np.full(size, -1.0), high=np.ones(size))
        env.reset(0)
        seen = env.observe(self._keys)
        self.fields: Fields = {key: (value.dtype.str, value.shape) for key, value in seen.items()}
        self.fields = {**self.fields, "action": ("<f4", (size,)), "reward": ("<f4", ())}
        self.attrs = {"control_rate": env.control_rate, **env.metadata()}

    def prepare(self, seed: int) -> None:
        self._env.reset(seed)

    def begin(self) -> None:
        pass

    def present(self) -> np.ndarray:
        return self._env.observe(["agent_pos"])["agent_pos"].astype(np.float64) if self._flat else np.zeros(0)

    def observe(self) -> dict[str, np.ndarray]:
        return self._env.observe(self._keys)

    def resume(self, present: np.ndarray) -> None:
        pass

    def step(self, action: np.ndarray, tick: float) -> tuple[np.ndarray, Feedback]:
        return action, self._env.step(action)

    def hold(self) -> bool:
        return False

    def scene_of(self, seed: int) -> Mapping[str, str]:
        """What the simulator says of the episode that `seed` stands for."""
        self._env.reset(seed)
        return self._env.episode_metadata()

    def scene(self) -> dict[str, list[float]]:
        return {"state": self._env.observe(["state"])["state"].round(3).tolist()} if self._flat else {}

    def picture(self) -> np.ndarray | None:
        return None if self._flat else self._env.render(256)

    def events(self) -> list[str]:
        return []

    def stop(self) -> None:
        pass

    def close(self) -> None:
        self._env.close()


class RobotWorld:
    """A robot in processes of its own, simulated or real: its time goes on, and where nobody drives it holds.

        tick              k            k + 1
        the person says   c[k]         c[k+1]
        the arm is at     c[k-1] ────▶ c[k] ────▶         so that it moves steadily
        row               o[k], c[k-1]                    as `deploy` executes it: step To-1 of a chunk is for now

    Where commands are held and not interpolated, c[k] is for tick k, and recorded there. Rotations are recorded as 6D.

    Args:
        robot: in whose processes the arm's gate and its watchdog are.
        keys: what to record: states, and cameras.
        attrs: what a recording says of it.
    """

    waits = False

    def __init__(self, robot: ProcessRobot, keys: Sequence[str], attrs: Mapping[str, object]) -> None:
        self._robot, self._keys, self._seed = robot, list(keys), 0
        self.control_rate = robot.control_rate
        self.groups: tuple[Group, ...] | None = robot.arm.command
        self._layout = CommandLayout(robot.arm.command)
        self.limits = command_limits(self._layout, robot.arm.limits)
        self._attrs = {"control_rate": robot.control_rate, **attrs}
        self.attrs = dict(self._attrs)
        seen = robot.observe(self._keys, time.monotonic()).values
        self.fields: Fields = {key: (value.dtype.str, value.shape) for key, value in seen.items()}
        self._before = np.zeros(self._layout.size)
        self.fields = {**self.fields, "action": ("<f4", action_of(self._layout, self._before).shape)}
        if robot.scene is not None:
            self.fields = {**self.fields, "reward": ("<f4", ())}
        self._camera = next(iter(robot.cameras), None)

    @property
    def robot(self) -> ProcessRobot:
        return self._robot

    def prepare(self, seed: int) -> None:
        self._seed = seed

    def begin(self) -> None:
        self._robot.begin(self._seed)

    def present(self) -> np.ndarray:
        return place_of(self._robot)

    def observe(self) -> dict[str, np.ndarray]:
        return self._robot.observe(self._keys, time.monotonic()).values

    def resume(self, present: np.ndarray) -> None:
        self._before = present

    def step(self, action: np.ndarray, tick: float) -> tuple[np.ndarray, Feedback]:
        """Commands that are interpolated are places to be at by the next tick; see the class."""
        command = action.astype(np.float64)
        if not self._robot.lookahead:
            return action_of(self._layout, command), self._robot.command([command], tick)
        before, self._before = self._before, command
        return action_of(self._layout, before), self._robot.command([before, command], tick)

    def hold(self) -> bool:
        return self._robot.hold()[1]

    def scene(self) -> dict[str, list[float]]:
        if self._robot.plane is None:
            return {}
        return {"state": self._robot.observe(["state"], time.monotonic()).values["state"].round(3).tolist()}

    def picture(self) -> np.ndarray | None:
        if self._camera is None or self._robot.plane is not None:
            return None
        seen = self._robot.observe([self._camera], time.monotonic()).values[self._camera]
        return preview(seen) if seen.ndim == 2 else seen

    def events(self) -> list[str]:
        return self._robot.events()

    def stop(self) -> None:
        self._robot.stop()

    def close(self) -> None:
        self._robot.close()


def place_of(robot: ProcessRobot) -> np.ndarray:
    """Where the arm is now in terms of a command, float64 [A]."""
    names = [group.name for group in robot.arm.command]
    seen = robot.observe(names, time.monotonic()).values
    return np.concatenate([seen[name].astype(np.float64) for name in names])


def action_of(layout: CommandLayout, command: np.ndarray) -> np.ndarray:
    """`command` [A] as an action float32 [A + 3 each], with 6D rotations: see `CommandLayout.from_actions`."""
    parts = [
        axis_angle_to_6d(command[part]) if group.kind == "rotation" else command[part]
        for group, part in layout.slices()
    ]
    return np.concatenate(parts).astype(np.float32)


def command_limits(layout: CommandLayout, limits: Limits) -> Limits:
    """Limits of commands, from those of coordinates: a rotation's, which count from its reference, are the arm's alone.

    The steps of interpolated numbers are those of the arm's process too, which smooths them.
    """
    low, high = limits.low.copy(), limits.high.copy()
    for group, part in layout.slices():
        if group.kind == "rotation":
            low[part], high[part] = -np.inf, np.inf
    return Limits(low=low, high=high, max_step=limits.max_step)


def is_plane(world: World) -> bool:
    """Whether actions are points of PushT's plane."""
    return world.groups is not None and [group.name for group in world.groups] == ["target"]


def gate_of(world: World) -> Gate:
    """The gate that every action passes before the world sees it, as in `deploy`."""
    return Gate(limits=world.limits)
