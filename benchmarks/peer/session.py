"""A run of the benchmark: workers that are started when they are needed, and cases that are measured one by one."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.peer.compare import ROW_SECONDS, Case, Different, Result, compare
from benchmarks.peer.episodes import exported_episodes
from benchmarks.peer.peer_environment import PEERS, RUNTIMES, peer_environment
from benchmarks.peer.workers import RESTRICTED, Worker, WorkerError, instruction_sets
from benchmarks.report import commit, machine, show, write_json

ROOT = Path(__file__).resolve().parents[2]
SPIN = {"GOMP_SPINCOUNT": "5000"}
"""For both sides: OpenMP's threads wait by spinning, and a short spin keeps a busy machine from slowing either."""
MINUTES = 22.0
"""Cases beside one peer by one set of instructions are measured for less than `ROW_SECONDS` where not all fit in."""


def run(cases: Sequence[Case], path: Path | None, console: Console) -> int:
    """Measure `cases` one after the other, show and write what came of it; returns the exit code."""
    found: dict[str, Any] = {
        "machine": machine() | {"instructions": instruction_sets()[0]},
        "commit": commit(ROOT),
    }  # before it is kept busy
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as scratch, _Workers(Path(scratch), console) as workers:
        results, failures = _measure(cases, workers, scratch, console)
        found["versions"] = workers.versions
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    show(out, **found, results=results, failures=failures)
    if path is not None:
        write_json(path, **found, results=results, failures=failures)
        console.print(f"written: {path}", markup=False, soft_wrap=True)
    return 1 if failures else 0


def _measure(
    cases: Sequence[Case], workers: _Workers, scratch: str, console: Console
) -> tuple[list[Result], dict[str, str]]:
    """What was found, and why a case has no figures; one that fails leaves the others to be measured."""
    results: list[Result] = []
    failures: dict[str, str] = {}
    data = exported_episodes() if any(case.row.work == "gather" for case in cases) else None
    for name in {case.row.peer: None for case in cases}:
        workers.environment(name)  # what cannot be made is said before anything is measured
    models = Path(scratch, "models")
    models.mkdir()
    budgets: dict[tuple[str, str], list[float]] = {}  # of each peer and set of instructions: seconds, cases left
    for case in cases:
        budgets.setdefault((case.row.peer, case.instructions), [60 * MINUTES, 0.0])[1] += 1
    for index, case in enumerate(cases):
        line, began = f"{index + 1}/{len(cases)} {case}", time.monotonic()
        budget = budgets[case.row.peer, case.instructions]
        extra = {"gather": {"data": str(data)}, "network": {"models": str(models)}}.get(case.row.work, {})
        full = replace(case, row=replace(case.row, settings={**case.row.settings, **extra}))
        try:
            with _status(console, line) as say, _folder(scratch) as folder:
                sides = workers.of("ours", case), workers.of(case.row.peer, case)
                result = compare(full, *sides, folder, say=say, seconds=min(ROW_SECONDS, budget[0] / budget[1]))
        except (Different, WorkerError) as error:
            failures[str(case)] = str(error)
            console.print(f"{line}: {error}", style="red", markup=False, soft_wrap=True)
            workers.forget()
            continue
        finally:
            budget[0], budget[1] = budget[0] - (time.monotonic() - began), budget[1] - 1
        results.append(replace(result, case=case))
        took = f"{result.pairs} pairs, {time.monotonic() - began:.0f} s"
        console.print(f"{line}: ratio {result.ratio:.2f} ({took})", markup=False, soft_wrap=True)
    return results, failures


class _Workers(contextlib.AbstractContextManager["_Workers"]):
    """The workers by name, started when they are first asked for; ended with the block.

    Those that are there compute by the same instructions with as many threads: for others they make room.
    """

    def __init__(self, scratch: Path, console: Console) -> None:
        self.versions: dict[str, dict[str, Any]] = {}
        """What each worker said of itself."""
        self._scratch, self._console = scratch, console
        self._running: dict[str, Worker] = {}
        self._kind = ("", 0)

    def of(self, name: str, case: Case) -> Worker:
        """Raises `WorkerError` where it does not keep to the case's instructions."""
        if self._kind != (case.instructions, case.threads):
            self.forget()
            self._kind = case.instructions, case.threads
        if name not in self._running:
            command, variables = self._command(name)
            worker = self._running[name] = Worker(
                name,
                command,
                log=self._scratch / f"{name}.log",
                environment=SPIN | RESTRICTED.get(case.instructions, {}) | variables,
                threads=case.threads,
                cwd=ROOT,
                progress=lambda text: self._say(f"  {text}"),
            )
            about = worker.ask("about")
            if about.pop("instructions", case.instructions) != case.instructions:
                raise WorkerError(f"{name} does not keep to {case.instructions}")
            self.versions[name] = about
        return self._running[name]

    def environment(self, name: str) -> Any:
        """Of a peer that has one; installed now where it is not there."""
        return peer_environment(name, say=self._say) if name in PEERS else None

    def _command(self, name: str) -> tuple[list[str], dict[str, str]]:
        environment = self.environment(name)
        if environment is None:
            return [sys.executable, "-m", f"benchmarks.peer.{name}"], {}
        if name == RUNTIMES:
            return [sys.executable, "-m", "benchmarks.peer.runtime_worker", str(environment.packages)], {}
        script = ROOT / "benchmarks" / "peer" / "peers" / "lerobot_worker.py"
        return [str(environment.python), str(script)], environment.variables

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def forget(self) -> None:
        """End all workers, so that the next case gets fresh ones."""
        for worker in self._running.values():
            worker.close()
        self._running.clear()

    def __exit__(self, *_: object) -> None:
        self.forget()


@contextlib.contextmanager
def _status(console: Console, line: str) -> Iterator[Callable[[str], None]]:
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
