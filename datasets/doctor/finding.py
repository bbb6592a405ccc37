"""A finding: what is wrong with which rows, how bad it is, and what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

KINDS = {
    "nan": "interpolate, or drop the episode",
    "dropped": "split the episode there: a window must not span the gap",
    "frozen": "cut these rows out and split the episode there",
    "jump": "split the episode there; look whether tracking was lost",
    "outlier": "replace by its neighbours' mean, or cut it out",
    "skew": "shift the camera's frames by the lag; mend the clock or the latency setting",
    "constant": "drop the episode, or leave the dimension out of training",
    "saturated": "check limits and units; what lies beyond the limit is lost",
    "duplicate": "drop the copy: it would count twice, and leak into validation",
    "idle": "trim these rows: a policy learns to wait there",
    "leak": "leave it out of the observations: on the arm nobody knows the action before it is chosen",
    "timing": "split the episode at gaps; look for what held the recording up",
}
"""Kind → what to do. Their order is that of the report."""


@dataclass(frozen=True)
class Finding:
    """Rows `first` to `last` of the buffer, counted from 0, both included.

    Args:
        kind: one of `KINDS`.
        key: the column, or what stands for several.
        episode: None for what is wrong with the buffer as a whole.
        severity: how far beyond what is tolerated: 1 is the limit.
        how_bad: the same in words, with units where there are any.
        advice: what to do.
        dimensions: of the key; empty for all of them.
        lag: of a skew: the frame in row t shows what the states say in row t + lag.
    """

    kind: str
    key: str
    episode: int | None
    first: int
    last: int
    severity: float
    how_bad: str
    advice: str = ""
    dimensions: tuple[int, ...] = ()
    lag: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "severity", round(float(self.severity), 3))
        if not self.advice:
            object.__setattr__(self, "advice", KINDS[self.kind])


def ordered(findings: Sequence[Finding]) -> list[Finding]:
    """By row, those of the whole buffer first."""
    place = list(KINDS)
    return sorted(findings, key=lambda f: (f.episode is not None, f.first, f.last, place.index(f.kind), f.key))


def as_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    return [asdict(finding) | {"dimensions": list(finding.dimensions)} for finding in findings]


def show(findings: Sequence[Finding]) -> None:
    """A row for each, and how many of each kind."""
    if not findings:
        print("nothing found")
        return
    table = Table(box=None, pad_edge=False)
    for heading, justify in (("kind", "left"), ("key", "left"), ("episode", "right"), ("rows", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("how bad", overflow="fold")
    table.add_column("what to do", overflow="fold")
    for finding in findings:
        episode = "all" if finding.episode is None else str(finding.episode)
        rows = f"{finding.first}-{finding.last}" if finding.last != finding.first else str(finding.first)
        table.add_row(finding.kind, finding.key, episode, rows, finding.how_bad, finding.advice)
    Console(highlight=False).print(table)
    counts = Counter(finding.kind for finding in findings)
    print(f"{len(findings)} findings: " + ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind]))
