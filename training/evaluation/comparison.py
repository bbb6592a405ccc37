"""Pages for several evaluations of one task: two policies on the same starts, or several training seeds of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from action_diffusion import report_page as page
from action_diffusion.training.evaluation import plots

_PAIRED = (
    "Both policies began from the same starts, so how hard a start is cancels in the difference. The intervals "
    "(bootstrap, paired, 95 %) cover the choice of starts, not training: other training seeds would give other "
    "policies."
)
_PAIRED_ERRORS = (
    "Both policies were asked about the same windows, so how hard an episode is cancels in the difference. A smaller "
    "error is better, and is no success rate. The intervals (bootstrap, paired, 95 %) cover the choice of episodes, "
    "not training: other training seeds would give other policies."
)
_SUMMARISED = {
    "mean_score": "Mean score",
    "success_rate": "Success rate",
    "action_error_relative": "Mean action error / range",
}
_SEEDS = (
    "One training gives one policy; the spread over training seeds is what the intervals of a single evaluation "
    "leave out. Standard deviations are those of a sample (n - 1)."
)


def write_comparison(
    path: Path,
    *,
    names: Sequence[str],
    results: Sequence[Mapping[str, Any]],
    found: Mapping[str, Any],
) -> None:
    """Write the page for `results.compare` (`found`) of two `results`, called `names`."""
    draw = _compared_errors if "error_difference" in found else _compared_scores
    headline, cards, said, heading, pairs = draw(names, results, found)
    page.write_page(
        path,
        title=f"{found['task']}: {names[0]} minus {names[1]}, {headline}",
        subtitle=f"{found['n_episodes']} {heading}, the same for both",
        body=[
            page.grid(cards),
            page.verdict(found["verdict"]),
            page.note(said),
            page.section(f"{heading.capitalize()} one by one", pairs),
        ],
    )


def _compared_scores(
    names: Sequence[str], results: Sequence[Mapping[str, Any]], found: Mapping[str, Any]
) -> tuple[str, list[str], str, str, str]:
    first, second = results
    cards = [
        page.card("Difference of mean scores", f"{found['mean_difference']:+.3f}", _between(found["mean_interval"])),
        page.card(
            "Difference of success rates", f"{found['success_difference']:+.2f}", _between(found["success_interval"])
        ),
        page.card("Higher, equal, lower", f"{found['higher']} · {found['equal']} · {found['lower']}", "starts"),
    ]
    scores = zip(first["seeds"], first["scores"], second["scores"], strict=True)
    rows = [(str(seed), f"{a:.4f}", f"{b:.4f}", f"{a - b:+.4f}") for seed, a, b in sorted(scores, key=_difference)]
    table = page.number_table(("seed", *names, f"{names[0]} minus {names[1]}"), rows)
    scatter = page.figure(
        plots.plot_pairs(second["scores"], first["scores"], labels=names[::-1]).decode(), shape="broad"
    )
    return (
        f"{found['mean_difference']:+.3f}",
        cards,
        _PAIRED,
        "starts",
        scatter + page.folded("Every start, the largest loss first", table),
    )


def _compared_errors(
    names: Sequence[str], results: Sequence[Mapping[str, Any]], found: Mapping[str, Any]
) -> tuple[str, list[str], str, str, str]:
    first, second = results
    difference, interval = f"{100 * found['error_difference']:+.1f} %", found["error_interval"]
    sure = (
        "a single episode, no interval" if interval is None else " to ".join(f"{100 * end:+.1f} %" for end in interval)
    )
    cards = [
        page.card("Difference of mean errors, of range", difference, sure),
        page.card("Larger, equal, smaller", f"{found['higher']} · {found['equal']} · {found['lower']}", "episodes"),
        page.card("Windows", str(found["n_windows"]), f"the same for both: {found['origin']}"),
    ]
    errors = zip(first["episode_ids"], first["episode_errors"], second["episode_errors"], strict=True)
    ordered = sorted(errors, key=_difference, reverse=True)
    rows = [(name, *(f"{100 * value:.2f} %" for value in (a, b)), f"{100 * (a - b):+.2f} %") for name, a, b in ordered]
    table = page.number_table(("episode (hash)", *names, f"{names[0]} minus {names[1]}"), rows)
    scatter = plots.plot_error_pairs(second["episode_errors"], first["episode_errors"], labels=names[::-1])
    pairs = page.figure(scatter.decode(), shape="broad") + page.folded("Every episode, the largest loss first", table)
    return difference, cards, _PAIRED_ERRORS, "episodes", pairs


def write_seed_summary(
    path: Path, *, names: Sequence[str], results: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> None:
    """Write the page for `results.summarise_seeds` (`summary`) of `results`, called `names`."""
    cards = []
    for key, label in _SUMMARISED.items():
        if (one := summary.get(key)) is not None:
            sd = "one training only" if one["sd"] is None else f"± {one['sd']:.3f} over trainings"
            cards.append(page.card(label, f"{one['mean']:.3f}", f"{sd}, {one['min']:.3f} to {one['max']:.3f}"))
    simulated = "mean_score" in summary
    measure = "mean_score" if simulated else "action_error_relative"
    heads = ("bundle", _SUMMARISED[measure].lower(), "95 % interval", *(["success"] if simulated else []))
    rows = []
    for name, one in zip(names, results, strict=True):
        interval = one["mean_interval" if simulated else "action_error_relative_interval"]
        success = [f"{one['success_rate']:.2f}"] if simulated else []
        rows.append((name, f"{one[measure]:.4f}", _between(interval), *success))
    table = page.number_table(heads, rows)
    headline = f"{_SUMMARISED[measure].lower()} {summary[measure]['mean']:.3f}"
    what = "starts" if simulated else "episodes"
    page.write_page(
        path,
        title=f"{summary['task']}: {headline} over {summary['n_seeds']} trainings",
        subtitle=f"{summary['n_episodes']} {what} each, the same for all",
        body=[
            page.grid(cards),
            *(page.verdict(one["verdict"]) for one in summary.get("differences", ())),
            page.note(_SEEDS),
            page.section("Trainings", f'<div class="card scroll">{table}</div>'),
        ],
    )


def _between(interval: Sequence[float] | None) -> str:
    return "no interval" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _difference(row: tuple[int, float, float]) -> float:
    return row[1] - row[2]
