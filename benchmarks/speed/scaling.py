"""How a training's time and memory grow on this machine: one setting at a time, by `action-diffusion train` itself.

    python -m benchmarks.speed.scaling [only=base,batch,…] [steps=20] [rounds=3]

Demonstrations of made-up pictures and states are written for each row; what differs from the first row is in the
table. Time is of an optimiser step once the first ten are over, the median of rounds that take turns; memory is the
largest that a process had, of the system's count, all of torch included. With two processes the batch is a half each.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError, unknown
from action_diffusion.progress import progress
from benchmarks.command import command, options, whole

SMALL, MEDIUM = (128, 256, 512), (256, 512, 1024)
LENGTH = 100
"""Rows of an episode."""


@dataclass(frozen=True)
class Setting:
    """batch: windows of all processes together. pixels: height and width. rows: of the data. channels: of the U-Net."""

    batch: int = 32
    cameras: int = 1
    pixels: int = 96
    steps_seen: int = 2
    channels: tuple[int, ...] = SMALL
    rows: int = 4000
    processes: int = 1

    def save(self, path: Path) -> None:
        """Demonstrations with as many cameras and rows."""
        random = np.random.default_rng(0)
        shape = (self.rows, self.pixels, self.pixels, 3)
        arrays = {f"camera{i}": random.integers(0, 255, shape, np.uint8) for i in range(self.cameras)}
        arrays |= {key: random.uniform(-1, 1, (self.rows, 7)).astype(np.float32) for key in ("joints", "action")}
        ReplayBuffer.from_arrays(arrays, np.arange(LENGTH, self.rows + 1, LENGTH), {"control_rate": 10.0}).save(path)

    def words(self, data: Path, output: Path, steps: int) -> list[str]:
        """Of `action-diffusion train`."""
        return [
            *("task=custom", "encoder=resnet18_small", f"data={data}", f"output_dir={output}", "device=cpu"),
            *(f"policy.denoiser.channels={list(self.channels)}", f"task.n_obs_steps={self.steps_seen}"),
            *(f"train.batch_size={self.batch // self.processes}", f"train.num_processes={self.processes}"),
            *(f"train.max_steps={10 + steps}", "train.validate_every=0", "train.tensorboard=false"),
            *("evaluation.n_episodes=0", "dataset.val_windows=16"),
        ]


BASE = Setting()
ROWS = {
    "base": BASE,
    "batch": replace(BASE, batch=64),
    "cameras": replace(BASE, cameras=2),
    "pixels": replace(BASE, pixels=192),
    "history": replace(BASE, steps_seen=4),
    "denoiser": replace(BASE, channels=MEDIUM),
    "data": replace(BASE, rows=16_000),
    "processes": replace(BASE, processes=2),
}


@dataclass(frozen=True)
class Cost:
    """seconds: of a step. bytes: of the process that had most."""

    seconds: float
    bytes: int


def cost(setting: Setting, data: Path, folder: Path, steps: int) -> Cost:
    """Train for so many steps behind the first ten. Raises `InputError` with what the command said."""
    output = folder / "run"
    line = [sys.executable, "-m", "action_diffusion", "train", *setting.words(data, output, steps)]
    with (folder / "stderr").open("w") as file:
        process = subprocess.Popen(line, stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise InputError(f"{' '.join(line[1:])}: {(folder / 'stderr').read_text().strip()[-400:]}")
    lines = [json.loads(text) for text in (output / "metrics.jsonl").read_text().splitlines()]
    rates = [row["samples_per_second"] for row in lines if row.get("samples_per_second") and row["step"] > 10]
    return Cost(setting.batch / statistics.median(rates), usage.ru_maxrss * 1024)


def differs(setting: Setting) -> str:
    """From the first row."""
    named = {name: value for name, value in vars(setting).items() if value != getattr(BASE, name)}
    return ", ".join(f"{name} {value} for {getattr(BASE, name)}" for name, value in named.items())


@command
def main(words: Sequence[str]) -> int:
    """See the module."""
    given = options(words, {"only": ",".join(ROWS), "steps": "20", "rounds": "3"})
    names, steps, rounds = (
        given["only"].split(","),
        whole("steps", given["steps"], 10),
        whole("rounds", given["rounds"]),
    )
    for name in names:
        if name not in ROWS:
            raise unknown("row", name, ROWS)
    found: dict[str, list[Cost]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as place, progress("training", rounds * len(names)) as advance:
        folder = Path(place)
        for name in names:
            ROWS[name].save(folder / f"{name}.zarr")
        for number in range(rounds):
            for name in names:
                work = folder / f"{name}-{number}"
                work.mkdir()
                found[name].append(cost(ROWS[name], folder / f"{name}.zarr", work, steps))
                advance(1)
    table = Table("row", "what differs", "ms a step", "beside the first", "GB a process", box=None, pad_edge=False)
    first = statistics.median(one.seconds for one in found[names[0]])
    for name, costs in found.items():
        seconds = statistics.median(one.seconds for one in costs)
        memory = max(one.bytes for one in costs) / 1e9
        table.add_row(name, differs(ROWS[name]), f"{1e3 * seconds:,.0f}", f"{seconds / first:.2f}", f"{memory:.2f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
