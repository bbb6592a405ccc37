"""Hydra's multirun: its sweeper says which runs, its launchers where. What is not installed is named.

A grid is known before: Hydra sweeps over `run=NAME`, those that are not finished. Where a sweeper chooses the values,
as optuna does, it is given the options themselves.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hydra import initialize
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from action_diffusion.errors import InputError, unknown
from action_diffusion.options.configuration import quoted
from action_diffusion.parallel import cores
from action_diffusion.progress import progress
from action_diffusion.training.sweep.grid import Sweep, SweepRun
from action_diffusion.training.sweep.job import Job, finished, read_outcome, score


class Plugin(NamedTuple):
    """One of Hydra's: its name there, the module that is there when it is installed, the extra that brings it, and
    what it is told unless the user says otherwise."""

    name: str
    module: str = ""
    extra: str = ""
    defaults: Mapping[str, Any] = {}


LAUNCHERS = {
    "local": Plugin("basic"),
    "submitit": Plugin(
        "submitit_slurm", "hydra_plugins.hydra_submitit_launcher", "sweep-submitit", {"max_num_timeout": 20}
    ),
    "submitit_local": Plugin("submitit_local", "hydra_plugins.hydra_submitit_launcher", "sweep-submitit"),
    "ray": Plugin("ray", "hydra_plugins.hydra_ray_launcher", "sweep-ray"),
}
SWEEPERS = {
    "grid": Plugin("basic"),
    "optuna": Plugin(
        "optuna",
        "hydra_plugins.hydra_optuna_sweeper",
        "sweep-optuna",
        {"direction": "maximize", "study_name": "sweep", "n_jobs": 1, "max_failure_rate": 1.0},
    ),
}
_UNITS = 1000
"""Of progress, a run."""
_POLL_SECONDS = 1.0
_TAIL = 8192
"""Bytes of curves that are read to know where a run is."""


def plugin(option: str, name: str, known: Mapping[str, Plugin]) -> Plugin:
    """The one that `option=name` names. Raises `InputError` for one that is unknown, or not installed."""
    if name not in known:
        raise unknown(option, name, known)
    found = known[name]
    if found.module and not _installed(found.module):
        raise InputError(f"{option}={name} is not installed: pip install 'action-diffusion[{found.extra}]'")
    if found.name == "submitit_slurm":
        for program in ("sbatch", "srun"):
            if shutil.which(program) is None:
                raise InputError(
                    f"{option}={name} needs Slurm's {program}: start it where Slurm is; for processes of this machine, "
                    f"{option}=submitit_local"
                )
    return found


def multirun(
    job: Job,
    sweep: Sweep,
    *,
    runs: Sequence[SweepRun],
    launcher: str,
    sweeper: str,
    n_trials: int,
    options: Sequence[str],
) -> None:
    """Do `runs`, or so many trials that the sweeper chooses. options: of Hydra's (`hydra.launcher.…=`).

    Raises `InputError` for options that a plugin does not take, and where it cannot start runs; runs that fail raise
    nothing, nor do jobs that Slurm loses, which a line on stderr tells.
    """
    chosen = {"launcher": plugin("launcher", launcher, LAUNCHERS), "sweeper": plugin("sweeper", sweeper, SWEEPERS)}
    folder = job.root / "hydra"
    words = [*_asked(chosen, folder), *(f"++{option}" for option in options)]
    if sweeper == "grid":
        words.append(f"++run={','.join(quoted(run.name) for run in runs)}")
    else:
        os.environ.setdefault("SQLALCHEMY_SILENCE_UBER_WARNING", "1")  # that optuna 2 is not for SQLAlchemy 2
        words += [f"++hydra.sweeper.n_trials={n_trials}", *(f"++{axis.input_line}" for axis in sweep.axes)]
    folder.mkdir(parents=True, exist_ok=True)
    earlier, ended = _submitted(folder), _ended(job.root)
    GlobalHydra.instance().clear()
    try:
        with initialize(config_path=None, job_name="sweep", version_base="1.3"):
            hydra: Any = GlobalHydra.instance().hydra
            hydra.multirun(None, job, words, with_log_configuration=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(_one_line(error)) from error
    except Exception as error:  # of the launcher: no connection, a job that Slurm refuses or kills
        jobs = _submitted(folder) - earlier
        said = f"{f'launcher={launcher}' if sweeper == 'grid' else f'sweeper={sweeper}'}: {_one_line(error)}"
        if not jobs and _ended(job.root) == ended:
            raise InputError(said) from error
        print(said, file=sys.stderr)
        _settle(launcher, folder, jobs, cancel=False)
    except BaseException:
        _settle(launcher, folder, _submitted(folder) - earlier, cancel=True)
        raise
    finally:
        _end_ray()


def _asked(chosen: Mapping[str, Plugin], folder: Path) -> list[str]:
    """What Hydra is told of its plugins and of where they write, in words that the user's may replace."""
    words = ["hydra/hydra_logging=none", "hydra/job_logging=none", "hydra.output_subdir=null"]
    words += [f"hydra.sweep.dir={quoted(str(folder))}", "hydra.sweep.subdir=."]
    for part, one in chosen.items():
        words.append(f"hydra/{part}={one.name}")
        words += [f"++hydra.{part}.{key}={value}" for key, value in one.defaults.items()]
    if chosen["sweeper"].name == "optuna":
        words.append(f"++hydra.sweeper.storage={quoted(f'sqlite:///{folder}/study.db')}")
    elif chosen["launcher"].name == "submitit_local":  # it starts all of a batch at once
        words.append(f"++hydra.sweeper.max_batch_size={cores()}")
    return words


