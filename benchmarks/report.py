"""What a run says: the machine, the versions, a table, and the same as JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from action_diffusion.files import atomic_path
from benchmarks.peer.compare import Result


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, system, and how busy it was before."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": model,
        "cores": cores,
        "memory_gb": round(memory / 1e9, 1),
        "system": platform.platform(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def commit(root: Path) -> str:
    """Of the checkout `root`; with "+" where files differ from it, and "unknown" where there is none."""
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed.stdout.strip() else "")


def write_json(
    path: Path,
    *,
    machine: Mapping[str, Any],
    commit: str,
    versions: Mapping[str, Any],
    results: Sequence[Result],
    failures: Mapping[str, str],
) -> None:
    """The file takes `path`'s place when it is complete. failures: a case and why it has no figures."""
    content = {
        "machine": dict(machine),
        "commit": commit,
        "versions": dict(versions),
        "rows": [result.to_json() for result in results],
        "failures": dict(failures),
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def show(
    console: Console,
    *,
    machine: Mapping[str, Any],
    commit: str,
    versions: Mapping[str, Mapping[str, Any]],
    results: Sequence[Result],
    failures: Mapping[str, str],
) -> None:
    """The table, and under it what was measured on what."""
    table = Table(title="ours beside the peer", title_justify="left", box=None, pad_edge=False)
    words = ("row", "beside", "instructions", "")
    for heading in (
        "row",
        "beside",
        "instructions",
        "threads",
        "ours",
        "peer",
        "",
        "ratio",
        "quartiles",
        "at least",
        "",
    ):
        table.add_column(heading, justify="left" if heading in words else "right", no_wrap=True)
    for result in results:
        case, bound = result.case, result.case.row.bound
        table.add_row(
            case.row.name,
            case.row.peer,
            case.instructions,
            str(case.threads),
            number(result.ours),
            number(result.peer),
            case.row.unit,
            f"{result.ratio:.2f}",
            f"{result.spread[0]:.2f} to {result.spread[1]:.2f}",
            "" if bound is None else f"{bound:g}",
            "" if bound is None else "reached" if result.ratio >= bound else "missed",
        )
    console.print(table)
    for name, reason in failures.items():
        _say(console, f"{name}: not measured: {reason}", style="red")
    console.print()
    for result in results:
        notes = f" [{result.note}]" if result.note else ""
        _say(console, f"{result.case}: {result.case.row.what}; {result.pairs} pairs{notes}")
    _say(
        console,
        "\nA ratio is the median of the ratios of neighbouring turns, above 1 where ours is ahead; its quartiles say "
        "how they spread. Times and rates are medians.",
    )
    _say(console, f"machine: {_listed(machine)}")
    _say(console, f"commit: {commit}")
    for side, found in versions.items():
        _say(console, f"{side}: {_listed(found)}")


def _say(console: Console, line: str, style: str = "") -> None:
    """One line, however long: brackets are no markup, and nothing is broken at the console's width."""
    console.print(line, style=style, markup=False, soft_wrap=True)


def number(value: float) -> str:
    """Three digits that mean something: 0.0123, 1.23, 12.3, 123, 12,345."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
