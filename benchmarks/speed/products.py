"""What this package's code in C gives a training step on this machine's CPU, where `action_diffusion.choice` takes it.

    python -m benchmarks.speed.products [rows=train_image,train_state,train_state_medium] [seconds=30]

rows: of `python -m benchmarks`, with weights of our own. Steps with ACTION_DIFFUSION_KERNELS=off, by torch's operations
alone, and with `auto` take turns in one process; printed are medians, and the median of the ratios of neighbouring
steps with its quartiles.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from action_diffusion import choice
from action_diffusion.errors import unknown
from action_diffusion.memory import keep_freed_memory
from action_diffusion.progress import progress
from benchmarks.command import command, options, positive
from benchmarks.peer.ours import Train
from benchmarks.peer.rows import ROWS, Row, write_inputs

STEPS = {row.name: row for row in ROWS if row.work == "train"}


def with_kernels(mode: str) -> Any:
    """A context in which ACTION_DIFFUSION_KERNELS is `mode`."""
    return mock.patch.dict(os.environ, ACTION_DIFFUSION_KERNELS=mode)


def measure(row: Row, seconds: float) -> list[tuple[float, float]]:
    """Seconds of a step, by torch alone and with kernels, in turns for about `seconds`; three pairs at least."""
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(row, Path(folder))
        work = Train({**row.settings, "activation": "silu"}, Path(folder), print)
        pairs: list[tuple[float, float]] = []
        began = last = time.monotonic()
        with progress(row.name, round(1000 * seconds)) as advance:
            while len(pairs) < 4 or time.monotonic() - began < seconds:
                pair = []
                for mode in ("off", "auto"):
                    if not pairs:
                        choice.forget()  # each measures for itself, as in a process of its own
                    with with_kernels(mode):
                        pair.append(work.time(1))
                pairs.append((pair[0], pair[1]))
                now = time.monotonic()
                advance(round(1000 * (now - last)))
                last = now
    return pairs[1:]  # the first warms up


@command
def main(words: Sequence[str]) -> int:
    """See the module."""
    given = options(words, {"rows": "train_image,train_state,train_state_medium", "seconds": "30"})
    seconds, names = positive("seconds", given["seconds"]), given["rows"].split(",")
    for name in names:
        if name not in STEPS:
            raise unknown("row", name, STEPS)
    keep_freed_memory()
    for name in names:
        pairs = measure(STEPS[name], seconds)
        plain, ours = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
        low, middle, high = np.quantile([a / b for a, b in pairs], [0.25, 0.5, 0.75])
        print(f"{name}: {plain:,.0f} ms, with kernels {ours:,.0f} ms: {middle:.2f} ({low:.2f} to {high:.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