@contextmanager
def watching(root: Path, sweep: Sweep, runs: Sequence[SweepRun], n_trials: int) -> Iterator[None]:
    """Meanwhile, show on stderr how far all runs are, the time left, and each that ends. runs: of a grid, all of them;
    else n_trials are coming, whose names are found."""
    total = _UNITS * (len(runs) or n_trials)
    over = threading.Event()
    ended = {folder.name for folder in _folders(root, runs) if finished(folder)}
    first = _done(root, sweep, runs)
    before = {name: read_outcome(root / "runs" / name).get("seconds") for name in _names(root, runs)}

    def watch() -> None:
        done = first
        with progress(f"sweep {sweep.command}", total, done) as advance:
            while True:
                last = over.wait(_POLL_SECONDS)
                for folder in _folders(root, runs):
                    outcome = read_outcome(folder)
                    if folder.name not in ended and outcome and outcome.get("seconds") != before.get(folder.name):
                        ended.add(folder.name)
                        print(f"{folder.name}: {_said(outcome, folder, sweep)}", file=sys.stderr)
                now = _done(root, sweep, runs)
                if now > done or sys.stderr.isatty():  # before, nobody knows how much time is left
                    advance(max(0, now - done))
                done = max(done, now)
                if last:
                    return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _said(outcome: Mapping[str, Any], folder: Path, sweep: Sweep) -> str:
    if outcome.get("state") != "finished":
        return f"{outcome.get('state')}: {outcome.get('reason')}"
    found = score(folder / sweep.kind.results)
    minutes = f"finished in {outcome.get('seconds', 0) / 60:.1f} minutes"
    return minutes if found is None else f"{minutes}, {'score' if found >= 0 else 'error'} {abs(found):.3f}"


def _names(root: Path, runs: Iterable[SweepRun]) -> list[str]:
    return [folder.name for folder in _folders(root, runs)]


def _folders(root: Path, runs: Iterable[SweepRun]) -> list[Path]:
    """Of the runs of a grid, or those that are there."""
    names = [root / "runs" / run.name for run in runs]
    return names or sorted(path for path in (root / "runs").glob("*") if path.is_dir())


def _done(root: Path, sweep: Sweep, runs: Sequence[SweepRun]) -> int:
    """Of all runs, in _UNITS a run: those that ended wholly, the others by their clock."""
    lengths = {run.name: run.length for run in runs}
    done = 0.0
    for folder in _folders(root, runs):
        length = lengths.get(folder.name)
        if finished(folder):
            done += 1
        elif length and sweep.kind.curves and (folder / sweep.kind.curves).exists():
            done += min(0.99, _clock(folder / sweep.kind.curves, sweep.kind.clock) / length)
    return int(_UNITS * done)


def _clock(curves: Path, name: str) -> float:
    """Where a run is, by the last whole line that it wrote."""
    with curves.open("rb") as file:
        file.seek(max(0, curves.stat().st_size - _TAIL))
        found = re.findall(rb'"%s": ([0-9]+)' % name.encode(), file.read())
    return float(found[-1]) if found else 0.0


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _ended(root: Path) -> dict[str, int]:
    """When each run ended last."""
    return {file.parent.name: file.stat().st_mtime_ns for file in (root / "runs").glob("*/run.json")}


def _submitted(folder: Path) -> set[str]:
    """Jobs that submitit was given."""
    return {file.parent.name for file in (folder / ".submitit").glob("*/*_submitted.pkl")}


def _settle(launcher: str, folder: Path, jobs: set[str], *, cancel: bool) -> None:
    """Of submitit's jobs that Hydra does not wait for any more, since it was stopped or one of them was lost: cancel
    them, or wait for their end."""
    for job in sorted(jobs):
        if launcher == "submitit":
            import submitit

            followed: Any = submitit.SlurmJob(folder / ".submitit" / "%j", job)
            followed.cancel(check=False) if cancel else followed.wait()
        else:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                if cancel:
                    os.kill(int(job), signal.SIGINT)
                os.waitpid(int(job), 0)


def _end_ray() -> None:
    """Ray's processes of this sweep, where it started some."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]}…"
