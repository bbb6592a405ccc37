"""What the arm's process does in every period, on any clock: read, listen, guard, move, check, send.

    STILL ── begin ─▶ MOVING ── stop, silence, emergency ─▶ STOPPING ── at rest ─▶ STILL
      └─────────────────┴─────────── the driver raises ─────────┴──────▶ BROKEN (vendor's stop)

STILL holds the setpoint and takes no waypoints: after a stop nothing moves before somebody says `begin`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from action_diffusion.deploy.arm.gate import WaypointGate
from action_diffusion.deploy.arm.path import Path as Waypoints
from action_diffusion.deploy.arm.shaper import SetpointCheck, Shaper
from action_diffusion.deploy.hardware.command import CommandLayout
from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.hardware.obstacles import Obstacles
from action_diffusion.deploy.hardware.protocols import Arm
from action_diffusion.deploy.ipc.channels import EVENTS, MOST_WAYPOINTS, Message, Phase, text
from action_diffusion.deploy.ipc.processes import Watched
from action_diffusion.deploy.ipc.rings import Fields, Moment, RingReader, RingWriter
from action_diffusion.errors import InputError


class ArmLoop:
    """One arm and all that guards it. `cycle` is called once a period.

    Args:
        arm: connected.
        limits: the user's and the vendor's, in coordinates; complete.
        folder: where `commands` is, and where `state`, `setpoints` and `events` are made.
        watch: processes that have to be well while the arm moves, by their names.
        emergency: whoever marks it stops the arm; it does not begin again before it is cleared.
        ending: why the process is about to end, or None.

    Raises:
        InputError: for limits without values, and where the arm stands outside of them.
    """

    def __init__(
        self,
        *,
        arm: Arm,
        limits: Limits,
        folder: Path,
        obstacles: Obstacles | None = None,
        watch: Mapping[str, Watched] | None = None,
        emergency: Moment | None = None,
        ending: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._arm, self._limits, self._watch, self._emergency, self._ending = (
            arm,
            limits,
            watch or {},
            emergency,
            ending,
        )
        self.layout = CommandLayout(arm.command)
        self.layout.check_limits(limits)
        self.period = 1 / arm.rate
        self._gate = WaypointGate(layout=self.layout, limits=limits)
        self._obstacles = _Obstacles(arm, self.layout, obstacles) if obstacles is not None else None
        self._shaper = Shaper(layout=self.layout, limits=limits, period=self.period, blocked=self._obstacles)
        self._check = SetpointCheck(layout=self.layout, limits=limits, period=self.period)
        self._commands, self._heard = RingReader(folder / "commands"), -1
        state: Fields = {group.name: ("f8", (group.size,)) for group in arm.state}
        size = self.layout.size
        sent: Fields = {"command": ("f8", (size,)), "phase": ("i4", ()), "begun": ("i8", ()), "due": ("f8", ())}
        self._states = RingWriter(folder / "state", fields=state, n_slots=1024)
        self._setpoints = RingWriter(folder / "setpoints", fields=sent, n_slots=4096)
        self._events = RingWriter(folder / "events", fields=EVENTS, n_slots=256)
        self.phase, self._begun = Phase.STILL, 0
        self._path: Waypoints | None = None
        self._said: str | None = None
        self._present = self._read()
        self._stand()

    def _stand(self) -> None:
        low, high = self._limits.low, self._limits.high
        if not ((self._present >= low) & (self._present <= high)).all():
            raise InputError(
                f"the arm stands at {self._present.round(4).tolist()}, outside of its limits "
                f"{low.tolist()} to {high.tolist()}: move it inside by hand"
            )
        touched = self._obstacles(self._present) if self._obstacles is not None else None
        if touched is not None:
            raise InputError(f"the arm stands in {touched}: move it away by hand")
        self._shaper.reset(self._present)
        self._check.reset(self._present)

    def cycle(self, due: float, now: Callable[[], float]) -> None:
        """One period, which was to begin at `due` (s). Whatever goes wrong ends in a stop, never in an exception."""
        if self.phase is Phase.BROKEN:
            return
        try:
            self._present = self._read()
            for message in self._commands.after(self._heard):
                self._heard = message.number
                self._hear(message.t, message.values, now())
            self._guard(now())
            self._move(due + self.period, now)
            refusal = self._check.refuse(self._shaper.q)
            if refusal is not None:
                raise ArithmeticError(refusal)
            command = self.layout.to_command(self._shaper.q)
            self._arm.send(command)
        except Exception as error:
            self._break(f"{type(error).__name__}: {error}", now())
            return
        self._setpoints.append(now(), {"command": command, "phase": int(self.phase), "begun": self._begun, "due": due})

    def _read(self) -> np.ndarray:
        """Where the arm is, in coordinates [A]; its state goes to the ring."""
        state = self._arm.read()
        self._states.append(state.t, state.values)
        present = np.concatenate([state.values[group.name] for group in self._arm.command])
        if not np.isfinite(present).all():
            raise ArithmeticError(f"the arm says that it is at {present.tolist()}")
        return self.layout.to_coordinates(present)

    def _hear(self, sent: float, values: Mapping[str, np.ndarray], now: float) -> None:
        kind = int(values["kind"])
        if kind == Message.BEGIN:
            self._begin(now)
        elif kind == Message.STOP:
            self._stop(text(values["why"]), now)
        elif kind == Message.FOLLOW and self.phase is Phase.MOVING:
            reason = self._follow(sent, values, now)
            if reason is not None:
                self._say("refused", reason, now)

    def _begin(self, now: float) -> None:
        """Take waypoints from now on; what is commanded to be where the arm is, is there."""
        emergency = self._emergency is not None and self._emergency.t > 0
        if self.phase is not Phase.STILL or emergency:
            why = "the emergency stop is set" if emergency else f"it is {self.phase.name.lower()}"
            self._say("refused", f"the arm cannot begin: {why}", now)
            return
        q, recalled = self._shaper.q.copy(), self.layout.recalled
        q[recalled] = np.clip(self._present, self._limits.low, self._limits.high)[recalled]
        self._shaper.reset(q)
        self._check.reset(q)
        self._path, self.phase = None, Phase.MOVING
        self._begun += 1

    def _follow(self, sent: float, values: Mapping[str, np.ndarray], now: float) -> str | None:
        n, width = (int(size) for size in values["shape"])
        if not (1 <= n <= MOST_WAYPOINTS and width == self.layout.size):
            return f"{n} waypoints of {width} values; 1 to {MOST_WAYPOINTS} of {self.layout.size} are needed"
        times, commands = values["times"][:n], values["values"][:n, :width]
        path = self._path or Waypoints(self.layout, [now], [self._shaper.q.copy()])
        reason = self._gate.refuse(
            sent=sent, times=times.tolist(), points=commands, now=now, before=path.at(max(now, times[0]))
        )
        if reason is not None:
            return reason
        points = self.layout.to_coordinates(commands)
        if self._obstacles is not None:
            touched = [why for why in map(self._obstacles, points) if why is not None]
            if touched:
                return f"a waypoint lies in {touched[0]}"
        self._path = path.replace(now, times.tolist(), list(points))
        return None

    def _guard(self, now: float) -> None:
        if self.phase is not Phase.MOVING:
            return
        if self._emergency is not None and self._emergency.t > 0:
            self._stop("emergency stop", now)
            return
        ending = self._ending()
        if ending is not None:
            self._stop(ending, now)
            return
        for name, watched in self._watch.items():
            trouble = watched.trouble(now)
            if trouble is not None:
                self._stop(f"{name} {trouble}", now)
                return

    def _stop(self, why: str, now: float) -> None:
        if self.phase is Phase.MOVING:
            self.phase, self._recall = Phase.STOPPING, self._present
            self._say("stop", why, now)

    def _move(self, t: float, now: Callable[[], float]) -> None:
        """The shaper's next setpoint, for `t`."""
        if self.phase is Phase.MOVING and self._path is not None:
            reason = self._shaper.follow(self._path, t)
            if reason is not None and reason != self._said:
                self._say("braking", reason, now())
            self._said = reason
        elif self.phase is Phase.STOPPING:
            held = self._shaper.q[self.layout.held]
            self._shaper.brake(self._recall)
            if self._shaper.at_rest and np.array_equal(held, self._shaper.q[self.layout.held]):
                self.phase = Phase.STILL

    def _break(self, why: str, now: float) -> None:
        """The vendor's stop, since ours needs a driver that works."""
        self.phase = Phase.BROKEN
        with contextlib.suppress(Exception):
            self._arm.stop()
        self._say("broken", why, now)

    def _say(self, kind: str, why: str, now: float) -> None:
        self._events.append(now, {"kind": kind.encode(), "why": why.encode("utf-8")[:240]})


class _Obstacles:
    """Why coordinates [A] must not be reached, or None: `Obstacles` where the driver says that the links are."""

    def __init__(self, arm: Arm, layout: CommandLayout, obstacles: Obstacles) -> None:
        spheres = getattr(arm, "spheres", None)
        if spheres is None:
            raise InputError(f"{type(arm).__name__} does not say where its links are, so obstacles cannot be kept off")
        self._spheres, self._layout, self._obstacles = spheres, layout, obstacles

    def __call__(self, q: np.ndarray) -> str | None:
        return self._obstacles.touched(self._spheres(self._layout.to_command(q)))
