"""The loop's end of the arm's process: starts it, beats for it, commands it, and reads what it says."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.hardware.obstacles import Obstacles
from action_diffusion.deploy.hardware.protocols import Group
from action_diffusion.deploy.ipc.channels import CommandWriter, Phase, text
from action_diffusion.deploy.ipc.processes import Child, Heartbeat
from action_diffusion.deploy.ipc.rings import Moment, Record, RingReader
from action_diffusion.errors import InputError

LEASE = 10.0
"""How long (s) the loop may be busy, with a chunk that it computes itself, before its heart stops. Meanwhile the arm
goes on to the last waypoint that it has, and rests there. (A process that hangs as a whole is silent at once.)"""
OVER = "the episode is over"
_PATIENCE = 6.0


@dataclass(frozen=True, kw_only=True)
class ArmSetup:
    """An arm as a configuration has it: see `protocols.make_arm`, `Limits.of` and `Obstacles.of`."""

    driver: str
    settings: Mapping[str, object] = field(default_factory=dict)
    limits: Mapping[str, object] | None = None
    obstacles: Mapping[str, object] | None = None

    def check(self) -> None:
        """Raises `InputError` for limits and obstacles that are none, before anything starts."""
        if self.limits is not None and self.limits != {}:
            Limits.of(self.limits)
        Obstacles.of(self.obstacles)


class ArmLink:
    """An arm in a process of its own, which is ready when this returns.

    Args:
        folder: the run's shared memory.
        watch: names of further processes with heartbeats that the arm needs to move, in `folder` already.

    Attributes:
        rate: setpoints per second (Hz).
        command, state: the arm's groups.
        limits: that its setpoints keep to, in coordinates.
        states: the ring of its states.
        setpoints: the ring of what it was sent, with its phase.
        child: its process.

    Raises:
        InputError: with the reason why the arm does not start.
    """

    def __init__(self, *, folder: Path, setup: ArmSetup, watch: Sequence[str] = ()) -> None:
        self._heart = Heartbeat(folder / "loop.beat", lease=LEASE)
        self._emergency = Moment.create(folder / "emergency")
        self._commands, self._lock = CommandWriter(folder, time.monotonic), threading.Lock()
        arguments: dict[str, object] = {"driver": setup.driver, "settings": dict(setup.settings)}
        arguments |= {"watch": ["loop", *watch], "limits": _plain(setup.limits), "obstacles": _plain(setup.obstacles)}
        self.child = Child("action_diffusion.deploy.arm.process", folder, "arm", arguments)
        try:
            said = self.child.wait_ready()
        except BaseException:
            self._heart.end()
            self.child.end()
            raise
        self.rate, self.limits = float(said["rate"]), Limits.of(said["limits"])
        self.command, self.state = (tuple(_group(values) for values in said[name]) for name in ("command", "state"))
        self.priority, self.watchdog = str(said["priority"]), str(said["watchdog"])
        self.states, self.setpoints = RingReader(folder / "state"), RingReader(folder / "setpoints")
        self._events, self._heard = RingReader(folder / "events"), -1

    def begin(self) -> None:
        """Wait until the arm is at rest and takes waypoints. Raises `InputError` where it does not."""
        self.renew()
        self._wait_still()
        record = self.setpoints.latest()
        begun = 0 if record is None else int(record.values["begun"])
        self.events()
        with self._lock:
            self._commands.begin()
        deadline = time.monotonic() + _PATIENCE
        while (record := self.setpoints.latest()) is None or int(record.values["begun"]) == begun:
            refused = self.events()
            if refused or not self.child.alive or time.monotonic() > deadline:
                raise InputError(f"the arm does not begin: {'; '.join(refused) or 'its process does not answer'}")
            time.sleep(0.002)

    def last_setpoint(self) -> Record:
        """What the arm was sent last. Right after its start that may take a moment; raises `InputError` if it does not
        come."""
        deadline = time.monotonic() + _PATIENCE
        while (record := self.setpoints.latest()) is None:
            if not self.child.alive or time.monotonic() > deadline:
                raise InputError(
                    f"the arm was sent nothing: {'; '.join(self.events()) or 'its process does not answer'}"
                )
            time.sleep(0.002)
        return record

    def follow(self, times: np.ndarray, values: np.ndarray) -> None:
        """Be at commands `values` [n, A] at `times` [n] (monotonic s)."""
        self.renew()
        with self._lock:
            self._commands.follow(times, values)

    def renew(self) -> None:
        """The loop is well: call it at least every ten seconds while the arm moves."""
        self._heart.renew()

    def stop(self, why: str) -> None:
        """Come to a controlled stop; returns at once."""
        with self._lock:
            self._commands.stop(why)

    def emergency_stop(self) -> None:
        """Stop, and begin no more before the moment `emergency` in the run's folder is cleared."""
        self._emergency.mark()

    @property
    def phase(self) -> Phase:
        """What the arm does, as its last setpoint says; BROKEN where its process has gone."""
        record = self.setpoints.latest()
        if not self.child.alive:
            return Phase.BROKEN
        return Phase.STILL if record is None else Phase(int(record.values["phase"]))

    def events(self) -> list[str]:
        """Interventions since the last call: "stop: …", "refused: …", "braking: …", "broken: …"."""
        records = self._events.after(self._heard)
        self._heard = records[-1].number if records else self._heard
        said = [(text(record.values["kind"]), text(record.values["why"])) for record in records]
        return [f"{kind}: {why}" for kind, why in said if why != OVER]

    def rest(self) -> None:
        """End the episode: a controlled stop, and wait for it."""
        if self.phase is Phase.MOVING:
            self.stop(OVER)
        self._wait_still()

    def _wait_still(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        while self.phase not in (Phase.STILL, Phase.BROKEN) and time.monotonic() < deadline:
            time.sleep(0.002)

    def close(self) -> None:
        """End the process; it stops the arm before."""
        self.child.end(_PATIENCE)
        self._heart.end()


def _group(values: Mapping[str, Any]) -> Group:
    return Group(**{**values, "reference": tuple(values["reference"])})


def _plain(values: Mapping[str, object] | None) -> dict[str, object] | None:
    return None if values is None else dict(values)
