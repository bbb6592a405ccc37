"""Our networks at batch 1 on a CPU beside ONNX Runtime and OpenVINO: the same exported network, in turns, in fp32.

    python -m benchmarks.peer.runtimes                            every row, some 30 minutes
    python -m benchmarks.peer.runtimes --only step_small-openvino some of them
    python -m benchmarks.peer.runtimes --threads 1 --instructions avx2
    python -m benchmarks.peer.runtimes --json [FILE]              as JSON (benchmarks/results/runtimes.json)

A chunk is a file of `action-diffusion bundle export format=onnx`, beside `predict` without checks of observations; that
of the quick start's size has a U-Net of 48/96/192 and 20 steps of DDIM. A step is one call of the U-Net (SiLU, two
observation steps, horizon 16) with what modulates it given, the encoder a ResNet-18 with spatial softmax on two frames
of 84 x 84. Outputs must agree within 1e-4 (of a chunk: of its largest value) before anything is timed. On a
processor with AVX-512 all are restricted to AVX2 once more, but for ONNX Runtime, which has no such setting. Both
runtimes get an environment of their own the first time, in the user's cache folder (0.7 GB).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from action_diffusion.errors import InputError
from benchmarks.peer.arguments import Parser, chosen, guarded, json_path
from benchmarks.peer.compare import Case
from benchmarks.peer.peer_environment import RUNTIMES
from benchmarks.peer.rows import EXACT, MEDIUM, PAPER, SMALL, Row
from benchmarks.peer.session import run
from benchmarks.peer.workers import instruction_sets

QUICK_START = (48, 96, 192)
NETWORKS = {
    "step_small": ("one denoising step, U-Net 128/256/512", "step", SMALL),
    "step_medium": ("one denoising step, U-Net 256/512/1024", "step", MEDIUM),
    "step_paper": ("one denoising step, U-Net 512/1024/2048", "step", PAPER),
    "encoder": ("ResNet-18, two frames of 84 x 84", "encoder", SMALL),
    "chunk_states": ("one chunk from states, of the quick start's size", "chunk", QUICK_START),
    "chunk_image": ("one chunk from images, U-Net 128/256/512, DDIM 10", "chunk", SMALL),
}
OPTIONS: dict[str, dict[str, Any]] = {"chunk_states": {"image": False, "steps": 20}, "chunk_image": {"steps": 10}}
ROWS = [
    Row(
        f"{name}-{runtime}",
        what,
        "network",
        "ms",
        None,
        {"part": part, "channels": channels, "runtime": runtime, "batch": 1, **OPTIONS.get(name, {})},
        {"output": ("relative", 1e-4) if part == "chunk" else EXACT["chunk"]},
        RUNTIMES,
    )
    for name, (what, part, channels) in NETWORKS.items()
    for runtime in ("onnxruntime", "openvino")
]


def parse(words: Sequence[str]) -> tuple[list[Case], Path | None]:
    """What to measure, in order, and where the JSON goes. Raises `InputError`."""
    parser = Parser(
        "python -m benchmarks.peer.runtimes", __doc__, rows=[row.name for row in ROWS], json="runtimes.json"
    )
    parser.add_argument("--threads", nargs="+", metavar="N", help="1 or 2, instead of both")
    options = parser.parse_args(list(words))
    names = chosen("row", "--only", options.only, [row.name for row in ROWS])
    here = instruction_sets()
    cases = [
        Case(row, instructions, int(threads))
        for instructions in chosen("set of instructions", "--instructions", options.instructions, here)
        for threads in chosen("number of threads", "--threads", options.threads, ("1", "2"))
        for row in ROWS
        if row.name in names and (row.settings["runtime"] != "onnxruntime" or instructions == here[0])
    ]
    if not cases:
        raise InputError(
            f"ONNX Runtime has no setting that keeps it to other instructions than {here[0]}: leave it out"
        )
    return cases, json_path(options.json)


def main(words: Sequence[str]) -> int:
    """Measure, show, write; returns the exit code."""
    return guarded(lambda console: run(*parse(words), console))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
