"""What came of a sweep: every run, the groups of runs that differ in the seed only, and how groups differ; best first.

Two kinds of chance are kept apart. Over starts: other starts for these very policies (bootstrap, Wilson). Over seeds:
other trainings with the same settings (Student's t over the means of the runs).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.statistics import paired_interval, t_interval
from action_diffusion.training.sweep.grid import Sweep, SweepRun, shortened
from action_diffusion.training.sweep.job import finished, read_outcome

SCORE, ERROR = "mean_score", "action_error_relative"
_UNITS = {SCORE: ("scores", "seeds"), ERROR: ("episode_errors", "episode_ids")}


@dataclass(frozen=True)
class UnitScores:
    """An evaluation, unit by unit: starts of a simulator, or held-out episodes.

    measure: SCORE or ERROR. values: [N], of the units `ids`; weights: [N], of their mean. Intervals: as the evaluation
    found them, over its units.
    """

    measure: str
    mean: float
    values: np.ndarray
    weights: np.ndarray
    ids: tuple[str, ...]
    interval: tuple[float, float] | None = None
    success_rate: float | None = None
    success_interval: tuple[float, float] | None = None

    @property
    def goodness(self) -> float:
        return self.mean if self.measure == SCORE else -self.mean


@dataclass(frozen=True)
class Done:
    """A run and how far it came; measured: None without an evaluation. seconds: of all its attempts."""

    name: str
    settings: Mapping[str, str]
    folder: Path
    state: str
    reason: str | None
    seconds: float
    measured: UnitScores | None


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ in the seed only, by seed; together they are measured on the mean over them."""

    settings: Mapping[str, str]
    runs: Mapping[str, Done]
    measured: UnitScores

    @property
    def over_starts(self) -> tuple[float, float] | None:
        return _over_units(self.measured, None)

    @property
    def over_seeds(self) -> tuple[float, float] | None:
        found = t_interval([run.measured.mean for run in self.runs.values() if run.measured is not None])
        most = 1.0 if self.measured.measure == SCORE else np.inf  # what the mean can be
        return None if found is None else (max(found[0], 0.0), min(found[1], most))


def look(root: Path, sweep: Sweep, runs: Iterable[SweepRun]) -> list[Done]:
    """Every run that is there or is to come, best first, those without a result last."""
    coming = {run.name: run for run in runs}
    there = {path.name for path in (root / "runs").glob("*") if (path / "run.json").is_file()}
    found = []
    for name in {**coming, **dict.fromkeys(sorted(there))}:
        folder = root / "runs" / name
        outcome = read_outcome(folder)
        state = str(outcome.get("state", "stopped" if folder.exists() else "not started"))
        if state == "finished" and not finished(folder):
            state = "not started"  # somebody removed what it made
        done = state == "finished"
        settings = coming[name].settings if name in coming else outcome.get("settings", {})
        found.append(
            Done(
                name=name,
                settings={str(key): str(value) for key, value in settings.items()},
                folder=folder,
                state=state,
                reason=None if done else outcome.get("reason"),
                seconds=float(outcome.get("seconds") or 0.0),
                measured=read(folder / sweep.kind.results) if done else None,
            )
        )
    return sorted(found, key=lambda run: -np.inf if run.measured is None else run.measured.goodness, reverse=True)


