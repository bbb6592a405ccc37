"""What the latency benchmark says: a row a cell as JSON, a table, a picture, and whether the bounds are kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from action_diffusion.deploy.loop.virtual import VirtualEpisode
from action_diffusion.files import atomic_path
from action_diffusion.statistics import bootstrap_interval, paired_interval
from benchmarks.report import machine

DELAY = 4
MOST_LOST, LEAST_SCORE, MOST_JUMP = 0.05, 0.8, 1 / 3
"""Bounds for real-time chunking: the score that it may lose to that delay, the score that it keeps there, and its jumps
as a share of naive's."""


@dataclass(frozen=True)
class Cell:
    scheduling: str
    delay: int


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """Scores of a cell's episodes, start by start; jumps of all their swaps; the share of the steps that were held."""

    cell: Cell
    scores: list[float]
    jumps: list[float]
    held: float
    seconds: float

    @classmethod
    def of(cls, cell: Cell, episodes: Sequence[VirtualEpisode], seconds: float) -> CellResult:
        held = np.concatenate([np.isnan(episode.commands).any(axis=1) for episode in episodes])
        return cls(
            cell=cell,
            scores=[episode.score for episode in episodes],
            jumps=[jump for episode in episodes for jump in episode.jumps],
            held=float(held.mean()),
            seconds=seconds,
        )

    @property
    def score(self) -> float:
        return float(np.mean(self.scores))

    @property
    def interval(self) -> tuple[float, float]:
        return bootstrap_interval(self.scores)

    @property
    def jump(self) -> float | None:
        """None where no chunk was swapped for another."""
        return float(np.quantile(self.jumps, 0.99)) if self.jumps else None

    def row(self) -> dict[str, Any]:
        return {
            **asdict(self.cell),
            "score": self.score,
            "score_interval": list(self.interval),
            "success_rate": float(np.mean(np.asarray(self.scores) >= 1)),
            "jump": self.jump,
            "median_jump": float(np.median(self.jumps)) if self.jumps else None,
            "n_swaps": len(self.jumps),
            "held": self.held,
            "n_episodes": len(self.scores),
            "seconds": round(self.seconds, 1),
            "scores": self.scores,
        }

    def line(self) -> str:
        low, high = self.interval
        jump = "" if self.jump is None else f", jump {self.jump:.1f}"
        name = f"{self.cell.scheduling}, delay {self.cell.delay}"
        return f"{name}: score {self.score:.3f} [{low:.3f}, {high:.3f}]{jump} ({self.seconds:.0f} s)"


def write(path: Path, results: Sequence[CellResult], settings: Any) -> None:
    """FILE.json and, beside it, FILE.png; each takes its place when it is complete."""
    content = {
        "machine": machine(),
        "settings": asdict(settings) | {"bundle": str(settings.bundle)},
        "rows": [result.row() for result in results],
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    with atomic_path(path.with_suffix(".png")) as temporary:
        _figure(results).savefig(temporary, format="png", dpi=150)


def _figure(results: Sequence[CellResult]) -> Figure:
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    scores, jumps = figure.subplots(1, 2)
    for scheduling in dict.fromkeys(result.cell.scheduling for result in results):
        line = sorted((r for r in results if r.cell.scheduling == scheduling), key=lambda r: r.cell.delay)
        delays = [result.cell.delay for result in line]
        mean = np.array([result.score for result in line])
        low, high = np.array([result.interval for result in line]).T
        scores.errorbar(delays, mean, yerr=[mean - low, high - mean], capsize=3, marker="o", ms=4, label=scheduling)
        jumped = [np.nan if result.jump is None else result.jump for result in line]
        jumps.plot(delays, jumped, marker="o", ms=4, label=scheduling)
    scores.set(xlabel="delay (control steps)", ylabel="score, with 95 % interval", ylim=(0, 1.03))
    jumps.set(xlabel="delay (control steps)", ylabel="jump, 99th percentile (the data's units)", ylim=(0, None))
    for axes in (scores, jumps):
        axes.set_xticks(sorted({result.cell.delay for result in results}))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    scores.legend()
    return figure


def show(results: Sequence[CellResult]) -> None:
    """The table, and what is to be reached of which the cells are there."""
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("scheduling")
    for heading in ("delay", "score", "95 %", "success", "jump", "median", "held", "s"):
        table.add_column(heading, justify="right")
    for result in results:
        row, (low, high) = result.row(), result.interval
        jumps = ("–", "–") if row["jump"] is None else (f"{row['jump']:.1f}", f"{row['median_jump']:.1f}")
        cells = (
            str(result.cell.delay),
            f"{result.score:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{row['success_rate']:.2f}",
        )
        table.add_row(result.cell.scheduling, *cells, *jumps, f"{result.held:.0%}", f"{result.seconds:.0f}")
    console.print(table)
    for line in bounds({result.cell: result for result in results}):
        console.print(line, markup=False, soft_wrap=True)


def bounds(found: Mapping[Cell, CellResult]) -> list[str]:
    """A line for each bound whose cells are there."""
    lines = []
    late, prompt = found.get(Cell("rtc", DELAY)), found.get(Cell("rtc", 0))
    if late is not None:
        lines.append(_kept(late.score >= LEAST_SCORE, f"rtc scores {late.score:.3f} at delay {DELAY}", LEAST_SCORE))
        if prompt is not None:
            lost = prompt.score - late.score
            low, high = paired_interval(prompt.scores, late.scores)
            what = f"rtc loses {lost:.3f} [{low:.3f}, {high:.3f}] of its score at delay {DELAY}"
            lines.append(_kept(lost <= MOST_LOST, what, MOST_LOST))
    for cell, result in found.items():
        naive = found.get(Cell("naive", cell.delay))
        if cell.scheduling == "rtc" and naive is not None and result.jump is not None and naive.jump:
            share = result.jump / naive.jump
            what = f"rtc's jumps at delay {cell.delay} are {share:.2f} of naive's"
            lines.append(_kept(share <= MOST_JUMP, what, MOST_JUMP))
    return lines


def _kept(kept: bool, what: str, bound: float) -> str:
    return f"{what}; bound {bound:.2f}: {'kept' if kept else 'MISSED'}"
