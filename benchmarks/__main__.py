"""How fast this is beside lerobot's diffusion policy: the same work, in the same run, in turns.

    python -m benchmarks                                 every row, at most 25 minutes
    python -m benchmarks --only train_state evaluate     some of them
    python -m benchmarks --json FILE                     what was measured, as JSON

lerobot 0.4.4 gets an environment of its own the first time, in the user's cache folder or where $ACTION_DIFFUSION_PEER
says (8.5 GB, some minutes). Exit code: 0, 1 where a row could not be measured, 2 for bad input, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from action_diffusion.errors import InputError, unknown
from benchmarks.compare import ROW_SECONDS, Different, Result, compare
from benchmarks.episodes import exported_episodes
from benchmarks.peer_environment import peer_environment
from benchmarks.report import machine, show, write_json
from benchmarks.rows import ROWS, Row
from benchmarks.workers import Worker, WorkerError

ROOT = Path(__file__).resolve().parents[1]
SPIN = {"GOMP_SPINCOUNT": "5000"}
"""For both sides: OpenMP's threads wait by spinning, and a short spin keeps a busy machine from slowing either."""


RUN_SECONDS = 1300.0
"""Rows are measured for less than `ROW_SECONDS` where they would not all fit into this."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parse(words: Sequence[str]) -> tuple[list[Row], Path | None]:
    """The rows to measure, in order, and where the JSON goes. Raises `InputError`."""
    parser = _Parser(
        prog="python -m benchmarks",
        description=(__doc__ or "").partition("\n\n")[0],
        epilog="rows: " + ", ".join(row.name for row in ROWS),
    )
    parser.add_argument("--only", nargs="+", action="extend", metavar="NAME", help="these rows, instead of all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured to this file")
    options = parser.parse_args(list(words))
    names = {row.name: row for row in ROWS}
    for name in options.only or ():
        if name not in names:
            raise unknown("row", name, names, where="--only")
    if options.json is not None and options.json.is_dir():
        raise InputError(f"--json {options.json} is a folder, expected a file")
    return [row for row in ROWS if options.only is None or row.name in options.only], options.json


def main(words: Sequence[str]) -> int:
    """Measure, show, write; returns the exit code."""
    console = Console(stderr=True, highlight=False)
    try:
        rows, path = parse(words)
        return run(rows, path, console)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing is written", file=sys.stderr)
        return 130


def run(rows: Sequence[Row], path: Path | None, console: Console) -> int:
    """Measure `rows` one after the other, show and write what came of it; returns the exit code."""
    found: dict[str, dict[str, Any]] = {"machine": machine()}  # before it is kept busy
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as scratch, _Workers(Path(scratch), console) as workers:
        results, failures = _measure(rows, workers, scratch, console)
        found["versions"] = workers.versions()
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    show(out, **found, results=results, failures=failures)
    if path is not None:
        write_json(path, **found, results=results, failures=failures)
    return 1 if failures else 0


def _measure(
    rows: Sequence[Row], workers: _Workers, scratch: str, console: Console
) -> tuple[list[Result], dict[str, str]]:
    """What was found, and why a row has no figures; one that fails leaves the others to be measured."""
    results: list[Result] = []
    failures: dict[str, str] = {}
    data = exported_episodes() if any(row.work == "gather" for row in rows) else None
    for name in {"ours": None} | {row.peer: None for row in rows}:
        workers[name]  # what cannot start is said before anything is measured
    deadline = time.monotonic() + RUN_SECONDS
    for index, row in enumerate(rows):
        line, began = f"{index + 1}/{len(rows)} {row.name}", time.monotonic()
        seconds = min(ROW_SECONDS, (deadline - began) / (len(rows) - index))
        if row.work == "gather":
            row = replace(row, settings={**row.settings, "data": str(data)})
        try:
            with _status(console, line) as say, _folder(scratch) as folder:
                result = compare(row, workers["ours"], workers[row.peer], folder, say=say, seconds=seconds)
        except (Different, WorkerError) as error:
            failures[row.name] = str(error)
            console.print(f"{line}: {error}", style="red", markup=False, soft_wrap=True)
            workers.forget()
            continue
        results.append(result)
        took = f"{result.pairs} pairs, {time.monotonic() - began:.0f} s"
        console.print(f"{line}: ratio {result.ratio:.2f} ({took})", markup=False, soft_wrap=True)
    return results, failures


class _Workers(contextlib.AbstractContextManager["_Workers"]):
    """The workers by name, started when they are first asked for; ended with the block."""

    def __init__(self, scratch: Path, console: Console) -> None:
        self._scratch, self._console = scratch, console
        self._running: dict[str, Worker] = {}
        self._about: dict[str, dict[str, Any]] = {}

    def __getitem__(self, name: str) -> Worker:
        if name not in self._running:
            command, variables = self._command(name)
            self._running[name] = Worker(
                name,
                command,
                log=self._scratch / f"{name}.log",
                environment=SPIN | variables,
                cwd=ROOT,
                progress=lambda text: self._console.print(f"  {text}", markup=False, soft_wrap=True),
            )
            self._about[name] = self._running[name].ask("about")
        return self._running[name]

    def _command(self, name: str) -> tuple[list[str], dict[str, str]]:
        if name != "lerobot":
            return [sys.executable, "-m", f"benchmarks.{name}"], {}
        peer = peer_environment(say=lambda text: self._console.print(text, markup=False, soft_wrap=True))
        script = ROOT / "benchmarks" / "peers" / "lerobot_worker.py"
        return [str(peer.python), str(script)], peer.variables

    def versions(self) -> dict[str, dict[str, Any]]:
        """What each worker said of itself."""
        return self._about

    def forget(self) -> None:
        """End all workers, so that the next row gets fresh ones."""
        for worker in self._running.values():
            worker.close()
        self._running.clear()

    def __exit__(self, *_: object) -> None:
        self.forget()


@contextlib.contextmanager
def _status(console: Console, line: str) -> Iterator[Any]:
    """A line that shows what is going on; gives the function to say it with. Silent where stderr is no terminal."""
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status(line) as status:
        yield lambda text: status.update(f"{line}: {text}")


@contextlib.contextmanager
def _folder(scratch: str) -> Iterator[Path]:
    """An empty folder for a row, gigabytes of weights among it, which are deleted with the row."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        yield Path(folder)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # workers and gigabytes of weights are not left behind
    raise SystemExit(main(sys.argv[1:]))
