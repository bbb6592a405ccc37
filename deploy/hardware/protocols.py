"""What a driver of an arm or a camera is. Drivers live in processes of their own and know nothing of policies.

    arm's process     Arm.connect ─▶ at `rate`: Arm.read ─▶ state ring ;  gate ─▶ interpolation ─▶ check ─▶ Arm.send
    camera's process  Camera.connect ─▶ Camera.read ─▶ frame ring

A driver is built inside its process by its name (`action_diffusion.registry`) and plain keyword values (numbers,
strings, booleans, lists of them); its constructor checks them and touches no hardware, `connect` does. Hardware
libraries are imported in `connect` or later, and a missing one is an `InputError` that says what to install. What a
driver raises after `connect` ends its process: the arm is stopped, and the policy's side is told why.

Units: m, rad, s, unless a `Group` says otherwise. Times: `time.monotonic()`, which all processes of a machine share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import numpy as np

from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.errors import InputError, unknown
from action_diffusion.registry import ARMS, CAMERAS, Registry, imported

KINDS = ("linear", "rotation", "hold")
AT_STOP = ("keep", "present")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Numbers of a command, or of a state, that mean one thing together.

    Attributes:
        name: "joints", "position", "rotation", "gripper", … In an observation a state has its group's name.
        size: how many numbers.
        kind: what lies between two of them.
            linear    on the straight line between (joint angles, positions, a gripper that is driven smoothly)
            rotation  a rotation vector (size 3, rad): the shortest turn at a steady rate (slerp)
            hold      the earlier one, until the time of the later (a gripper's open and close, PushT's target)
        unit: for people and records: "rad", "m", "px", "".
        at_stop: where a stop leaves the command of a held number, and the next beginning that of any: "keep" it (a
            gripper must not let go, an arm that sags must not sink), or "present", command the place where it is (a
            target; an arm that is set up anew between episodes).
        reference: of a rotation: the rotation vector from which its limits count; choose the tool's usual one.
            Limits low and high must keep to turns of less than pi from there.
    """

    name: str
    size: int
    kind: str
    unit: str = ""
    at_stop: str = "keep"
    reference: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind", self.kind, KINDS, f"group {self.name}")
        if self.at_stop not in AT_STOP:
            raise unknown("at_stop", self.at_stop, AT_STOP, f"group {self.name}")
        if self.size < 1 or (self.kind == "rotation" and self.size != 3):
            raise InputError(f"group {self.name} has {self.size} numbers; a rotation has 3, others at least 1")


class ArmState(NamedTuple):
    """values: of each state group, its name → float64 [size], as they were at `t` (monotonic s)."""

    t: float
    values: dict[str, np.ndarray]


class Arm(Protocol):
    """An arm, as its process sees it. All methods are called from one thread.

    Attributes:
        rate: setpoints per second (Hz), 100–500; `send` is called so often, with `read` before it.
        command: the groups of a setpoint [A], in order.
        state: the groups of a state. Every command group is also a state group of the same name and size, which says
            where the arm is in the command's terms (a gripper without an encoder: what was commanded last).
        limits: what the vendor allows for setpoints [A], or None. Rotations count from their `reference`. The user's
            limits are added; together every number needs low and high, an interpolated one velocity, acceleration
            and jerk, and a held one max_step (infinity for the other kind's). Otherwise the process refuses to start.
        watchdog: in one line, how the robot itself comes to a stop when our process dies. Empty: there is no such
            thing, and the process refuses to start.
        threaded: optional; true where its library has threads of its own, which then run before others as well.
    """

    rate: float
    command: tuple[Group, ...]
    state: tuple[Group, ...]
    limits: Limits | None
    watchdog: str

    def connect(self) -> None:
        """Be ready to move, at rest. May take seconds. Raises `InputError` where something is missing or refused."""

    def read(self) -> ArmState:
        """The newest state, with the time at which it was measured. Takes well below a period."""
        ...

    def send(self, setpoint: np.ndarray) -> None:
        """Be at `setpoint` float64 [A] one period from now. Takes well below a period; never blocks."""

    def stop(self) -> None:
        """The vendor's own stop: called after the last setpoint, and instead of one where `read` or `send` raised.

        May be called twice, and while the connection is broken; brakes as hard as the vendor thinks right.
        """

    def close(self) -> None:
        """Let go of the arm. Called once, whatever happened; after it nothing moves."""


class Frame(NamedTuple):
    """image: uint8 [H, W, 3], RGB, or depth, uint16 [H, W] in mm, 0 where it is unknown; exposed at `t` (monotonic s;
    where the camera does not say, when it arrived)."""

    t: float
    image: np.ndarray


class Camera(Protocol):
    """A camera, as its process sees it.

    Attributes:
        shape: (H, W, 3) of its frames, or (H, W) of depth; known after `connect` at the latest.
        rate: frames per second (Hz).
    """

    shape: tuple[int, ...]
    rate: float

    def connect(self) -> None:
        """Start streaming. Raises `InputError` where something is missing or refused."""

    def read(self) -> Frame:
        """Wait for the next frame, at most two periods or so. Raises `TimeoutError` where none came."""
        ...

    def close(self) -> None:
        """Let go of the camera."""


def frame_dtype(shape: tuple[int, ...]) -> np.dtype:
    """Of a camera's frames: uint8 of [H, W, 3], uint16 of depth [H, W]. Raises `InputError` for another shape."""
    if len(shape) == 2:
        return np.dtype(np.uint16)
    if len(shape) == 3 and shape[2] == 3:
        return np.dtype(np.uint8)
    raise InputError(f"frames of shape {list(shape)}: a camera's are uint8 [H, W, 3], depth is uint16 [H, W] in mm")


def check_frame(frame: Frame, shape: tuple[int, ...]) -> None:
    """Raises `InputError` for a frame that would be cut off or rounded where it is kept, such as depth in m."""
    dtype = frame_dtype(shape)
    if frame.image.shape != shape or frame.image.dtype != dtype:
        unit = ", in mm" if len(shape) == 2 else ""
        raise InputError(
            f"a frame is {frame.image.dtype} {list(frame.image.shape)}; this camera's are {dtype} {list(shape)}{unit}"
        )


def make_arm(name: str, **settings: object) -> Arm:
    """The arm driver called `name`, or "module:Class" of the user's own.

    Raises `InputError` for an unknown name or setting.
    """
    return cast(Arm, _make(ARMS, name, settings))


def make_camera(name: str, **settings: object) -> Camera:
    """The camera driver called `name`. Raises `InputError` for an unknown name or setting."""
    return cast(Camera, _make(CAMERAS, name, settings))


def _make(registry: Registry, name: str, settings: dict[str, object]) -> object:
    kind = registry.kind
    try:
        driver = imported(name) if ":" in name else registry.load(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise error if isinstance(error, InputError) else InputError(f"{kind} {name}: {error}") from None
    try:
        return driver(**settings)
    except TypeError as error:
        raise InputError(f"{kind} {name}: {error}") from error


def check_arm(arm: Arm) -> None:
    """Raises `InputError` where `arm` cannot be trusted to stop by itself, or does not say where it is."""
    what = type(arm).__name__
    if not arm.watchdog.strip():
        raise InputError(f"{what} names no watchdog: nothing would stop the robot if our process died, so it stays off")
    states = {group.name: group.size for group in arm.state}
    for group in arm.command:
        if states.get(group.name) != group.size:
            raise InputError(f"{what}: command group {group.name!r} has no state group of that name and size")
    if not arm.rate > 0:
        raise InputError(f"{what}: rate={arm.rate} must be above 0")
