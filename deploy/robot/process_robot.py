"""A robot whose arm, cameras and simulator are processes of their own, behind the loop's `Robot` protocol.

loop's process                                                      kill it, halt it, …
  observe ◀── frame rings ── camera's process (each)                 … and the arm's process stops the arm
  observe ◀── state ring ─── arm's process ── driver ── arm          … and the arm's own watchdog does
  command ──▶ commands ────▶ arm's process
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypedDict

import numpy as np

from action_diffusion.deploy.arm.link import ArmLink, ArmSetup
from action_diffusion.deploy.cameras.alignment import interpolated, latest_common, nearest
from action_diffusion.deploy.hardware.command import CommandLayout
from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.ipc.channels import Phase
from action_diffusion.deploy.ipc.processes import Child
from action_diffusion.deploy.ipc.rings import RingReader, Segments
from action_diffusion.deploy.robot.robots import Feedback, Observation
from action_diffusion.errors import InputError, unknown

UNSEEN = 10.0
"""How long a camera may take (s) until it shows a new start."""


@dataclass(frozen=True, kw_only=True)
class CameraSetup:
    """A camera as a configuration has it: see `protocols.make_camera`. stamp_latency: by how much its stamps are late
    (s), as `deploy calibrate=true` finds it."""

    driver: str
    settings: Mapping[str, object] = field(default_factory=dict)
    stamp_latency: float = 0.0


class Plane(TypedDict):
    """What a page draws where commands are points of a picture.

    camera: its key; None for an empty one. size: [width, height] of it in the commands' unit. board: PushT's
    (`sim.robots.board`), drawn where there is no camera.
    """

    camera: str | None
    size: list[float]
    board: Mapping[str, object]


class Scene(Protocol):
    """What is around the arm: where it is simulated, it can be set up, and it says how well the task goes.

    Attributes:
        lost: real time (s) in which it should have gone on and stood still, so far.
    """

    @property
    def lost(self) -> float: ...

    def begin(self, seed: int) -> None:
        """Set up start number `seed`, and keep it still."""

    def run(self) -> None:
        """The arm is ready: let time pass."""

    def feedback(self) -> Feedback:
        """The reward in [0, 1], and whether the task is over."""
        ...

    def close(self) -> None:
        """End it."""


class ProcessRobot:
    """See `robot.robots.Robot`. Everything is ready when this returns, and nothing moves before `begin`.

    Args:
        segments: the run's shared memory; removed by `close`.
        arm, cameras: what to start; cameras by the observation's key.
        control_rate, max_steps: of the loop's commands.
        scene: a simulated surrounding, which has its processes; None for a real one, where nobody gives rewards.
        derived: further observations, computed from a state: key → (state, function).

    Attributes:
        stamp_latency: of each camera, what is taken off its stamps (s).
        plane: for the page, where commands are points of a picture.
        layout: of the arm's commands.

    Raises:
        InputError: with the reason of whoever does not start.
    """

    def __init__(
        self,
        *,
        segments: Segments,
        arm: ArmSetup,
        cameras: Mapping[str, CameraSetup],
        control_rate: float,
        max_steps: int,
        scene: Scene | None = None,
        derived: Mapping[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] | None = None,
    ) -> None:
        self.control_rate, self.max_steps = control_rate, max_steps
        self._segments, self._scene, self._derived = segments, scene, derived or {}
        self.cameras: dict[str, Child] = {}
        self.stamp_latency = {key: setup.stamp_latency for key, setup in cameras.items()}
        self._frames: dict[str, RingReader] = {}
        self._explained = False
        self._refused: list[str] = []
        self._arm: ArmLink | None = None
        self.plane: Plane | None = None
        try:
            arm.check()
            names = {key: f"camera {key}" for key in cameras}
            for key, setup in cameras.items():
                arguments: dict[str, object] = {"driver": setup.driver, "settings": dict(setup.settings)}
                arguments["stamp_latency"] = setup.stamp_latency
                module = "action_diffusion.deploy.cameras.process"
                self.cameras[key] = Child(module, segments.path, names[key], arguments)
            for key, child in self.cameras.items():
                child.wait_ready()
                self._frames[key] = RingReader(segments.path / names[key])
            self._arm = ArmLink(folder=segments.path, setup=arm, watch=list(names.values()))
        except BaseException:
            self.close()
            raise
        self.layout = CommandLayout(self._arm.command)
        self.limits: Limits | None = self._arm.limits if _plain_numbers(self._arm) else None
        self.lookahead = 0 if all(group.kind == "hold" for group in self._arm.command) else 8

    @property
    def processes(self) -> ProcessRobot:
        """Itself."""
        return self

    @property
    def folder(self) -> Path:
        """Of the run's shared memory."""
        return self._segments.path

    @property
    def scene(self) -> Scene | None:
        """The simulated surrounding, if there is one."""
        return self._scene

    @property
    def arm(self) -> ArmLink:
        """The arm's process."""
        assert self._arm is not None
        return self._arm

    def begin(self, seed: int) -> None:
        """See `Robot`. Raises `InputError` where the arm, or a camera, is not well."""
        for key, child in self.cameras.items():
            if not child.alive:
                raise InputError(f"camera {key}: its process has died")
            if child.halted:  # the arm would stop as soon as it began, or not begin
                raise InputError(f"camera {key}: its process is halted")
        if self._scene is not None:
            self.arm.rest()
            self._scene.begin(seed)
        begun = time.monotonic()
        self.arm.begin()
        if self._scene is not None:
            self._see(begun)
            self._scene.run()
        self._explained = False

    def _see(self, since: float) -> None:
        """Wait until nothing is shown that is of before `since`, or the arm has stopped, since a camera is not well.

        Raises `InputError` where that does not end.
        """
        deadline = time.monotonic() + UNSEEN
        waiting: dict[str, RingReader] = {"the arm": self.arm.states}
        waiting |= {f"camera {key}": ring for key, ring in self._frames.items()}
        while waiting and self.arm.phase is Phase.MOVING:
            waiting = {name: ring for name, ring in waiting.items() if ring.times(1)[-1][1] < since}
            if time.monotonic() > deadline:
                raise InputError(f"{', '.join(waiting)}: nothing was seen of the new start for {UNSEEN:g} s")
            self.arm.renew()
            time.sleep(0.002)

    def observe(self, keys: Sequence[str], t: float) -> Observation:
        """States are interpolated, and float32; images and depth are the frames nearest to the instant."""
        self.arm.renew()
        states = {group.name for group in self.arm.state}
        for key in keys:
            if key not in states and key not in self._frames and key not in self._derived:
                raise unknown("observation", key, [*states, *self._frames, *self._derived], "the robot's sources")
        seen = [self._frames[key] for key in keys if key in self._frames]
        instant = latest_common(t, [*seen, self.arm.states])
        assert instant is not None  # each source had a record before it was ready
        state = interpolated(self.arm.states, self.arm.state, instant)
        values: dict[str, np.ndarray] = {}
        for key in keys:
            if key in self._frames:
                values[key] = nearest(self._frames[key], instant).values["image"]
            elif key in self._derived:
                source, derive = self._derived[key]
                values[key] = derive(state[source]).astype(np.float32)
            else:
                values[key] = state[key].astype(np.float32)
        return Observation(instant, values)

    def command(self, actions: Sequence[np.ndarray], t: float) -> Feedback:
        """See `Robot`. Returns at once, with the reward of now; over where the arm has stopped by itself.

        Rotations may be 6D: see `CommandLayout.from_actions`.
        """
        try:
            waypoints = self.layout.from_actions(np.stack(actions))
        except InputError as error:
            self._refused.append(f"refused: {error}")
            return self.hold()
        self.arm.follow(t + np.arange(len(actions)) / self.control_rate, waypoints)
        return self._feedback()

    def hold(self) -> Feedback:
        """The arm goes on to the last waypoint that it has, and rests there."""
        self.arm.renew()
        return self._feedback()

    def _feedback(self) -> Feedback:
        reward, done = (None, False) if self._scene is None else self._scene.feedback()
        return reward, done or self.arm.phase is not Phase.MOVING

    def events(self) -> list[str]:
        """What the arm's process did, and why."""
        alive, said = self.arm.child.alive, [*self._refused, *self.arm.events()]
        self._refused.clear()
        self._explained = self._explained or any(reason.startswith("broken: ") for reason in said)
        if not alive and not self._explained:
            said.append("the arm's process has died")
            self._explained = True
        return said

    def stop(self) -> None:
        """A controlled stop; returns when the arm is at rest."""
        self.arm.rest()

    def close(self) -> None:
        """Stop and end everything, and remove the shared memory."""
        if self._arm is not None:
            self._arm.close()
        for child in self.cameras.values():
            child.end()
        if self._scene is not None:
            self._scene.close()
        self._segments.remove()


def _plain_numbers(arm: ArmLink) -> bool:
    """Whether limits, which are on coordinates, are limits on commands too: where nothing turns."""
    return all(group.kind != "rotation" for group in arm.command)
