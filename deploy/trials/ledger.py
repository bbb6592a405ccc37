"""What came of the runs, a line each in trials.jsonl: on disk before the next run begins, whatever ends the session."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated

from action_diffusion.deploy.records.run_log import append_line
from action_diffusion.deploy.trials.plan import Plan
from action_diffusion.errors import InputError
from action_diffusion.files import writing
from action_diffusion.schema import Between, OneOf, check

NAME = "trials.jsonl"
Index = Annotated[int, Between(0, 1_000_000_000)]


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """One run, of `bundle` in `trial` at `place`, all counted from 0.

    mark: what a person said, `measured` what a simulator did, `stopped` of a robot that ended it by itself; `undone`
    takes back the line before. score: in [0, 1]; None where the run does not count and is to be made once more.
    reason: why the robot ended it. session, episode: where in the records it is.
    """

    trial: Index
    place: Index
    bundle: Index
    mark: Annotated[str, OneOf("success", "failure", "partial", "redo", "measured", "stopped", "undone")]
    score: Annotated[float, Between(0, 1)] | None
    steps: Index = 0
    reason: str = ""
    session: Index = 0
    episode: Index | None = None
    at: str = ""


class Ledger:
    """The file in `folder`; of a run with several lines the last one holds.

    Raises `InputError` for a line that is none of this plan. Half a line at the end, of a power cut, is removed, and
    said: that run is made once more.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.path, self._plan = folder / NAME, plan
        self.lines: list[TrialRun] = []
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        whole, newline, rest = self.path.read_bytes().rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if newline else [], 1):
            self.lines.append(self._understood(line, f"{self.path}, line {number}"))
        if rest:
            print(f"{self.path} ends with half a line, which is removed: that run is made once more", file=sys.stderr)
            with writing(str(self.path)):
                os.truncate(self.path, len(whole) + len(newline))

    def _understood(self, line: bytes, where: str) -> TrialRun:
        try:
            run: TrialRun = check(json.loads(line), TrialRun)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is no run: {error}") from None
        order = self._plan.orders[run.trial] if run.trial < len(self._plan.orders) else []
        if run.place >= len(order) or order[run.place] != run.bundle:
            raise InputError(f"{where} is no run of this plan: {run.trial=}, {run.place=}, {run.bundle=}")
        return run

    @property
    def counted(self) -> dict[tuple[int, int], TrialRun]:
        """The runs that count, by (trial, place), of the trials that are to be made."""
        last = {(run.trial, run.place): run for run in self.lines if run.trial < self._plan.trials}
        return {place: run for place, run in last.items() if run.score is not None}

    @property
    def due(self) -> tuple[int, int] | None:
        """(trial, place) of the next run; None where all are made."""
        counted = self.counted
        orders = enumerate(self._plan.orders[: self._plan.trials])
        every = ((trial, place) for trial, order in orders for place in range(len(order)))
        return next((one for one in every if one not in counted), None)

    def has_begun(self, trial: int) -> bool:
        """Whether a run of `trial` counts."""
        return any(one == trial for one, _ in self.counted)

    @property
    def can_undo(self) -> bool:
        """Whether the last line is a mark that can be taken back."""
        return bool(self.lines) and self.lines[-1].score is not None

    def repeated(self) -> Counter[int]:
        """By bundle, how many runs did not count and were made once more."""
        return Counter(run.bundle for run in self.lines if run.score is None)

    def scores(self) -> list[list[float | None]]:
        """[bundle][trial]; None of a run that is not made."""
        found: list[list[float | None]] = [[None] * self._plan.trials for _ in self._plan.bundles]
        for run in self.counted.values():
            found[run.bundle][run.trial] = run.score
        return found

    def append(self, run: TrialRun) -> None:
        """On disk when this returns. Raises `InputError` where the disk refuses."""
        run = replace(run, at=datetime.now().astimezone().isoformat(timespec="seconds"))
        with writing(str(self.path)), self.path.open("ab", buffering=0) as file:
            append_line(file, (json.dumps(asdict(run), allow_nan=False) + "\n").encode())
            os.fsync(file.fileno())
        self.lines.append(run)

    def undo(self) -> None:
        """Take the last mark back: that run is due again."""
        self.append(replace(self.lines[-1], mark="undone", score=None))
