"""The workers as the benchmark sees them: processes that do one thing at a time, and sleep between."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peer.peers import serving

THREADS = 2
RESTRICTED = {
    "avx2": {
        "ACTION_DIFFUSION_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",  # OpenVINO's own oneDNN reads it too
    }
}
"""What keeps a process to a set of instructions on a processor that has more."""
QUIET_SECONDS = 0.1
"""A worker that used less than a fifth of this much processor time in this time is asleep."""


def instruction_sets() -> list[str]:
    """The processor's vector instructions, widest first: ["avx512", "avx2"], ["avx2"], or what torch calls others."""
    widest = serving.instructions()
    return ["avx512", "avx2"] if widest == "avx512" else [widest]


class WorkerError(RuntimeError):
    """A worker could not do what it was told, or died. The message is one line."""


class Worker:
    """A process that takes orders (`peers/serving.py`).

    command: what to run. log: where its stderr goes. progress: called with what it says of long work.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        threads: int = THREADS,
        cwd: Path | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.name, self._log, self._progress = name, log, progress
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), **(environment or {})},
                cwd=cwd,
                text=True,
                start_new_session=True,  # Ctrl-C is ours to handle, and its processes can be told by their session
            )

    def ask(self, order: str, **values: Any) -> dict[str, Any]:
        """Give an order, and wait for its answer. Raises `WorkerError`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"order": order, **values}) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                answer = _answer(line)
                if answer is None:
                    continue
                if "progress" in answer:
                    self._progress(answer["progress"])
                    continue
                if "error" in answer:
                    raise WorkerError(f"{self.name}: {answer['error']}")
                return answer
        except BrokenPipeError:
            pass
        code = self._process.wait()
        raise WorkerError(f"{self.name}: its process ended with exit code {code}: {_last_line(self._log)}")

    def settle(self, seconds: float = 20.0) -> None:
        """Wait until it and its own processes sleep: threads that spin, loaders that read ahead."""
        deadline = time.monotonic() + seconds
        before, asleep = self._processor_seconds(), 0
        while asleep < 2 and time.monotonic() < deadline:  # once may be others' turn on a busy machine
            time.sleep(QUIET_SECONDS)
            now = self._processor_seconds()
            asleep = asleep + 1 if now - before < QUIET_SECONDS / 5 else 0
            before = now

    def _processor_seconds(self) -> float:
        """Of all processes of its session; 0 where there is no /proc, so that `settle` waits once."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:  # it ended just now
                continue
            if int(fields[3]) == self._process.pid:
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Let it end by itself, and else end it with all that it started."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self._process.stdin.close()
            self._process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _answer(line: str) -> dict[str, Any] | None:
    """None for what a library printed before the worker could see to it."""
    try:
        answer = json.loads(line)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
