"""What a deployment leaves behind: every step in `log.jsonl`, and how well it kept time in `latency.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from action_diffusion.deploy.loop.events import StepRecord
from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path, writing

NAME = "log.jsonl"


def check_new(output_dir: Path) -> None:
    """Raises `InputError` for a folder that holds a log already."""
    if (output_dir / NAME).exists():
        raise InputError(f"{output_dir} already holds a log: give another output_dir")


class RunLog:
    """Appends a JSON object a step to DIR/log.jsonl, whole lines at once, so that a stopped run leaves them all.

    `notes`: plain values for the summary, of whoever knows more.

    Leaving the `with` block, however that happens, writes DIR/latency.json; a run without a step leaves nothing.
    Raises `InputError` for a folder that holds a log already, and where the disk refuses.
    """

    def __init__(self, output_dir: Path, *, control_rate: float) -> None:
        self.output_dir = output_dir
        self._control_rate = control_rate
        self._inference: list[float] = []
        self._lateness: list[float] = []
        self._delays: list[float] = []
        self._jumps: list[float] = []
        self._holds = 0
        self._missed = 0
        self._interventions = 0
        self.notes: dict[str, object] = {}
        self._file: FileIO | None = None
        self.path = output_dir / NAME
        check_new(output_dir)

    def write(self, record: StepRecord) -> None:
        """Add one step; what is not finite is not known, and null."""
        plain = {name: _known(value) for name, value in asdict(record).items()}
        with writing(str(self.path)):
            if self._file is None:
                self.output_dir.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("xb", buffering=0)
            append_line(self._file, (json.dumps(plain, allow_nan=False) + "\n").encode())
        self._lateness.append(record.lateness_ms)
        if record.inference_ms is not None:
            self._inference.append(record.inference_ms)
        if record.delay is not None:
            self._delays.append(record.delay)
        if plain["jump"] is not None:
            self._jumps.append(plain["jump"])
        self._holds += record.held
        self._missed += record.missed_ticks
        self._interventions += len(record.interventions)

    def summary(self) -> dict[str, Any]:
        """Steps, deadline misses (ticks without a command), holds, interventions; median, 95th percentile and max.

        Of times in ms, of delays in control steps, and of jumps where chunks meet in the data's units.
        """
        return {
            "control_rate": self._control_rate,
            "period_ms": 1e3 / self._control_rate,
            "steps": len(self._lateness),
            "deadline_misses": self._missed,
            "holds": self._holds,
            "interventions": self._interventions,
            "delay_steps": _spread(self._delays),
            "jump": _spread(self._jumps),
            "inference_ms": _spread(self._inference),
            "lateness_ms": _spread(self._lateness),
            **self.notes,
        }

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is None:
            return
        self._file.close()
        said = suppress(InputError) if isinstance(error, InputError) else nullcontext()  # the first reason counts
        with said, atomic_path(self.output_dir / "latency.json") as temporary:
            temporary.write_text(json.dumps(self.summary(), indent=2) + "\n", encoding="utf-8")


def append_line(file: FileIO, line: bytes) -> None:
    """The whole line, or nothing of it: a full disk may take a part. Raises `OSError` where it is full."""
    size = file.tell()
    try:
        while line:
            line = line[file.write(line) :]
    except OSError:
        file.truncate(size)
        raise


def _known(value: Any) -> Any:
    """None for a number that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"median": None, "p95": None, "max": None}
    median, p95, largest = np.percentile(values, [50, 95, 100])
    return {"median": float(median), "p95": float(p95), "max": float(largest)}
