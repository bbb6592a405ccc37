"""A bar with the time left, on stderr, for what takes over two seconds; lines where that is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_QUIET_SECONDS = 2.0
_LINE_SECONDS = 10.0


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the amount just done, of `total`, of which `done` is there already.

    What goes beyond the total, an estimate maybe, is shown as all of it.
    """
    meter = _Meter(description, total, done)
    try:
        yield meter.advance
    finally:
        meter.close()


class _Meter:
    def __init__(self, description: str, total: int, done: int) -> None:
        self._description, self._total, self._done = description, max(total, 1), done
        self._started = self._line = time.monotonic()
        self._since: tuple[float, int] | None = None  # the first advance: what came before may have waited for somebody
        self._bar: Progress | None = None

    def advance(self, amount: int) -> None:
        self._done = min(self._done + amount, self._total)
        now = time.monotonic()
        began, first = self._since = self._since or (now, self._done)
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self._done)
        elif now - self._started > _QUIET_SECONDS:
            if sys.stderr.isatty():
                self._open_bar()
            elif now - self._line > _LINE_SECONDS:
                self._line = now
                said = f"{self._description}: {self._done / self._total:.0%}"
                if self._done > first:
                    said += f", {(now - began) * (self._total - self._done) / (self._done - first):.0f} s left"
                print(said, file=sys.stderr)

    def _open_bar(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._bar.add_task(self._description, total=self._total, completed=self._done)
        self._bar.start()

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
