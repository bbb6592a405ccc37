"""How fast this is beside lerobot's diffusion policy: the same work, in the same run, in turns.

    python -m benchmarks                                 every row beside both lerobots, at most 25 minutes each
    python -m benchmarks --only train_state evaluate     some of them
    python -m benchmarks --peer lerobot==0.6.1           beside one of them
    python -m benchmarks --instructions avx2             by one set of instructions
    python -m benchmarks --json [FILE]                   what was measured, as JSON (benchmarks/results/rows.json)

On a processor with AVX-512 each row is measured once more with both sides restricted to AVX2, as most other processors
would run it. lerobot 0.4.4 and 0.6.1 get environments of their own the first time, in the user's cache folder or where
$ACTION_DIFFUSION_PEER says (8.5 GB and some minutes each). Exit code: 0, 1 where a row could not be measured, 2 for bad
input, 130 after Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.peer.arguments import Parser, chosen, guarded, json_path
from benchmarks.peer.compare import Case
from benchmarks.peer.peer_environment import NEWER, OLDER
from benchmarks.peer.rows import ROWS
from benchmarks.peer.session import run
from benchmarks.peer.workers import THREADS, instruction_sets


def parse(words: Sequence[str]) -> tuple[list[Case], Path | None]:
    """What to measure, in order, and where the JSON goes. Raises `InputError`."""
    parser = Parser("python -m benchmarks", __doc__, rows=[row.name for row in ROWS], json="rows.json")
    parser.add_argument(
        "--peer", nargs="+", action="extend", metavar="NAME", help=f"{OLDER} or {NEWER}, instead of both"
    )
    options = parser.parse_args(list(words))
    peers = chosen("peer", "--peer", options.peer, (NEWER, OLDER))
    names = chosen("row", "--only", options.only, [row.name for row in ROWS])
    sets = chosen("set of instructions", "--instructions", options.instructions, instruction_sets())
    cases = [
        Case(replace(row, peer=peer), instructions, THREADS)
        for instructions in sets
        for row in ROWS
        if row.name in names
        for peer in (peers if row.peer == "lerobot" else [row.peer])
    ]
    return cases, json_path(options.json)


def main(words: Sequence[str]) -> int:
    """Measure, show, write; returns the exit code."""
    return guarded(lambda console: run(*parse(words), console))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
