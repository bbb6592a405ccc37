"""`action-diffusion sweep COMMAND [name=a,b,c …]`: many runs of a command, and one page that says which is best."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from action_diffusion.commands import preflight
from action_diffusion.errors import InputError, unknown
from action_diffusion.files import atomic_path, writer_lock
from action_diffusion.options import COMMANDS
from action_diffusion.progress import progress
from action_diffusion.schema import check
from action_diffusion.training.sweep import grid, launch, page, summary
from action_diffusion.training.sweep.job import Job, finished

HELP = """\
action-diffusion sweep COMMAND [name=a,b,c …]     many runs of train, finetune or evaluate, and one page about them

  action-diffusion sweep train seed=0,1,2 policy.objective.loss=l1,mse       six runs, one after the other
  action-diffusion sweep train seed=0,1,2 denoiser=unet_small,transformer launcher=submitit hydra.launcher.partition=gpu
  action-diffusion sweep evaluate bundle=A/bundle,B/bundle,C/bundle n_episodes=200
  action-diffusion sweep finetune bundle=A/bundle method=dppo,dsrl seed=0,1
  action-diffusion sweep train sweeper=optuna 'train.lr=tag(log,interval(1e-4,1e-2))' hydra.sweeper.n_trials=20

Commas part the values of an option: every combination is a run. A list stands in brackets, drop=[a,b],[a];
range(0,5) is 0,1,2,3,4. All other words are those of COMMAND, and shared by all runs. Every combination is checked
before any starts.

The same words again go on: finished runs are kept, stopped and failed ones go on from where they were, and the page is
written anew. More values of the same options are added to what is there. Ctrl-C saves the running ones and ends.

