"""Which of several ways to do the same is the fastest on this machine: measured at first use, kept for the next time.

    ways = {"torch": f, "winograd": g}          the same operation; the first is torch's own
    fastest("conv1d", (16, 64, 96, 96), ways)   "torch" or "winograd", from what was measured here

A threshold that was measured on one processor holds nowhere else by right. What is measured lies in the user's cache
folder, one file for each processor, version of torch and of this package, so a run that goes on takes the ways of the
run before. All measurements of a process together take `BUDGET` seconds at most; what is met after that is done the
first way, and measured another time.

The environment's ACTION_DIFFUSION_KERNELS is `auto` (the default), `off` (never the code in C of this package) or `on`
(that code wherever it can be used). Nothing is measured then between it and torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from action_diffusion.errors import InputError, unknown

MODES = ("auto", "off", "on")
BUDGET = 2.0
"""Seconds that all measurements of a process may take."""
ROUNDS, MOST_ROUNDS, ENOUGH = 2, 10, 0.03
"""Of each way, by turns, and more as long as they take less than these seconds. The fastest counts: other programs only
make it slower."""
RESTRICTIONS = ("ACTION_DIFFUSION_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
"""What in the environment keeps code from instructions that the processor has."""


def mode() -> str:
    """`auto`, `off` or `on`. Raises `InputError` for anything else in the environment."""
    given = os.environ.get("ACTION_DIFFUSION_KERNELS", "auto")
    if given not in MODES:
        raise unknown("ACTION_DIFFUSION_KERNELS", given, MODES)
    return given


def fastest(
    operation: str, size: tuple[Any, ...], ways: Mapping[str, Callable[[], object]], ours: Collection[str] = ()
) -> str:
    """The name of the fastest of `ways` for an operation of this size, with torch's present number of threads.

    ways: name → does the work once; the first is taken where nothing is known. ours: those that run code in C of this
    package.
    """
    table = _table()
    name = table.known.get((operation, size, torch.get_num_threads(), os.environ.get("ACTION_DIFFUSION_KERNELS")))
    return table.choose(operation, size, ways, ours) if name is None or name not in ways else name


class Table:
    """What was measured on this machine, in memory and in a file. seconds: key → way → seconds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[tuple[Any, ...], str] = {}
        self.seconds = _read(path)
        self.spent = 0.0
        self._measuring = False
        self._told: Mapping[str, str] = {}

    @property
    def taken(self) -> dict[str, str]:
        """The ways of this process so far: operation, size and threads → way."""
        return {_key(operation, size, threads): name for (operation, size, threads, _), name in self.known.items()}

    def take(self, ways: Mapping[str, str]) -> None:
        """Take `ways`, `taken` in another process, wherever they can be had: the last bits depend on it."""
        self._told = dict(ways)
        self.known.clear()

    def choose(
        self, operation: str, size: tuple[Any, ...], ways: Mapping[str, Callable[[], object]], ours: Collection[str]
    ) -> str:
        """`fastest`, where it has not been asked before."""
        setting, threads = mode(), torch.get_num_threads()
        allowed = [name for name in ways if not (setting == "off" and name in ours)]
        if setting == "on" and any(name in ours for name in allowed):
            allowed = [name for name in allowed if name in ours]
        key = _key(operation, size, threads)
        if self._told.get(key) in allowed:
            allowed = [self._told[key]]
        late = self.spent >= BUDGET and not self._measuring
        if len(allowed) > 1 and not late and not self._knows(key, allowed):
            self._measure(key, {name: ways[name] for name in allowed})
        measured = self.seconds.get(key, {})
        name = min(allowed, key=lambda name: measured.get(name, float("inf")))  # the first where nothing is known
        self.known[operation, size, threads, os.environ.get("ACTION_DIFFUSION_KERNELS")] = name
        return name

    def _knows(self, key: str, allowed: Collection[str]) -> bool:
        """Whether each way was measured: here, or meanwhile by another process, whose word then counts."""
        if set(allowed) <= self.seconds.get(key, {}).keys():
            return True
        found = _read(self.path).get(key, {})
        if known := set(allowed) <= found.keys():
            self.seconds[key] = found
        return known

    def _measure(self, key: str, ways: Mapping[str, Callable[[], object]]) -> None:
        began, outer = time.perf_counter(), not self._measuring
        self._measuring = True
        try:
            best = dict.fromkeys(ways, float("inf"))
            for once in ways.values():
                once()  # lays out what it needs, and measures in turn what it is made of
            first = time.perf_counter()
            for done in range(MOST_ROUNDS):
                if done >= ROUNDS and time.perf_counter() - first > ENOUGH:
                    break
                for name, once in ways.items():
                    start = time.perf_counter()
                    once()
                    best[name] = min(best[name], time.perf_counter() - start)
        finally:
            self._measuring = not outer
            self.spent += (time.perf_counter() - began) * outer
        self.seconds[key] = self.seconds.get(key, {}) | best
        if outer:
            self._write()

    def clear(self) -> None:
        """Forget what was measured, in the file too."""
        self.known, self.seconds, self.spent, self._told = {}, {}, 0.0, {}
        with suppress(OSError):
            self.path.unlink()

    def _write(self) -> None:
        """With what other processes have written, which stays. A folder that cannot be written to keeps nothing."""
        theirs = _read(self.path)
        self.seconds |= {key: ways for key, ways in theirs.items() if ways.keys() >= self.seconds.get(key, {}).keys()}
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self.seconds, indent=1, sort_keys=True))
            os.replace(temporary, self.path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()


def _key(operation: str, size: tuple[Any, ...], threads: int) -> str:
    return f"{operation} {_written(size)} threads={threads}"


def _written(size: tuple[Any, ...]) -> str:
    """Numbers, then words: 16x128x48:float32."""
    numbers = "x".join(str(part) for part in size if isinstance(part, int))
    return ":".join([numbers, *(str(part) for part in size if not isinstance(part, int))])


@cache
def _table() -> Table:
    return Table(table_path())


def forget() -> None:
    """Read the table again, and measure for another `BUDGET`: for tests, and for processes that time things."""
    _table.cache_clear()


def table() -> Table:
    """The table of this process."""
    return _table()


def table_path() -> Path:
    """Where the table of this machine is."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    identity = json.dumps(machine(), sort_keys=True)
    return Path(base) / "action-diffusion" / "kernels" / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"


def machine() -> dict[str, str]:
    """What the fastest way depends on, beside the number of threads: processor, its instructions, versions, code."""
    lines = _processor()
    restricted = {name: os.environ[name] for name in RESTRICTIONS if name in os.environ}
    return {
        "processor": lines.get("model name", platform.processor() or platform.machine()),
        "instructions": hashlib.sha256(lines.get("flags", lines.get("Features", "")).encode()).hexdigest()[:16],
        "torch": torch.__version__,
        "package": _package_version(),
        "code": _code(),
        **restricted,
    }


def _processor() -> dict[str, str]:
    """The first processor's lines in /proc/cpuinfo; none on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _package_version() -> str:
    try:
        return version("action-diffusion")
    except PackageNotFoundError:
        return "unknown"


@cache
def _code() -> str:
    """Of what was compiled, so that a table does not outlive it."""
    from action_diffusion import native

    return hashlib.sha256(b"".join(path.read_bytes() for path in native.libraries())).hexdigest()[:16]


def _read(path: Path) -> dict[str, dict[str, float]]:
    """What a file says; nothing where it is missing or not ours."""
    try:
        found = json.loads(path.read_text())
        return {str(key): {str(way): float(s) for way, s in ways.items()} for key, ways in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


__all__ = ["InputError", "fastest", "forget", "machine", "mode", "table", "table_path"]
