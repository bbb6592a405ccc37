"""What both kinds of evaluation share, and what is done with several results: comparing and summarising them.

Differences are taken start by start, or episode by episode where there is no simulator: how hard one is then cancels,
and a small difference can be told from chance.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path
from action_diffusion.policy.spec import env_words
from action_diffusion.statistics import (
    counts,
    interval_words,
    paired_interval,
    paired_scores,
    sign_of,
    signed,
    spread,
    verdict,
)

LINE_SECONDS = 10.0
"""Between two lines of progress where there is no terminal."""
_NAMES = ("task", "n_episodes", "mean_score", "success_rate", "scores", "seeds")


def compare(a: Mapping[str, Any], b: Mapping[str, Any], names: Sequence[str] = ("A", "B")) -> dict[str, Any]:
    """Results `a` minus results `b`, called `names`, pair by pair, with paired bootstrap 95 % intervals.

    Of rollouts, over starts: `task`, `n_episodes`, `mean_difference`, `mean_interval`, `success_difference`,
    `success_interval` and the number of starts on which a's score is `higher`, `equal` and `lower`. Without a
    simulator, over episodes: `task`, `n_episodes`, `n_windows`, `error_difference` and `error_interval` (relative
    errors; None for a single episode), `higher`, `equal`, `lower`, `origin`. Of both, `verdict`: which minus which,
    in a sentence.

    Raises:
        InputError: where tasks or starts differ: then the difference would measure the starts too.
    """
    if all("episode_ids" in result for result in (a, b)):
        return _compare_errors(a, b, names)
    _require_same_starts([a, b])
    found = paired_scores(a["scores"], b["scores"])
    interval = found["mean_interval"]
    return {
        "task": a["task"],
        "n_episodes": len(a["scores"]),
        **found,
        "verdict": verdict(
            names,
            f"{signed(found['mean_difference'], 3)} in mean score",
            None if len(a["scores"]) == 1 else interval_words(interval, 3),
            sign_of(interval),
            words=("scores higher", "scores lower"),
            pairs="starts",
        ),
    }


def against_baseline(results: Mapping[str, Any], baseline: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The errors of a `baseline` on the windows of `results`, and the policy's minus those, if any dimension varies."""
    kept = {key: baseline[key] for key in ("action_error", "action_error_relative", "errors")}
    if results["episode_errors"] is None:  # every dimension is constant
        return kept
    found = _compare_errors(results, baseline, ("the policy", name.replace("_", " ")))
    return kept | {key: found[key] for key in ("error_difference", "error_interval", "verdict")}


