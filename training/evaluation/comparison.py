"""Pages for several evaluations of one task: two policies on the same starts, or several training seeds of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from action_diffusion.training.evaluation import page, plots

_PAIRED = (
    "Both policies began from the same starts, so how hard a start is cancels in the difference. The intervals "
    "(bootstrap, paired, 95 %) cover the choice of starts, not training: other training seeds would give other "
    "policies."
)
_SEEDS = (
    "One training gives one policy; the spread over training seeds is what the intervals of a single evaluation "
    "leave out. Standard deviations are those of a sample (n - 1)."
)


def write_comparison(
    path: Path,
    *,
    names: tuple[str, str],
    results: tuple[Mapping[str, Any], Mapping[str, Any]],
    found: Mapping[str, Any],
) -> None:
    """Write the page for `results.compare` (`found`) of two `results`, called `names`."""
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
    table = page.number_table(("seed", names[0], names[1], "difference"), rows)
    scatter = page.figure(plots.plot_pairs(second["scores"], first["scores"], labels=names[::-1]).decode())
    page.write_page(
        path,
        title=f"{found['task']}: {names[0]} against {names[1]}, {found['mean_difference']:+.3f}",
        subtitle=f"{found['n_episodes']} starts, the same for both",
        body=[
            page.grid(cards),
            page.note(_PAIRED),
            page.section("Start by start", scatter + page.folded("Every start, the largest loss first", table)),
        ],
    )


def write_seed_summary(
    path: Path, *, names: Sequence[str], results: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> None:
    """Write the page for `results.summarise_seeds` (`summary`) of `results`, called `names`."""
    cards = []
    for key, label in (("mean_score", "Mean score"), ("success_rate", "Success rate")):
        one = summary[key]
        sd = "one training only" if one["sd"] is None else f"± {one['sd']:.3f} over trainings"
        cards.append(page.card(label, f"{one['mean']:.3f}", f"{sd}, {one['min']:.3f} to {one['max']:.3f}"))
    rows = [
        (name, f"{one['mean_score']:.4f}", _between(one["mean_interval"]), f"{one['success_rate']:.2f}")
        for name, one in zip(names, results, strict=True)
    ]
    table = page.number_table(("bundle", "mean score", "over starts", "success"), rows)
    page.write_page(
        path,
        title=f"{summary['task']}: mean score {summary['mean_score']['mean']:.3f} over {summary['n_seeds']} trainings",
        subtitle=f"{summary['n_episodes']} starts each, the same for all",
        body=[
            page.grid(cards),
            page.note(_SEEDS),
            page.section("Trainings", f'<div class="card scroll">{table}</div>'),
        ],
    )


def _between(interval: Sequence[float]) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def _difference(row: tuple[int, float, float]) -> float:
    return row[1] - row[2]