def read(results: Path) -> UnitScores | None:
    """The evaluation in a `results.json`; None where there is none that says what it measured."""
    with contextlib.suppress(OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        found = json.loads(results.read_text(encoding="utf-8"))
        measure = SCORE if SCORE in found else ERROR
        units, ids = _UNITS[measure]
        values = np.asarray(found[units], dtype=np.float64)
        weights = np.asarray(found.get("episode_steps") or np.ones_like(values), dtype=np.float64)
        if not (values.ndim == 1 and len(values) == len(weights) == len(found[ids]) > 0 and np.isfinite(values).all()):
            return None
        where = json.dumps(found.get("env") or found["task"], sort_keys=True)
        rate = found.get("success_rate")
        return UnitScores(
            measure=measure,
            mean=float(np.average(values, weights=weights)),
            values=values,
            weights=weights,
            ids=(where, *map(str, found[ids])),
            interval=_pair(found.get("mean_interval" if measure == SCORE else f"{ERROR}_interval")),
            success_rate=None if rate is None else float(rate),
            success_interval=_pair(found.get("success_interval")),
        )
    return None


def _pair(interval: Any) -> tuple[float, float] | None:
    if interval is None:
        return None
    low, high = map(float, interval)
    return (low, high) if np.isfinite([low, high]).all() else None


def grouped(runs: Sequence[Done], *, seeded: bool) -> list[SeedGroup]:
    """Runs with a result, by all settings but the seed (by all, unless it draws another policy), best first.

    Where starts differ within a group, those of its best run count.
    """
    members: dict[tuple[tuple[str, str], ...], list[Done]] = {}
    for run in runs:
        if run.measured is not None:
            key = tuple((name, value) for name, value in run.settings.items() if not (seeded and name == "seed"))
            members.setdefault(key, []).append(run)
    groups = [_group(dict(key), found) for key, found in members.items()]
    return sorted(groups, key=lambda group: group.measured.goodness, reverse=True)


def _group(settings: Mapping[str, str], found: Sequence[Done]) -> SeedGroup:
    measured = [run.measured for run in found if run.measured is not None]
    first = measured[0]
    same = [one for one in measured if one.ids == first.ids]
    values = np.mean([one.values for one in same], axis=0)
    mean = float(np.mean([one.mean for one in measured]))
    runs = dict[str, Done]()
    for run in found:
        seed = run.settings.get("seed", run.name)
        runs[run.name if seed in runs else seed] = run  # the same settings may have meant another configuration once
    return SeedGroup(settings, runs, UnitScores(first.measure, mean, values, first.weights, first.ids))


def differences(groups: Sequence[SeedGroup]) -> list[dict[str, Any]]:
    """Each group minus the best one, on the same starts: `difference`, `over_starts` (paired bootstrap), `over_seeds`
    (Student's t, paired by seed) and `apart`: "yes", "no", or "on these starts" where other seeds may say otherwise."""
    found = []
    for group in groups[1:]:
        best = groups[0]
        if group.measured.ids != best.measured.ids:
            continue
        pairs = [
            (run.measured.mean, best.runs[seed].measured.mean)  # type: ignore[union-attr]
            for seed, run in group.runs.items()
            if seed in best.runs and run.measured is not None
        ]
        over_starts = _over_units(group.measured, best.measured)
        over_seeds = t_interval([one - other for one, other in pairs]) if pairs else None
        starts_say, seeds_say = (said is not None and not said[0] <= 0 <= said[1] for said in (over_starts, over_seeds))
        found.append(
            {
                "settings": dict(group.settings),
                "minus": dict(best.settings),
                "difference": group.measured.mean - best.measured.mean,
                "over_starts": over_starts,
                "over_seeds": over_seeds,
                "apart": ("yes" if seeds_say else "on these starts") if starts_say else "no",
            }
        )
    return found


def summarise(sweep: Sweep, runs: Sequence[Done], groups: Sequence[SeedGroup]) -> dict[str, Any]:
    """All of it as plain data, for `summary.json`."""
    return {
        "command": sweep.command,
        "shared": list(sweep.fixed),
        "runs": [_of_run(run) for run in runs],
        "groups": [
            {
                "settings": dict(group.settings),
                "runs": [run.name for run in group.runs.values()],
                group.measured.measure: group.measured.mean,
                "over_starts": group.over_starts,
                "over_seeds": group.over_seeds,
            }
            for group in groups
        ],
        "differences": differences(groups),
    }


def label(settings: Mapping[str, str]) -> str:
    """Settings in a few words."""
    short = shortened(list(settings))
    return " ".join(f"{short[name]}={unquoted(value)}" for name, value in settings.items()) or "all runs"


def unquoted(value: str) -> str:
    """A value as people read it."""
    return value[1:-1] if value[:1] == value[-1:] == "'" and len(value) > 1 else value


def _of_run(run: Done) -> dict[str, Any]:
    said: dict[str, Any] = {"name": run.name, "settings": dict(run.settings), "state": run.state}
    said |= {"reason": run.reason, "seconds": round(run.seconds, 1)}
    if (one := run.measured) is not None:
        said |= {one.measure: one.mean, "interval": one.interval, "n": len(one.values)}
        said |= {"success_rate": one.success_rate, "success_interval": one.success_interval}
    return said


def _over_units(one: UnitScores, other: UnitScores | None) -> tuple[float, float] | None:
    if len(one.values) == 1:
        return None
    against = np.zeros_like(one.values) if other is None else other.values
    return paired_interval(one.values, against, weights=one.weights)
