"""What moves: one small protocol for the loop, and PushT behind it, in this process.

Arms in processes of their own are behind the same protocol: `process_robot.ProcessRobot`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np

from action_diffusion import envs
from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.envs.base import Env
from action_diffusion.errors import InputError, unknown
from action_diffusion.options import Simulated
from action_diffusion.policy.spec import PolicySpec
from action_diffusion.registry import ARMS, imported
from action_diffusion.registry import ROBOTS as REAL_TIME

if TYPE_CHECKING:
    from action_diffusion.deploy.robot.process_robot import ProcessRobot

Feedback = tuple[float | None, bool]
"""The reward in [0, 1], where something measures one, and whether the episode is over."""


class Observation(NamedTuple):
    """values: by key, all as they were at `t` (s on the loop's clock)."""

    t: float
    values: dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class RobotTask:
    """What a robot must know of what it is for, with or without a policy.

    control_rate: commands per second (Hz). env: the simulator of the task, its name and settings, if it has one.
    cameras: keys of the images, and of the depth, that are looked at.
    """

    control_rate: float = 10.0
    env: Mapping[str, Any] | None = None
    cameras: tuple[str, ...] = ()

    @classmethod
    def of(cls, spec: PolicySpec) -> RobotTask:
        """For a policy."""
        return cls(control_rate=spec.control_rate, env=spec.env, cameras=tuple(spec.cameras))


class RobotOptions(Protocol):
    """What a robot in real time is made of: options of `deploy` and `collect`."""

    @property
    def robot(self) -> str | None: ...
    @property
    def hardware(self) -> str | None: ...
    @property
    def dry_run(self) -> bool: ...
    @property
    def limits(self) -> Mapping[str, object] | None: ...
    @property
    def obstacles(self) -> Mapping[str, object] | None: ...
    @property
    def simulated(self) -> Simulated: ...


class Robot(Protocol):
    """Something that takes commands [A], targets in the units of its demonstrations, and keeps to the last one.

    Attributes:
        control_rate: commands per second (Hz).
        max_steps: commands after which an episode is over.
        limits: what the robot itself allows, where it says so.
        lookahead: commands beyond the present one that it wants to know, to move smoothly; 0 where it holds each.
        processes: itself, where arm and cameras are processes of their own, whose shared memory others may look into.
    """

    control_rate: float
    max_steps: int
    limits: Limits | None
    lookahead: int

    @property
    def processes(self) -> ProcessRobot | None: ...

    def begin(self, seed: int) -> None:
        """Be ready for an episode; a simulator begins at the start that `seed` stands for."""

    def observe(self, keys: Sequence[str], t: float) -> Observation:
        """The observations named by `keys`, of one instant: the latest until `t` (s on the loop's clock) of which all
        are known. Raises `InputError` for one that it does not have."""
        ...

    def command(self, actions: Sequence[np.ndarray], t: float) -> Feedback:
        """Go on with `actions`, [A] each: the first is due at `t` (s on the loop's clock), each further one a control
        period later; there are 1 to 1 + `lookahead`, and the next call replaces what is left of them."""
        ...

    def hold(self) -> Feedback:
        """For one control period, keep to the last command, or to the present place where there was none."""
        ...

    def events(self) -> list[str]:
        """What the robot's own guards did since the last call, and why; one line each."""
        ...

    def stop(self) -> None:
        """Come to a rest and forget the last command. Called whenever an episode ends, however it ends."""

    def close(self) -> None:
        """Let go of the robot."""


class SimPushT:
    """PushT's finger as a robot: commands are targets in px, [0, 512].

    The simulator moves on by one control period with each command; while it waits for a late one it stands still.
    """

    def __init__(self, *, env: Env) -> None:
        self.control_rate = env.control_rate
        self.max_steps = env.max_steps
        self.limits: Limits | None = Limits(low=np.zeros(2), high=np.full(2, 512.0))
        self.lookahead = 0
        self.processes: ProcessRobot | None = None
        self._env = env
        self._target: np.ndarray | None = None

    def begin(self, seed: int) -> None:
        """Begin at the paper's start number `seed`."""
        self._env.reset(seed)
        self._target = None

    def observe(self, keys: Sequence[str], t: float) -> Observation:
        """See `envs.pusht.PushT`. The simulator stands still meanwhile, so that it is as of any `t`."""
        return Observation(t, self._env.observe(keys))

    def command(self, actions: Sequence[np.ndarray], t: float) -> Feedback:
        """Move the finger towards the first of `actions` [2] for 0.1 s."""
        self._target = np.array(actions[0])
        return self._env.step(self._target)

    def hold(self) -> Feedback:
        """Keep the finger's target for 0.1 s; without one, stay where the finger is."""
        target = self._env.observe(["agent_pos"])["agent_pos"] if self._target is None else self._target
        return self._env.step(target)

    def events(self) -> list[str]:
        """Nothing guards a simulator."""
        return []

    def stop(self) -> None:
        """Forget the target: the finger stays where it is."""
        self._target = None

    def close(self) -> None:
        """Release the simulator."""
        self._env.close()


def make(name: str, task: RobotTask, options: RobotOptions | None = None) -> Robot:
    """The robot called `name`, set up for `task`; "module:Class" is an arm's driver of the user's own.

    `options`: of the configuration, for a robot in real time, which runs in processes of its own. Without them: a
    simulator in this process, for clocks that are not real. Raises `InputError` for an unknown name, and for a robot
    that does not start.
    """
    if options is None:
        if name not in ROBOTS and name in REAL_TIME:
            raise InputError(f"robot={name} is there in real time only")
        if name not in ROBOTS:
            raise unknown("robot", name, ROBOTS)
        return ROBOTS[name](task)
    if name not in REAL_TIME and (":" in name or name in ARMS):
        return cast(Robot, imported("action_diffusion.deploy.robot.cell:robot")(task, options))
    return cast(Robot, REAL_TIME.load(name)(task, options))


def check_fit(robot: Robot, spec: PolicySpec) -> None:
    """Raises `InputError` where policy and robot do not fit: number of actions, control rate."""
    n = spec.action.shape[0]
    if robot.limits is not None and len(robot.limits.low) != n:
        raise InputError(f"the bundle's actions have {n} values, the robot takes {len(robot.limits.low)}")
    if robot.control_rate != spec.control_rate:
        raise InputError(
            f"the bundle's actions are meant for {spec.control_rate:g} Hz, "
            f"the robot takes commands at {robot.control_rate:g} Hz"
        )


def in_processes(name: str, task: RobotTask, options: RobotOptions) -> ProcessRobot:
    """As `make`, and `InputError` for a robot without processes of its own."""
    robot = make(name, task, options)
    if robot.processes is None:
        robot.close()
        raise InputError(f"robot={name} has no processes of its own, which this needs")
    return robot.processes


def _sim_pusht(task: RobotTask) -> Robot:
    """With the simulator's settings of the bundle, so that deployment shows what evaluation measured."""
    settings = task.env if task.env is not None and task.env.get("name") == "pusht" else {"name": "pusht"}
    return SimPushT(env=envs.make(**settings))


ROBOTS: dict[str, Callable[[RobotTask], Robot]] = {"sim_pusht": _sim_pusht}
