"""One run of a sweep: the command in a process of its own, as one would type it, its output in DIR/log.txt.

A process, because what ends one run (memory, a crash, a driver) must not end the others. It is told to stop, and saves,
when whoever waits for it is: by Ctrl-C, by Slurm before a job's time is over, or by its own end.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path, remove, writer_lock
from action_diffusion.policy.reading import versions
from action_diffusion.training.sweep.grid import CommandOutput, Sweep, SweepRun

PROGRAM = (sys.executable, "-m", "action_diffusion")
SAVE_SECONDS = 120.0
"""Until a run that is told to stop has saved; also, until a scheduler that told it so ends its job."""
_INTERRUPTED = 130
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class RunFailed(Exception):
    """What a sweeper that chooses by results is told of a run without one."""


@dataclass(frozen=True)
class Job:
    """The task function of Hydra's multirun; it goes to other processes and machines by pickle.

    runs: those of a grid by name, of which Hydra gives one at a time (`run=NAME`); empty where Hydra's sweeper chooses
    the values. root, cwd: absolute, and the same on all machines. versions: of what shapes results, where the sweep was
    started; a machine with others does no run of it.
    """

    command: str
    fixed: tuple[str, ...]
    config_dir: str | None
    root: Path
    runs: Mapping[str, SweepRun]
    program: tuple[str, ...] = field(default_factory=lambda: PROGRAM)
    cwd: str = field(default_factory=os.getcwd)
    versions: Mapping[str, str] = field(default_factory=versions)

    def __call__(self, config: DictConfig) -> float | None:
        """Do the run unless it is finished; the number that says how good it is, more is better.

        A grid's failed run gives None, so that the others go on; a sweeper that chooses is told by `RunFailed`.
        """
        sweep = Sweep(self.command, self.fixed, (), self.config_dir)
        if self.runs:
            run = self.runs[str(config.run)]
        else:
            words = (str(word).lstrip("+").partition("=") for word in HydraConfig.get().overrides.task)
            settings = {key: value for key, _, value in words}
            run, _ = sweep.run(settings)
        folder = self.root / "runs" / run.name
        if not finished(folder):
            self._do(sweep, run, folder)
        found = score(folder / sweep.kind.results)
        if found is None and not self.runs:
            raise RunFailed(read_outcome(folder).get("reason") or f"{run.name} has no score")
        return found

    def _do(self, sweep: Sweep, run: SweepRun, folder: Path) -> None:
        began = time.time()
        outcome: dict[str, Any] = {"command": self.command, "settings": dict(run.settings), "length": run.length}
        outcome |= {"host": socket.gethostname(), "state": "failed"}
        try:
            with writer_lock(folder):
                outcome |= {"state": "interrupted", "reason": "stopped before its end"}
                outcome |= self._outcome(sweep.words(run.settings), folder, sweep.kind)
        except InputError as error:
            outcome["reason"] = str(error)
        finally:
            earlier = read_outcome(folder).get("seconds") or 0.0
            _write(folder / "run.json", outcome | {"seconds": earlier + time.time() - began})

    def _outcome(self, words: list[str], folder: Path, kind: CommandOutput) -> dict[str, Any]:
        """Run the command; how it ended."""
        own, host = versions(), socket.gethostname()
        for name in sorted({*own, *self.versions}):
            if own.get(name) != self.versions.get(name):
                raise InputError(
                    f"{host} has {name} {own.get(name, 'not at all')}, where the sweep was started it is "
                    f"{self.versions.get(name, 'not installed')}: install the same on all machines"
                )
        folder.mkdir(parents=True, exist_ok=True)
        places = [f"output_dir={folder}"]
        if not kind.begun:  # it begins anew, and refuses a folder with a part of its output
            for path in folder.iterdir():
                if path.name not in ("log.txt", "run.json"):
                    remove(path)
        elif (folder / kind.begun).exists():
            places.append("resume=true")
        where = [] if self.config_dir is None else ["--config-dir", self.config_dir]
        command = [*self.program, self.command, *words, *places, *where]
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            start = log.tell()
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            code = _wait_for(command, log, self.cwd)
        made = [name for name in dict.fromkeys((*kind.makes, kind.results)) if (folder / name).exists()]
        if code == 0 and set(made) & set(kind.makes):
            return {"state": "finished", "reason": None, "made": made}
        reason = _reason(code, _since(folder / "log.txt", start))
        return {"state": "interrupted" if code == _INTERRUPTED else "failed", "reason": reason}


def finished(folder: Path) -> bool:
    """Whether a run ended well, and what it made stands."""
    outcome = read_outcome(folder)
    made = outcome.get("made")
    if outcome.get("state") != "finished" or not isinstance(made, list):
        return False
    return all((folder / str(name)).exists() for name in made)


def read_outcome(folder: Path) -> dict[str, Any]:
    """What `run.json` says; {} where there is none, or none of ours."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        ours = {"state": str, "settings": dict, "seconds": int | float}
        if isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in ours.items()):
            return found
    return {}


def score(results: Path) -> float | None:
    """Mean score, or less the mean action error where there is no simulator: more is better. None without results."""
    with contextlib.suppress(OSError, ValueError, RecursionError, TypeError, AttributeError):
        found = json.loads(results.read_text(encoding="utf-8"))
        value = found.get("mean_score")
        if value is None and found.get("action_error_relative") is not None:
            value = -found["action_error_relative"]
        return None if value is None else float(value)
    return None


def _wait_for(command: list[str], log: IO[str], cwd: str) -> int:
    """Run it to its end. What interrupts us makes it save and end first."""
    pressed, restore = _ctrl_c_later()  # while it starts, nobody could pass it on
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            start_new_session=True,  # a terminal's Ctrl-C is for us, who pass it on once: the second would not save
            preexec_fn=_begin,
        )
    except BaseException:
        restore()
        raise
    try:
        restore()
        if pressed:
            raise KeyboardInterrupt
        code = process.wait()
        if code == _INTERRUPTED and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            time.sleep(SAVE_SECONDS)  # Slurm told it: its next signal is ours, and puts the job back into the queue
        return code
    except BaseException:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SAVE_SECONDS)
        raise
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _ctrl_c_later() -> tuple[list[int], Callable[[], object]]:
    """Signals of Ctrl-C are kept in the list from now on, until the function is called."""
    pressed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        return pressed, lambda: None
    earlier = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    return pressed, lambda: signal.signal(signal.SIGINT, signal.SIG_DFL if earlier is None else earlier)


def _begin() -> None:
    """In the new process: it ends when its parent does, and leaves Slurm's warning, which goes to all, to that."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


def _since(log: Path, start: int) -> list[str]:
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - 65_536))
        return [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]


def _reason(code: int, said: list[str]) -> str:
    """Why a run did not end well, in one line: what it said last."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}" + ", too little memory maybe" * (code == -signal.SIGKILL)
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    last = errors[-1] if errors else said[-1] if len(said) > 1 else "it said nothing"
    return last[:500] if code else f"it ended without a result: {last[:500]}"


def _write(file: Path, data: Mapping[str, Any]) -> None:
    with atomic_path(file) as partial:
        partial.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
