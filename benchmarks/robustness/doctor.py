"""How many planted faults `action-diffusion data doctor` finds, and what it reports where there is none.

    python -m benchmarks.robustness.doctor [faults=500] [json=FILE] [data=PATH] [seed=0]

Faults of ten kinds are planted at random in copies of the human PushT file (or `data`), at most one in every second
episode at a time; `plants` has their sizes. One is found where a finding of its kind and key covers one of its rows, or
the row beside. Findings of another kind on a fault's rows are its echo (a frozen state catches up with a jump); a
finding anywhere else, which the doctor does not report on the original, is a false alarm.

Exit code: 0 where at least 95 % are found, without a false alarm; 1 otherwise, 2 for bad input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from action_diffusion.datasets.doctor.examine import examine
from action_diffusion.datasets.doctor.finding import Finding, as_json
from action_diffusion.datasets.doctor.survey import is_image, survey, temporary_folder
from action_diffusion.datasets.storage.checks import images_to_uint8
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.store import blocks
from action_diffusion.errors import InputError, unknown
from action_diffusion.files import atomic_path
from benchmarks.robustness.planter import Planted, Planter
from benchmarks.robustness.plants import PLANT

REQUIRED = 0.95
BESIDE = 1
ECHO = 12
"""Rows around a fault in which findings of other kinds are its echo."""
SHOWN = 20
DEFAULTS = {"faults": "500", "json": "", "data": "", "seed": "0"}
HUMAN = "pusht_cchi_v7_replay.zarr.zip"


@dataclass
class Score:
    """Of one kind. missed: what was planted and not found."""

    planted: int = 0
    found: int = 0
    smallest: int = 0
    smallest_found: int = 0
    false_alarms: int = 0
    echoes: int = 0
    missed: list[Planted] = field(default_factory=list)


@dataclass
class Detection:
    scores: dict[str, Score]
    original: list[Finding]
    false_alarms: list[Finding]
    seconds: float

    @property
    def share(self) -> float:
        found, planted = (sum(getattr(score, name) for score in self.scores.values()) for name in ("found", "planted"))
        return found / max(1, planted)

    @property
    def passed(self) -> bool:
        return self.share >= REQUIRED and not self.false_alarms


def in_memory(buffer: ReplayBuffer) -> ReplayBuffer:
    """The same, read once, images as uint8: it is examined many times."""
    arrays = {}
    for key in buffer.keys:
        column = buffer[key]
        if not is_image(column):
            arrays[key] = np.asarray(column[:])
            continue
        arrays[key] = np.empty(column.shape, np.uint8)
        for row, frames in blocks(column):
            arrays[key][row : row + len(frames)] = images_to_uint8(frames, key, buffer.name, row)
    return ReplayBuffer.from_arrays(arrays, buffer.episode_ends, buffer.attrs)


def measure(buffer: ReplayBuffer, n_faults: int, seed: int) -> Detection:
    """Plant, examine and count, as often as it takes for `n_faults`; buffer: in memory."""
    began, random = time.perf_counter(), np.random.default_rng(seed)
    original = examine(buffer)
    known = {(finding.kind, finding.key, finding.episode) for finding in original}
    scores = {kind: Score() for kind in PLANT}
    wrong: list[Finding] = []
    kinds = [list(PLANT)[i % len(PLANT)] for i in range(n_faults)]
    with temporary_folder() as folder:
        planter = Planter(buffer, survey(buffer, Path(folder)), random)
        a_time = max(1, buffer.n_episodes // 2)
        while kinds:
            now, kinds = kinds[:a_time], kinds[a_time:]
            faulty, planted = planter.plant(now, PLANT)
            kinds += _not_planted(now, planted)
            wrong += _count(scores, planted, examine(faulty), known)
            print(f"{n_faults - len(kinds)} of {n_faults}, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return Detection(scores, original, wrong, time.perf_counter() - began)


def _not_planted(wanted: Sequence[str], planted: Sequence[Planted]) -> list[str]:
    left = list(wanted)
    for fault in planted:
        left.remove(fault.kind)
    return left


def _count(
    scores: dict[str, Score],
    planted: Sequence[Planted],
    findings: Sequence[Finding],
    known: set[tuple[str, str, int | None]],
) -> list[Finding]:
    """Adds to `scores`; returns the false alarms."""
    for fault in planted:
        score = scores[fault.kind]
        is_found = any(_same(fault, finding) for finding in findings)
        score.planted += 1
        score.found += is_found
        score.smallest += fault.size == 1
        score.smallest_found += is_found and fault.size == 1
        if not is_found:
            score.missed.append(fault)
    wrong = []
    for finding in findings:
        if any(_same(fault, finding) for fault in planted):
            continue
        if any(_near(fault, finding) for fault in planted):
            scores[finding.kind].echoes += 1
        elif (finding.kind, finding.key, finding.episode) not in known:
            if finding.kind in scores:
                scores[finding.kind].false_alarms += 1
            wrong.append(finding)
    return wrong


def _same(fault: Planted, finding: Finding) -> bool:
    if finding.kind != fault.kind or finding.key != fault.key:
        return False
    if fault.either:
        return finding.episode in fault.either
    overlap = finding.first <= fault.last + BESIDE and finding.last >= fault.first - BESIDE
    return finding.episode == fault.episode and overlap


def _near(fault: Planted, finding: Finding) -> bool:
    overlap = finding.first <= fault.last + ECHO and finding.last >= fault.first - ECHO
    return finding.episode == fault.episode and overlap


def show(result: Detection) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("kind")
    for heading in ("planted", "found", "share", "of the smallest", "echoes", "false alarms"):
        table.add_column(heading, justify="right")
    for kind, score in result.scores.items():
        share, smallest = score.found / max(1, score.planted), f"{score.smallest_found}/{score.smallest}"
        figures = score.planted, score.found, f"{share:.0%}", smallest, score.echoes, score.false_alarms
        table.add_row(kind, *map(str, figures))
    Console(highlight=False).print(table)
    print(f"found: {result.share:.1%}, false alarms: {len(result.false_alarms)}, {result.seconds:.0f} s")
    for score in result.scores.values():
        for fault in score.missed:
            print(f"missed: {fault}")
    for heading, findings in (("false alarm", result.false_alarms), ("on the original", result.original)):
        for finding in findings[:SHOWN]:
            rows = f"rows {finding.first}-{finding.last}"
            print(f"{heading}: {finding.kind} {finding.key} episode {finding.episode} {rows}: {finding.how_bad}")


def parse(words: Sequence[str]) -> dict[str, str]:
    """Options by name. Raises `InputError`."""
    options = dict(DEFAULTS)
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in options:
            raise unknown("option", name, options)
        options[name] = value
    for name in ("faults", "seed"):
        if not options[name].isdecimal():
            raise InputError(f"{name}={options[name]}: expected a whole number")
    if not options["data"]:
        folder = os.environ.get("ACTION_DIFFUSION_DATA", "")
        options["data"] = str(Path(folder) / HUMAN) if folder else "pusht_human"
    return options


def as_plain(result: Detection) -> dict[str, Any]:
    scores = {kind: asdict(score) for kind, score in result.scores.items()}
    return {
        "share": result.share,
        "seconds": result.seconds,
        "kinds": scores,
        "false_alarms": as_json(result.false_alarms),
        "original": as_json(result.original),
    }


def main(words: Sequence[str]) -> int:
    from action_diffusion.datasets.batches.sources import open_data

    try:
        options = parse(words)
        buffer = in_memory(open_data(options["data"]))
        result = measure(buffer, int(options["faults"]), int(options["seed"]))
        show(result)
        if options["json"]:
            with atomic_path(Path(options["json"])) as temporary:
                temporary.write_text(json.dumps(as_plain(result), indent=1))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
