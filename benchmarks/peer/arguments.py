"""The command line of what is measured in turns (`benchmarks`, `benchmarks.peer.runtimes`, `benchmarks.systems`)."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from action_diffusion.errors import InputError, unknown
from benchmarks.peer.workers import WorkerError

RESULTS = Path(__file__).resolve().parents[1] / "results"


class Parser(argparse.ArgumentParser):
    """What they have: --only, --json, and --instructions for what is measured by each."""

    def __init__(
        self, prog: str, doc: str | None, *, rows: Sequence[str], json: str, instructions: bool = True
    ) -> None:
        super().__init__(prog=prog, description=(doc or "").partition("\n\n")[0], epilog="rows: " + ", ".join(rows))
        several: dict[str, Any] = {"nargs": "+", "action": "extend", "metavar": "NAME"}
        self.add_argument("--only", **several, help="these rows, instead of all")
        if instructions:
            self.add_argument("--instructions", **several, help="avx512 or avx2, instead of all that are here")
        self.add_argument(
            "--json",
            type=Path,
            nargs="?",
            const=RESULTS / json,
            metavar="FILE",
            help=f"write what was measured to this file (default: {json} in benchmarks/results)",
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def chosen(kind: str, option: str, given: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """Those of `known` that `option` gives, in their order; all where it gives none. Raises `InputError` for others."""
    for name in given or ():
        if name not in known:
            raise unknown(kind, name, known, where=option)
    return [name for name in known if given is None or name in given]


def json_path(path: Path | None) -> Path | None:
    """The same. Raises `InputError` for a folder."""
    if path is not None and path.is_dir():
        raise InputError(f"--json {path} is a folder, expected a file")
    return path


def guarded(measure: Callable[[Console], int]) -> int:
    """The exit code of `measure`, or that of what stopped it, said in one line.

    Ends by SIGTERM as by Ctrl-C: workers and gigabytes of weights are not left behind.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return measure(Console(stderr=True, highlight=False))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing is written", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