def summarise_seeds(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several trainings of one task, evaluated on the same starts: how much the training seed matters.

    Returns `task`, `n_seeds`, `n_episodes` and, for `mean_score` and `success_rate`, or else for
    `action_error_relative`, a dictionary of `mean`, `sd` (n - 1; None for one training), `min` and `max` over the
    trainings.

    Raises:
        InputError: for no results, or where tasks or starts differ.
    """
    if not results:
        raise InputError("no results to summarise: give one for each training seed")
    if all("episode_ids" in result for result in results):
        _require_same_windows(results)
        measured = ["action_error_relative"]
    else:
        _require_same_starts(results)
        measured = ["mean_score", "success_rate"]
    return {
        "task": results[0]["task"],
        "n_seeds": len(results),
        "n_episodes": results[0]["n_episodes"],
        **{name: spread([result[name] for result in results]) for name in measured},
    }


def read_results(path: str | Path) -> dict[str, Any]:
    """The results.json of an earlier evaluation in simulation. Raises `InputError` where it is not one."""
    try:
        results: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        missing = [name for name in _NAMES if name not in results]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"cannot read results from {path}: {error}") from None
    if missing:
        raise InputError(f"{path} is not the result of an evaluation in simulation: it has no {', '.join(missing)}")
    return results


def check_new(folder: Path) -> None:
    """Raises `InputError` for a folder that holds an evaluation already, of one bundle or of several."""
    places = (
        "results.json",
        "summary.json",
        "bundle_0/results.json",
        "compare/results.json",
        "comparison/results.json",
    )
    if any((folder / place).exists() for place in places):
        raise InputError(f"{folder} already holds an evaluation: give another output_dir")


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write a results.json; it appears only when it is complete."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` as JSON keeps them. Raises `InputError` for what is not plain data."""
    try:
        copied: dict[str, Any] = json.loads(json.dumps(settings, allow_nan=False))
        return copied
    except (TypeError, ValueError) as error:
        raise InputError(f"the settings must be plain data (numbers, strings, lists, dictionaries): {error}") from None


def ranks(n: int, count: int, *, first: str, last: str) -> list[tuple[str, int]]:
    """At most `count` of the ranks 0 .. n-1, evenly, both ends among them, with a word for each."""
    places = np.unique(np.linspace(0, n - 1, min(count, n)).round().astype(int)).tolist()
    words = {0: first, n - 1: last} if n > 1 else {}
    return [(words.get(place, f"Rank {place + 1} of {n}"), place) for place in places]


@contextmanager
def showing(progress: Progress | None) -> Iterator[Progress]:
    """The caller's progress bars, or new ones on stderr."""
    if progress is not None:
        yield progress
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with Progress(*columns, console=console) if console.is_terminal else _Lines(console) as bars:
        yield bars


class _Lines(Progress):
    """For what is no terminal: no bars, a line now and then."""

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, disable=True)
        self._line = time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._tell(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._tell(task_id)

    def _tell(self, task_id: TaskID) -> None:
        if time.monotonic() - self._line > LINE_SECONDS:
            self._line, task = time.monotonic(), self._tasks[task_id]
            self.console.print(f"{task.description}: {task.percentage:.0f} %")


def _compare_errors(a: Mapping[str, Any], b: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    _require_same_windows([a, b])
    first, second, steps = (
        np.array(values) for values in (a["episode_errors"], b["episode_errors"], a["episode_steps"])
    )
    difference = float(((first - second) * steps).sum() / steps.sum())
    interval = paired_interval(first, second, weights=steps) if len(first) > 1 else None
    said = verdict(
        names,
        f"{signed(100 * difference, 1)} % of range in mean action error",
        interval and interval_words([100 * end for end in interval], 1),
        0 if interval is None else sign_of(interval),
        words=("errs more", "errs less"),
        pairs="episodes",
    )
    if a["origin_kind"] != "held_out":
        said += f" They are {a['origin']}."
    return {
        "task": a["task"],
        "n_episodes": len(first),
        "n_windows": a["n_windows"],
        "error_difference": difference,
        "error_interval": interval,
        **counts(first, second),
        "origin": a["origin"],
        "verdict": said,
    }


def _require_same_windows(results: Sequence[Mapping[str, Any]]) -> None:
    names = ("episode_ids", "episode_steps", "n_windows", "n_action_steps")
    if any(other[name] != results[0][name] for other in results for name in names if name in other):
        raise InputError(f"results on other episodes than those of {results[0]['task']} do not compare")
    if any(result["episode_errors"] is None for result in results):
        raise InputError(
            f"{results[0]['task']}: every dimension of the action is constant: there is nothing to compare"
        )


def _require_same_starts(results: Sequence[Mapping[str, Any]]) -> None:
    first = results[0]
    if any("seeds" not in result for result in results):
        raise InputError(f"{first['task']} has no simulator: there are no scores on the same starts to compare")
    for other in results[1:]:
        if (one := _simulator(first)) != (two := _simulator(other)):
            raise InputError(f"results of different tasks do not compare: {one} and {two}")
        if other["seeds"] != first["seeds"]:
            raise InputError(
                f"results on different starts do not compare: {_range(first['seeds'])} and "
                f"{_range(other['seeds'])}; evaluate both with the same seed and n_episodes"
            )


def _simulator(result: Mapping[str, Any]) -> str:
    """What must be the same, so that starts are: the simulator and its length; of older results the task's name."""
    env = result.get("env")
    return env_words(env) if env else str(result["task"])


def _range(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} from seed {min(seeds)}"
