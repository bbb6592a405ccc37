"""One row: prepare both sides, check that they compute the same thing, then measure them in turns.

    ours   ██████        ██████        ██████
    peer           ██████        ██████        ██████
               ↑ each waits until the other's threads and processes are asleep

A pair of neighbouring turns gives one ratio, so that what slows the machine for a while slows both of a pair. The
result is the median of the ratios; its spread are their quartiles.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from benchmarks.peer.rows import Row, write_inputs
from benchmarks.peer.workers import Worker

TURN_SECONDS = 0.5
"""A turn repeats a call until it takes about so long."""
ROW_SECONDS = 40.0
PAIRS = (3, 15)
"""Turns of each side, at least and at most; between them, as many as `ROW_SECONDS` allow."""


class Different(RuntimeError):
    """The two sides do not compute the same thing."""


@dataclass(frozen=True)
class Case:
    """A row by one set of the processor's instructions (`workers.instruction_sets`), with so many threads."""

    row: Row
    instructions: str
    threads: int

    def __str__(self) -> str:
        return f"{self.row.name} beside {self.row.peer} ({self.instructions}, {self.threads} threads)"


@dataclass(frozen=True)
class Result:
    """ours, peer: medians, in the unit of the row. ratio: above 1 where ours is ahead; spread: quartiles."""

    case: Case
    ours: float
    peer: float
    ratio: float
    spread: tuple[float, float]
    pairs: int
    note: str

    def to_json(self) -> dict[str, Any]:
        row, numbers = self.case.row, {"ours": self.ours, "peer": self.peer, "ratio": self.ratio}
        return {
            "name": row.name,
            "against": row.peer,
            "instructions": self.case.instructions,
            "threads": self.case.threads,
            "unit": row.unit,
            **{key: float(f"{value:.5g}") for key, value in numbers.items()},
            "spread": [float(f"{value:.5g}") for value in self.spread],
            "bound": row.bound,
            "pairs": self.pairs,
            "what": row.what,
            "note": self.note,
        }


@dataclass(frozen=True)
class _Turns:
    """How often a call is made in a turn, and what it counts for."""

    worker: Worker
    calls: int
    units: int

    def seconds(self) -> float:
        """Of one call."""
        return self.worker.ask("time", calls=self.calls)["seconds"] / self.calls


def compare(
    case: Case, ours: Worker, peer: Worker, folder: Path, *, say: Callable[[str], None], seconds: float = ROW_SECONDS
) -> Result:
    """Measure `case` for about `seconds`, and as long as preparing it takes. folder: empty, for weights and inputs.

    Raises `Different` where the sides disagree, and `WorkerError` where one fails.
    """
    row = case.row
    write_inputs(row, folder)
    order = {"work": row.work, "settings": dict(row.settings), "folder": str(folder)}
    try:
        say("preparing")
        prepared = {worker: worker.ask("prepare", **order) for worker in (peer, ours)}  # the peer's weights come first
        say("checking")
        check(row, ours, peer, folder)
        sides = [_turns(worker, prepared[worker]["least"], prepared[worker]["units"]) for worker in (ours, peer)]
        times = _alternate(*sides, seconds=seconds, say=say)
    finally:
        for worker in (ours, peer):
            worker.ask("release")
    result = summarise(case, times, sides[0].units, sides[1].units)
    return replace(result, note="; ".join(answer["note"] for answer in prepared.values() if answer["note"]))


def check(row: Row, ours: Worker, peer: Worker, folder: Path) -> None:
    """Raises `Different`, naming the output, where the sides differ by more than the row's `checks` allow."""
    if not row.checks:
        return
    found = []
    for side, worker in (("ours", ours), ("peer", peer)):
        file = folder / f"{side}.safetensors"
        worker.ask("check", file=str(file))
        found.append(load_file(file))
    for name, (measure, limit) in row.checks.items():
        a, b = found[0][name].astype(np.float64), found[1][name].astype(np.float64)
        if a.shape != b.shape:
            raise Different(f"{name} has shape {list(a.shape)} here, {list(b.shape)} at the peer")
        difference = np.abs(a - b)
        error = {
            "largest": difference.max(),
            "relative": difference.max() / np.abs(b).max(),
            "mean": difference.mean(),
        }[measure]
        if not error <= limit:
            raise Different(f"{name} differs: {measure} difference {error:.2g}, at most {limit:g} is allowed")


def summarise(case: Case, times: list[tuple[float, float]], our_units: int, peer_units: int) -> Result:
    """From the seconds of a call of each side, pair by pair, to the row's unit and ratio."""
    row = case.row
    if row.unit == "samples/s":
        ours, peer = [our_units / a for a, _ in times], [peer_units / b for _, b in times]
        ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    else:
        scale = {"ms": 1e3, "s": 1.0}[row.unit]
        ours, peer = [scale * a / our_units for a, _ in times], [scale * b / peer_units for _, b in times]
        ratios = [b / a for a, b in zip(ours, peer, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    middle = statistics.median
    return Result(case, middle(ours), middle(peer), middle(ratios), (low, high), len(times), "")


def _turns(worker: Worker, least: int, units: int) -> _Turns:
    """Warm up, and find how many calls make a turn; a first call of seconds says enough of that."""
    for _ in range(2):
        once = worker.ask("time", calls=least)["seconds"] / least
        worker.settle()
        if once > 4 * TURN_SECONDS:
            break
    return _Turns(worker, max(least, math.ceil(TURN_SECONDS / once)), units)


def _alternate(ours: _Turns, peer: _Turns, *, seconds: float, say: Callable[[str], None]) -> list[tuple[float, float]]:
    """Seconds of a call of each side, for each pair of turns."""
    times: list[tuple[float, float]] = []
    needed = PAIRS[1]
    while len(times) < needed:
        say(f"measuring, pair {len(times) + 1} of {needed}")
        pair = []
        for side in (ours, peer):
            pair.append(side.seconds())
            side.worker.settle()
        times.append((pair[0], pair[1]))
        spent = statistics.mean(a * ours.calls + b * peer.calls for a, b in times)
        needed = max(PAIRS[0], min(PAIRS[1], round(seconds / spent)))
    return times