Options
  launcher=local                  local: one after the other, here; submitit: jobs of Slurm; submitit_local: several at
                                  once, here; ray: on Ray's machines, and all cores here
  sweeper=grid                    grid: every combination; optuna: values that promise most, by the runs before
  output_dir=DIR                  the sweep's folder; the same words have the same one: outputs/sweep-COMMAND-HASH
  hydra.launcher.NAME=…           options of Hydra's launcher: timeout_min, partition, gpus_per_node, array_parallelism
  hydra.sweeper.NAME=…            options of Hydra's sweeper: max_batch_size; of optuna's n_trials, n_jobs, sampler
  --config-dir DIR                a folder with your own task/*.yaml, used as task=NAME

It writes DIR/report.html (every run, intervals over starts and over seeds, curves, paired differences, best first),
DIR/summary.json, and DIR/runs/NAME as COMMAND leaves it, with log.txt. Exit code 1: a run failed. docs/sweeps.md.
"""
TRIALS = 20
"""Of a sweeper that chooses, where nothing else is said."""
_HYDRA = ("hydra.launcher.", "hydra.sweeper.")


def run(words: Sequence[str] | None, config_dir: str | None) -> int:
    """`action-diffusion sweep` with the words after it (None: asked for help); returns the exit code.

    Raises `InputError` for bad words, and for a launcher that cannot start runs or follow them.
    """
    if not words or words[0] == "help":
        from action_diffusion.commands.help import fitted

        print(fitted(HELP))
        return 0
    if words[0] not in grid.KINDS:
        raise unknown("command to sweep", words[0], grid.KINDS)
    own = {"launcher": "local", "sweeper": "grid", "output_dir": ""}
    rest, options = _taken(words[1:], own)
    launch.plugin("launcher", own["launcher"], launch.LAUNCHERS)
    launch.plugin("sweeper", own["sweeper"], launch.SWEEPERS)
    sweep = grid.read(words[0], rest, None if config_dir is None else str(Path(config_dir).resolve()))
    chooses = own["sweeper"] != "grid"
    if chooses and not sweep.axes:
        raise InputError(f"sweeper={own['sweeper']} has nothing to choose: give values, or NAME=interval(low,high)")
    runs = _checked(sweep, chooses)
    root = Path(own["output_dir"].strip("'\"") or grid.default_folder(sweep)).expanduser().resolve()
    if "$" in str(root):
        raise InputError(f"output_dir={root}: give a path without $")
    grid.claim(root, sweep)
    with writer_lock(root):
        return _sweep(sweep, [] if chooses else runs, root, own["launcher"], own["sweeper"], options)


def _sweep(
    sweep: grid.Sweep, runs: Sequence[grid.SweepRun], root: Path, launcher: str, sweeper: str, options: Sequence[str]
) -> int:
    done = [path.name for path in sorted((root / "runs").glob("*")) if finished(path)]
    waiting = [one for one in runs if one.name not in done]
    trials = 0 if runs else max(0, _trials(options) - len(done))
    count = len(waiting) or trials
    kept = len(runs) - len(waiting) if runs else len(done)
    print(f"{root}: {count} runs to do, {kept} finished already", file=sys.stderr)
    job = Job(sweep.command, sweep.fixed, sweep.config_dir, root, {one.name: one for one in waiting})
    try:
        if count:
            with launch.watching(root, sweep, runs, _trials(options)):
                launch.multirun(
                    job, sweep, runs=waiting, launcher=launcher, sweeper=sweeper, n_trials=trials, options=options
                )
    finally:
        found = _write(sweep, runs, root)
    asked = {one.name for one in runs or found}
    return 0 if all(one.state == "finished" for one in found if one.name in asked) else 1


def _taken(words: Iterable[str], own: dict[str, str]) -> tuple[list[str], list[str]]:
    """(words of the command, options of Hydra's plugins); `own` takes what is the sweep's."""
    rest, options, seen = list[str](), list[str](), set[str]()
    for word in words:
        key, equals, value = word.partition("=")
        if key in own:
            if key in seen:
                raise InputError(f"{key}= is given twice")
            if not value:
                raise InputError(f"{key}= is empty")
            seen.add(key)
            own[key] = value
        elif key.startswith("hydra.") or key == "hydra":
            if not (equals and key.startswith(_HYDRA)):
                raise unknown("option of Hydra", key, (f"{section}…=…" for section in _HYDRA))
            options.append(word)
        else:
            rest.append(word)
    return rest, options


def _checked(sweep: grid.Sweep, chooses: bool) -> list[grid.SweepRun]:
    """Every run, its configuration checked. Raises `InputError` that names the combination which cannot be."""
    wanted = list(sweep.extremes() if chooses else sweep.combinations())
    runs: dict[str, grid.SweepRun] = {}
    with progress("checking configurations", len(wanted)) as advance:
        for settings in wanted:
            try:
                run, config = sweep.run(settings)
                _check(sweep.command, config)
            except InputError as error:
                where = f" (of {summary.label(settings)})" if len(wanted) > 1 else ""
                raise InputError(f"{error}{where}; no run was started") from None
            if run.name in runs:
                both = f"{summary.label(runs[run.name].settings)} and {summary.label(settings)}"
                raise InputError(f"{both} are the same: give each once")
            runs[run.name] = run
            advance(1)
    return list(runs.values())


def _check(command: str, config: dict[str, Any]) -> None:
    if command == "train":
        return preflight.train(config)
    typed: Any = check(config, COMMANDS[command])
    if command == "finetune":
        return preflight.finetune(typed)
    if typed.robot is not None:
        raise InputError("trials on a robot are no sweep: evaluate robot=… bundles=[A,B] compares policies, blinded")
    return preflight.evaluate(typed)


def _trials(options: Sequence[str]) -> int:
    given = dict(option.partition("=")[::2] for option in options)
    value = given.get("hydra.sweeper.n_trials", str(TRIALS))
    if not (value.isdecimal() and 1 <= int(value) <= grid.MOST_RUNS):
        raise InputError(f"hydra.sweeper.n_trials={value}: expected a whole number from 1 to {grid.MOST_RUNS:,}")
    return int(value)


def _write(sweep: grid.Sweep, runs: Sequence[grid.SweepRun], root: Path) -> list[summary.Done]:
    """The summary, the page, and a table of both on the terminal."""
    found = summary.look(root, sweep, runs)
    groups = summary.grouped(found, seeded=sweep.kind.seeded)
    with atomic_path(root / "summary.json") as partial:
        data = summary.summarise(sweep, found, groups)
        partial.write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    page.write(root / "report.html", sweep, found, groups)
    _print(found)
    print(f"report: {root / 'report.html'}")
    return found


def _print(found: Sequence[summary.Done]) -> None:
    table = Table(box=None, pad_edge=False)
    for head in ("run", "result", "95 % over starts", "state"):
        table.add_column(head, overflow="fold")
    for one in found:
        result, interval = ("", None) if one.measured is None else (f"{one.measured.mean:.3f}", one.measured.interval)
        sure = "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
        state = one.state + (f": {one.reason}" if one.reason else "")
        table.add_row(*map(escape, (summary.label(one.settings), result, sure, state)))
    Console(highlight=False).print(table)
