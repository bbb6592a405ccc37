"""Rows that are measured one after the other, shown and written: what `benchmarks.systems` and `.reward` both do."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from action_diffusion.files import atomic_path
from benchmarks.peer.arguments import Parser, chosen, guarded, json_path
from benchmarks.report import machine
from benchmarks.rows.system import System, systems


def run(rows: Sequence[System], seed: int, output: Path | None, console: Console) -> int:
    """Measure one after the other, show, write; returns the exit code."""
    done: list[dict[str, Any]] = []
    for system in rows:
        system.check()
    try:
        for number, system in enumerate(rows, 1):
            console.print(f"[{number}/{len(rows)}] {system.name}: {system.what}", soft_wrap=True)
            began = time.perf_counter()
            done.append({**system.row(seed), "seconds": round(time.perf_counter() - began, 1)})
    finally:
        if done:
            console.print(_table(done))
            if output is not None:
                with atomic_path(output) as temporary:
                    temporary.write_text(
                        json.dumps({"machine": machine(), "seed": seed, "rows": done}, indent=1) + "\n"
                    )
                console.print(f"rows: {output}", soft_wrap=True)
    return 0 if all(row["passed"] for row in done) else 1


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("system", "measured", "beside", "bar", "passed", box=None, pad_edge=False)
    for row in rows:
        numbers = [", ".join(f"{name} {value:.4g}" for name, value in row[part].items()) for part in PARTS]
        table.add_row(row["name"], *numbers, row["bar"], "yes" if row["passed"] else "no")
    return table


PARTS = ("measured", "baseline")


def main(words: Sequence[str], package: str, doc: str | None) -> int:
    """The command of `package`, whose files are rows; `doc` is its help. Returns the exit code."""
    known = systems(package)
    name = package.rpartition(".")[2]
    parser = Parser(f"python -m {package}", doc, rows=list(known), json=f"{name}.json", instructions=False)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(list(words))
    names = chosen("row", "--only", options.only, list(known))
    output = json_path(options.json)
    return guarded(lambda console: run([known[name] for name in names], options.seed, output, console))
