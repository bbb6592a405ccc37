"""What both kinds of evaluation share, and what is done with several results: comparing and summarising them.

Differences are taken start by start: how hard a start is then cancels, and a small one can be told from
chance.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path
from action_diffusion.training.evaluation.statistics import paired_interval, spread

_NAMES = ("task", "n_episodes", "mean_score", "success_rate", "scores", "seeds")


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Results `a` minus results `b`, start by start, with paired bootstrap 95 % intervals over starts.

    Returns `task`, `n_episodes`, `mean_difference`, `mean_interval`, `success_difference`, `success_interval`
    and the number of starts on which a's score is `higher`, `equal` and `lower`.

    Raises:
        InputError: where tasks or starts differ: then the difference would measure the starts too.
    """
    _require_same_starts([a, b])
    first, second = np.array(a["scores"]), np.array(b["scores"])
    won, other = (first >= 1).astype(float), (second >= 1).astype(float)
    return {
        "task": a["task"],
        "n_episodes": len(first),
        "mean_difference": float((first - second).mean()),
        "mean_interval": paired_interval(first, second),
        "success_difference": float((won - other).mean()),
        "success_interval": paired_interval(won, other),
        "higher": int((first > second).sum()),
        "equal": int((first == second).sum()),
        "lower": int((first < second).sum()),
    }


def summarise_seeds(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several trainings of one task, evaluated on the same starts: how much the training seed matters.

    Returns `task`, `n_seeds`, `n_episodes` and, for `mean_score` and `success_rate`, a dictionary of `mean`,
    `sd` (n - 1; None for one training), `min` and `max` over the trainings.

    Raises:
        InputError: for no results, or where tasks or starts differ.
    """
    if not results:
        raise InputError("no results to summarise: give one for each training seed")
    _require_same_starts(results)
    return {
        "task": results[0]["task"],
        "n_seeds": len(results),
        "n_episodes": results[0]["n_episodes"],
        **{name: spread([result[name] for result in results]) for name in ("mean_score", "success_rate")},
    }


def read_results(path: str | Path) -> dict[str, Any]:
    """The results.json of an earlier evaluation in simulation. Raises `InputError` where it is not one."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        missing = [name for name in _NAMES if name not in results]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"cannot read results from {path}: {error}") from None
    if missing:
        raise InputError(f"{path} is not the result of an evaluation in simulation: it has no {', '.join(missing)}")
    return results


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write a results.json; it appears only when it is complete."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` as JSON keeps them. Raises `InputError` for what is not plain data."""
    try:
        return json.loads(json.dumps(settings, allow_nan=False))
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
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield bars


def _require_same_starts(results: Sequence[Mapping[str, Any]]) -> None:
    first = results[0]
    if any("seeds" not in result for result in results):
        raise InputError(f"{first['task']} has no simulator: there are no scores on the same starts to compare")
    for other in results[1:]:
        if other["task"] != first["task"]:
            raise InputError(f"results of different tasks do not compare: {first['task']} and {other['task']}")
        if other["seeds"] != first["seeds"]:
            raise InputError(
                f"results on different starts do not compare: {_range(first['seeds'])} and "
                f"{_range(other['seeds'])}; evaluate both with the same seed and n_episodes"
            )


def _range(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} from seed {min(seeds)}"
