"""The recorder's process: from a run's rings to DIR/record.zarr, a replay buffer that opens at any time.

    data/<observation>, data/action   one row a control step: demonstrations, once somebody says which are good
    steps/      when each step was, on which tick, who commanded, what the loop said of it
    chunks/     what the policy was asked and answered
    setpoints/  every setpoint of the arm, with its phase
    events/     what the loop (0) and the arm's process (1) did, and why, as text
    episodes/   starts, and what a person said of them: 0 nothing, 1 success, 2 failure

Twice a second everything so far is committed. If the loop dies, what it left in the rings, and how the arm came to a
stop, is still recorded; if this process dies too, the record holds what was committed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.storage.growing import TIME, GrowingBuffer
from action_diffusion.deploy.hardware.command import CommandLayout
from action_diffusion.deploy.hardware.protocols import Group
from action_diffusion.deploy.ipc.processes import Ending, report, serve
from action_diffusion.deploy.ipc.rings import Record, RingReader
from action_diffusion.errors import InputError

COMMIT = 0.5
"""Between two commits (s)."""
AFTERMATH = 1.0
"""How long (s) the arm is watched after the loop has died."""
LETTERS = 240
_LOOK = 0.02
_LATER = ("interventions", "refusals", "action")
Rows = dict[str, list[object]]


class RunRecorder:
    """Takes new records from the rings in `folder`, and puts them into a buffer at `output`.

    later: a JSON file of further attributes, there where the loop lived to the end of the run.
    """

    def __init__(self, folder: Path, output: Path, attrs: Mapping[str, object], later: Path) -> None:
        if output.exists():
            raise InputError(f"{output} exists: give another output_dir")
        names = ("seen", "steps", "chunks", "episodes", "setpoints", "events")
        self._rings = {name: RingReader(folder / name) for name in names}
        self._heard = {name: ring.count - 1 for name, ring in self._rings.items()}
        self._output, self._attrs, self._layout = output, dict(attrs), _layout(folder)
        self._later = later
        self._rows: dict[str, Rows] = {}
        self._ends: list[int] = []
        self._lost, self._n_rows, self._last_step = 0, 0, -1
        self._setpoint: np.ndarray | None = None
        self._buffer: GrowingBuffer | None = None

    def look(self) -> None:
        """Take what is new."""
        for record in self._new("setpoints"):
            self._setpoint = record.values["command"]
            self._put("setpoints", {TIME: record.t, "command": self._setpoint, "phase": record.values["phase"]})
        for record in self._new("events"):
            self._say(1, record.t, record.values["kind"].item() + b": " + record.values["why"].item())
        for record in self._new("episodes"):
            self._episode(record)
        for record in self._new("steps"):
            self._step(record)
        for record in self._new("chunks"):
            self._put("chunks", {TIME: record.t, **record.values})

    def _new(self, name: str) -> list[Record]:
        records = self._rings[name].after(self._heard[name])
        if records:
            self._heard[name] = records[-1].number
        return records

    def _as_action(self, setpoint: np.ndarray) -> np.ndarray:
        """In the terms of the policy, whose rotations may be 6D."""
        (size,) = self._rings["steps"].fields["action"][1]
        if size == len(setpoint):
            return setpoint
        return self._layout.to_actions(setpoint, size)

    def _episode(self, record: Record) -> None:
        if not record.values["begins"]:
            mark = {"seed": record.values["seed"], "mark": record.values["mark"]}
            self._put("episodes", {TIME: record.t, **mark})

    def _step(self, record: Record) -> None:
        seen = self._rings["seen"].read(record.number)
        self._lost += record.number - self._last_step - 1 + (seen is None)
        self._last_step = record.number
        if seen is None:
            return
        values = record.values
        if int(values["step"]) == 0 or not self._ends:
            self._ends.append(self._n_rows)
        still = values["action"] if self._setpoint is None else self._as_action(self._setpoint)
        self._put("data", {**seen.values, "action": values["action"] if values["commanded"] else still})
        plain = {key: value for key, value in values.items() if key not in _LATER}
        self._put("steps", {TIME: record.t, "observed": seen.t, **plain})
        self._n_rows += 1
        self._ends[-1] = self._n_rows
        for line in values["refusals"].item().split(b"\n"):
            if line:
                self._say(0, record.t, line)

    def _say(self, source: int, t: float, line: bytes) -> None:
        letters = np.zeros(LETTERS, np.uint8)
        cut = np.frombuffer(line[:LETTERS], np.uint8)
        letters[: len(cut)] = cut
        self._put("events", {TIME: t, "source": source, "text": letters})

    def _put(self, table: str, row: Mapping[str, object]) -> None:
        rows = self._rows.setdefault(table, {key: [] for key in row})
        for key, value in row.items():
            rows[key].append(value)

    def commit(self) -> None:
        """Write what has come. Before the first step there is nothing to open, and nothing is made."""
        if self._buffer is None and not self._n_rows:
            return
        if self._buffer is None:
            self._buffer = self._made()
        for name, rows in self._rows.items():
            table = self._buffer.data if name == "data" else self._buffer.tables[name]
            table.add(rows)
        self._rows.clear()
        self._buffer.commit(self._ends)

    def _made(self) -> GrowingBuffer:
        action = ("f8", self._rings["steps"].fields["action"][1])
        number, time_ = ("i8", ()), ("f8", ())
        plain = {key: field for key, field in self._rings["steps"].fields.items() if key not in _LATER}
        tables: dict[str, Any] = {
            "steps": {**plain, "observed": time_, TIME: time_},
            "chunks": {**self._rings["chunks"].fields, TIME: time_},
            "setpoints": {"command": self._rings["setpoints"].fields["command"], "phase": ("i4", ()), TIME: time_},
            "events": {"source": ("i4", ()), "text": ("u1", (LETTERS,)), TIME: time_},
            "episodes": {"seed": number, "mark": ("i4", ()), TIME: time_},
        }
        data = {**self._rings["seen"].fields, "action": action}
        return GrowingBuffer.create(self._output, data=data, tables=tables, attrs=self._attrs)

    def finish(self) -> None:
        """The last commit."""
        self.commit()
        if self._buffer is not None:
            self._buffer.finish(
                self._ends, json.loads(self._later.read_text(encoding="utf-8")) if self._later.exists() else {}
            )
        if self._lost:
            print(f"{self._output} lacks {self._lost} steps: the recorder came too late", file=sys.stderr)


def _layout(folder: Path) -> CommandLayout:
    """Of the arm's commands, as its process has reported them."""
    said = folder / "arm.json"
    groups = json.loads(said.read_text(encoding="utf-8"))["command"] if said.exists() else []
    return CommandLayout([Group(**{**group, "reference": tuple(group["reference"])}) for group in groups])


def run(*, folder: Path, name: str, output: str, attrs: Mapping[str, object], later: str) -> None:
    """Record until asked to end, or until the loop is gone. Raises `InputError` where the disk refuses."""
    ending = Ending()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 5)  # what records gives way to what moves
    recorder = RunRecorder(folder, Path(output), attrs, Path(later))
    report(folder, name, {})
    committed, last = time.monotonic(), float("inf")
    while True:
        now = time.monotonic()
        if ending:
            last = min(last, now + AFTERMATH) if ending.orphaned else now
        recorder.look()
        if now >= last:
            break
        if now - committed >= COMMIT:
            recorder.commit()
            committed = now
        time.sleep(_LOOK)
    recorder.finish()


def main() -> int:
    return serve(run)


if __name__ == "__main__":
    sys.exit(main())
