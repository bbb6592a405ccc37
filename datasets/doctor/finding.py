"""A finding: what is wrong with which rows, how bad it is, and what to do about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from action_diffusion.terminal import parted

KINDS = {
    "nan": "interpolate, or drop the episode",
    "dropped": "split the episode there: a window must not span the gap",
    "frozen": "cut these rows out and split the episode there",
    "jump": "split the episode there; look whether tracking was lost",
    "rotation": "take one name along each episode (--fix), and say what it is: docs/data.md, Rotations",
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
        rotation: of one, what it is and where it begins: "quaternion@3".
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
    rotation: str = ""

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


class FindingGroup(NamedTuple):
    """All findings of a kind and key. worst: that of the greatest severity."""

    kind: str
    key: str
    findings: list[Finding]

    @property
    def worst(self) -> Finding:
        return max(self.findings, key=lambda finding: finding.severity)

    @property
    def episodes(self) -> str:
        """Numbers and ranges, the first ones; "all" for the buffer as a whole."""
        numbers = sorted({finding.episode for finding in self.findings if finding.episode is not None})
        return spans(numbers, 6) or "all"


def grouped(findings: Sequence[Finding]) -> list[FindingGroup]:
    """By kind, in the order of `KINDS`, and key."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.kind, finding.key), []).append(finding)
    place = list(KINDS)
    return [
        FindingGroup(*name, groups[name]) for name in sorted(groups, key=lambda name: (place.index(name[0]), name[1]))
    ]


def spans(numbers: Sequence[int], most: int = 1000) -> str:
    """Increasing [0, 1, 2, 5] as 0-2, 5; only the first `most` of them."""
    ends = [n for n, number in enumerate(numbers) if n + 1 == len(numbers) or numbers[n + 1] != number + 1]
    pairs = list(zip([0, *(end + 1 for end in ends)], ends, strict=False))
    shown = [str(numbers[a]) if a == b else f"{numbers[a]}-{numbers[b]}" for a, b in pairs[:most]]
    return ", ".join([*shown, *(["…"] if len(pairs) > most else [])])


def counted(findings: Sequence[Finding]) -> str:
    """How many there are of each kind, in words."""
    counts = Counter(finding.kind for finding in findings)
    return ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind])


def show(findings: Sequence[Finding], *, details: bool = False) -> None:
    """A row for each kind and key, or with `details` for each finding; and how many of each kind."""
    if not findings:
        print("nothing found")
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("kind", no_wrap=True)
    table.add_column("key", no_wrap=True)
    if details:
        for heading in ("episode", "rows"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("how bad", overflow="fold")
        for finding in findings:
            episode = "all" if finding.episode is None else str(finding.episode)
            table.add_row(finding.kind, parted(finding.key), episode, rows_of(finding), finding.how_bad)
    else:
        table.add_column("found", justify="right", no_wrap=True)
        table.add_column("episodes", overflow="fold")
        table.add_column("the worst", overflow="fold")
        for group in grouped(findings):
            worst = f"rows {rows_of(group.worst)}: {group.worst.how_bad}"
            table.add_row(group.kind, parted(group.key), str(len(group.findings)), group.episodes, worst)
    console = Console(highlight=False, markup=False)
    console.print(table)
    print()
    advice = Table(box=None, pad_edge=False, show_header=False)
    for pair in dict.fromkeys(
        (finding.kind, finding.advice) for group in grouped(findings) for finding in group.findings
    ):
        advice.add_row(*pair)
    console.print(advice)
    print(
        f"{len(findings)} finding{'s' * (len(findings) != 1)}: {counted(findings)}"
        + ("" if details else "; each of them: details=true")
    )


def rows_of(finding: Finding) -> str:
    return f"{finding.first}-{finding.last}" if finding.last != finding.first else str(finding.first)
