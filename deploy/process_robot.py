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
from typing import Any, Protocol

import numpy as np

from action_diffusion.deploy.alignment import interpolated, latest_common, nearest
from action_diffusion.deploy.arm_link import ArmLink, ArmSetup
from action_diffusion.deploy.arm_loop import Phase
from action_diffusion.deploy.limits import Limits
from action_diffusion.deploy.processes import Child
from action_diffusion.deploy.rings import RingReader, RingWriter, Segments
from action_diffusion.deploy.robots import Feedback, Observation
from action_diffusion.errors import InputError, unknown
from action_diffusion.policy.spec import PolicySpec


@dataclass(frozen=True, kw_only=True)
class CameraSetup:
    """A camera as a configuration has it: see `protocols.make_camera`."""

    driver: str
    settings: Mapping[str, Any] = field(default_factory=dict)


class Scene(Protocol):
    """What is around the arm: where it is simulated, it can be set up, and it says how well the task goes."""

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
    """See `robots.Robot`. Everything is ready when this returns, and nothing moves before `begin`.

    Args:
        segments: the run's shared memory; removed by `close`.
        arm, cameras: what to start; cameras by the observation's key.
        control_rate, max_steps: of the loop's commands.
        scene: a simulated surrounding, which has its processes; None for a real one, where nobody gives rewards.
        derived: further observations, computed from a state: key → (state, function).

    Attributes:
        plane: for the page, where commands are points of a picture: {"camera": its key, or None for an empty one,
            "size": [width, height] of it in the commands' unit}.

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
        self._frames: dict[str, RingReader] = {}
        self._explained = False
        self._arm: ArmLink | None = None
        self.plane: dict[str, Any] | None = None
        try:
            names = {key: f"camera {key}" for key in cameras}
            for key, setup in cameras.items():
                arguments = {"driver": setup.driver, "settings": dict(setup.settings)}
                module = "action_diffusion.deploy.camera_process"
                self.cameras[key] = Child(module, segments.path, names[key], arguments)
            for key, child in self.cameras.items():
                child.wait_ready()
                self._frames[key] = RingReader(segments.path / names[key])
            self._arm = ArmLink(folder=segments.path, setup=arm, watch=list(names.values()))
        except BaseException:
            self.close()
            raise
        self.limits: Limits | None = self._arm.limits if _plain_numbers(self._arm) else None
        self.lookahead = 0 if all(group.kind == "hold" for group in self._arm.command) else 8

    @property
    def folder(self) -> Path:
        """Of the run's shared memory."""
        return self._segments.path

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
        if self._scene is not None:
            self.arm.rest()
            self._scene.begin(seed)
        self.arm.begin()
        if self._scene is not None:
            self._scene.run()
        self._explained = False

    def observe(self, keys: Sequence[str], t: float) -> Observation:
        """States are interpolated, and float32; images are the frames nearest to the instant."""
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
        """See `Robot`. Returns at once, with the reward of now; over where the arm has stopped by itself."""
        self.arm.follow(t + np.arange(len(actions)) / self.control_rate, np.stack(actions))
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
        alive, said = self.arm.child.alive, self.arm.events()
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


class PushTScene:
    """PushT's simulator in a process of its own: see `sim`."""

    def __init__(self, folder: Path, *, latency: float) -> None:
        from action_diffusion.deploy.sim import STARTS

        self._starts = RingWriter(folder / "starts", fields=STARTS, n_slots=8)
        self.child = Child("action_diffusion.deploy.sim", folder, "simulator", {"latency": latency})
        try:
            self.child.wait_ready()
        except BaseException:
            self.child.end()
            raise
        self._world = RingReader(folder / "world")

    def begin(self, seed: int) -> None:
        self._tell(seed, runs=False)

    def run(self) -> None:
        self._tell(0, runs=True)

    def _tell(self, seed: int, *, runs: bool) -> None:
        number = self._starts.append(time.monotonic(), {"seed": seed, "runs": runs})
        deadline = time.monotonic() + 3
        while (record := self._world.latest()) is None or record.values["starts"] <= number:
            if time.monotonic() > deadline or not self.child.alive:
                raise InputError("the simulator does not answer")
            time.sleep(0.002)

    def feedback(self) -> Feedback:
        record = self._world.latest()
        assert record is not None
        return float(record.values["reward"]), bool(record.values["done"])

    def close(self) -> None:
        self.child.end()


def sim_pusht(spec: PolicySpec, options: Mapping[str, Any]) -> ProcessRobot:
    """PushT in real time, with the bundle's settings of the simulator, and the configuration's `simulated`."""
    from action_diffusion.envs.pusht import IMAGE_SIZE, keypoints

    env = spec.env if spec.env is not None and spec.env.get("name") == "pusht" else {}
    simulated = options["simulated"]
    segments = Segments()
    world = {"world": str(segments.path)}
    cameras = {}
    if "image" in spec.observations:
        size = {"image_size": env.get("image_size", IMAGE_SIZE)}
        cameras["image"] = CameraSetup(driver="sim_pusht", settings=world | size | simulated["camera"])
    scene = None
    try:
        scene = PushTScene(segments.path, latency=simulated["latency"])
        made = ProcessRobot(
            segments=segments,
            arm=ArmSetup(driver="sim_pusht", settings=world, limits=options["limits"], obstacles=options["obstacles"]),
            cameras=cameras,
            control_rate=10.0,
            max_steps=int(env.get("max_steps", 300)),
            scene=scene,
            derived={"keypoint": ("state", lambda state: keypoints(state[None])[0])},
        )
        made.plane = {"camera": "image" if cameras else None, "size": [512.0, 512.0]}
        return made
    except BaseException:
        if scene is None:
            segments.remove()
        raise
