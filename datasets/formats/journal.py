"""The steps of a conversion that are done, one a line, with what each has to tell to the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from action_diffusion.progress import progress


class JournalStep(NamedTuple):
    """name: unique. n_bytes: for the progress bar."""

    name: str
    n_bytes: int
    do: Callable[[], Any]


class Journal:
    """A file that a killed process leaves whole, but for a line that was cut off."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().split("\n")[:-1] if path.exists() else []  # a line without its end was cut off
        self._done: dict[str, Any] = dict(json.loads(line) for line in lines)
        if path.exists():
            path.write_text("".join(line + "\n" for line in lines))

    @property
    def empty(self) -> bool:
        return not self._done

    def each(self, steps: Iterable[JournalStep], description: str) -> dict[str, Any]:
        """Do the steps that are not done, and return what all of them told, which must be plain values."""
        steps = list(steps)
        done = sum(step.n_bytes for step in steps if step.name in self._done)
        told = {}
        with (
            progress(description, sum(step.n_bytes for step in steps), done) as advance,
            self._path.open("a") as lines,
        ):
            for step in steps:
                if step.name not in self._done:
                    line = json.dumps([step.name, step.do()])
                    lines.write(line + "\n")
                    lines.flush()
                    self._done[step.name] = json.loads(line)[1]
                    advance(step.n_bytes)
                told[step.name] = self._done[step.name]
        return told
