"""What the loop's process and the arm's say to each other, in rings of shared memory.

loop ── commands: BEGIN, FOLLOW waypoints, STOP ──▶ arm ── events: refused, stop, braking, broken ──▶ anybody
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from action_diffusion.deploy.ipc.rings import Fields, RingWriter

MOST_WAYPOINTS, MOST_NUMBERS = 64, 32
COMMANDS: Fields = {
    "kind": ("i4", ()),  # a `Message`
    "shape": ("i4", (2,)),  # n, A of the waypoints
    "times": ("f8", (MOST_WAYPOINTS,)),  # when they are due, monotonic s
    "values": ("f8", (MOST_WAYPOINTS, MOST_NUMBERS)),  # commands, in the data's terms
    "why": ("S200", ()),  # of a stop
}
EVENTS: Fields = {"kind": ("S16", ()), "why": ("S240", ())}


class Message(enum.IntEnum):
    """What the loop says to the arm."""

    BEGIN, FOLLOW, STOP = 1, 2, 3


class Phase(enum.IntEnum):
    """What the arm does: see `arm.loop` for the way from one to the next."""

    STILL, MOVING, STOPPING, BROKEN = 0, 1, 2, 3


class CommandWriter:
    """The loop's way to the arm, in the ring `commands` that it makes in `folder`. Not for two threads at once."""

    def __init__(self, folder: Path, clock: Callable[[], float]) -> None:
        self._ring = RingWriter(folder / "commands", fields=COMMANDS, n_slots=64)
        self._now = clock

    def begin(self) -> None:
        """Take waypoints from now on."""
        self._send(Message.BEGIN)

    def stop(self, why: str) -> None:
        """Come to a controlled stop."""
        self._send(Message.STOP, why=why.encode("utf-8")[:200])

    def follow(self, times: ArrayLike, values: ArrayLike) -> None:
        """Be at commands `values` [n, A] at `times` [n]. What is wrong with them is for the arm to say."""
        times, values = np.asarray(times, dtype=np.float64), np.asarray(values, dtype=np.float64)
        shape, row, block = (-1, -1), np.full(MOST_WAYPOINTS, np.nan), np.full((MOST_WAYPOINTS, MOST_NUMBERS), np.nan)
        if values.ndim == 2 and times.shape == values.shape[:1]:
            shape = tuple(min(size, 2**31 - 1) for size in values.shape)
            n, width = min(shape[0], MOST_WAYPOINTS), min(shape[1], MOST_NUMBERS)
            row[:n], block[:n, :width] = times[:n], values[:n, :width]
        self._send(Message.FOLLOW, shape=shape, times=row, values=block)

    def _send(self, kind: Message, **given: object) -> None:
        empty: dict[str, object] = {"shape": (0, 0), "times": np.zeros(MOST_WAYPOINTS), "why": b""}
        empty["values"] = np.zeros((MOST_WAYPOINTS, MOST_NUMBERS))
        self.send_record(self._now(), {"kind": int(kind), **empty, **given})

    def send_record(self, sent: float, values: Mapping[str, object]) -> None:
        """A message as it is, sent at `sent` (s): for tests of what must be refused."""
        self._ring.append(sent, values)


def text(value: np.ndarray) -> str:
    """What a field of text says; a character that was cut at its end is left out."""
    return bytes(value.item()).decode("utf-8", "ignore")
