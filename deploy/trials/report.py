"""What trials say: of each bundle how often it succeeds, which one is better, and how many trials would tell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from action_diffusion import __version__, report_page
from action_diffusion.deploy.trials.ledger import Ledger
from action_diffusion.deploy.trials.plan import Plan
from action_diffusion.files import atomic_path
from action_diffusion.statistics import (
    bootstrap_interval,
    interval_words,
    needed_pairs,
    paired_scores,
    sign_flip_test,
    sign_of,
    signed,
    verdict,
    wilson_interval,
)

SURE = 0.05
"""p from which on a difference may be chance."""
MOST = 1_000_000
"""Trials that anybody counts."""
_SAID = (
    "Every bundle ran once from each start, in an order that nobody at the robot knew. Success rates have Wilson's "
    "95 % intervals, mean scores and differences bootstrap ones, over starts; p is of the sign-flip test. They say "
    "nothing of another training seed, and nothing of starts unlike these."
)


def finish(plan: Plan, ledger: Ledger, folder: Path) -> None:
    """Write results.json and report.html, and print what they say: from now on everybody may know which was which."""
    results = results_of(plan, ledger)
    with atomic_path(folder / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    write_report(folder / "report.html", results)
    _print(results, folder)


def results_of(plan: Plan, ledger: Ledger) -> dict[str, Any]:
    """The numbers of trials that are all made.

    `bundles`: of each its path, `scores` by trial, `successes`, `success_rate` with Wilson's interval, `mean_score`
    with the bootstrap's (None where all scores are equal), and how many runs were `repeated`. `differences`: of each
    further bundle minus the first, see `difference`.
    """
    scores, names = np.array(ledger.scores(), dtype=np.float64), [one.path for one in plan.bundles]
    repeated = ledger.repeated()
    bundles = [
        {"bundle": name, **_summary(row), "repeated": repeated[number], "sha256": plan.bundles[number].sha256}
        for number, (name, row) in enumerate(zip(names, scores, strict=True))
    ]
    pairs = zip(names[1:], scores[1:], strict=True)
    return {
        "kind": "trials",
        "version": __version__,
        "robot": plan.settings["robot"],
        "trials": plan.trials,
        "planned": len(plan.orders),
        "bundles": bundles,
        "differences": [difference((name, names[0]), row, scores[0]) for name, row in pairs],
        "orders": plan.orders[: plan.trials],
        "settings": plan.settings,
    }


def _summary(scores: np.ndarray) -> dict[str, Any]:
    successes = int((scores >= 1).sum())
    return {
        "n": len(scores),
        "successes": successes,
        "success_rate": successes / len(scores),
        "success_interval": wilson_interval(successes, len(scores)),
        "mean_score": float(scores.mean()),
        "mean_interval": None if _all_equal(scores) else bootstrap_interval(scores),
        "scores": scores.tolist(),
    }


def difference(names: tuple[str, str], first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """`first` minus `second`, scores [N] of the bundles `names` by trial.

    As `statistics.paired_scores`, with intervals None where all differences are equal; `p` of the sign-flip test,
    `needed_trials` (`statistics.needed_pairs`), and both in words: `verdict`, `needed`.
    """
    found = paired_scores(first, second)
    differences = first - second
    p, n, needed = sign_flip_test(differences), len(differences), needed_pairs(differences)
    interval = found["mean_interval"]
    sure = "the same in each trial" if _all_equal(differences) else interval_words(interval, 3)
    said = verdict(
        names,
        f"{signed(found['mean_difference'], 3)} in mean score",
        None if n == 1 else f"{sure}, p = {p:.2g}",
        0 if p >= SURE else sign_of(interval),
        words=("scores higher", "scores lower"),
        pairs="trials",
    )
    if _all_equal(differences):
        found |= {"mean_interval": None, "success_interval": None}
    return {
        "bundle": names[0],
        "minus": names[1],
        **found,
        "p": p,
        "needed_trials": needed,
        "verdict": said,
        "needed": _needed(differences, needed),
    }


def _needed(differences: np.ndarray, needed: int | None) -> str:
    """How many trials tell such a difference from chance, in a sentence."""
    mean, n = float(differences.mean()), len(differences)
    if n == 1:
        return "One trial does not say how much they vary, and so not how many are needed."
    if mean == 0:
        return "No difference was seen, so no number of trials follows from these."
    if needed is None:
        return "All trials gave the same difference: that does not say how it varies, and so not how many are needed."
    many = f"about {needed:,} trials are" if needed <= MOST else f"more than {MOST:,} trials are"
    enough = f"; these were {n}" if needed > n else f", and these were {n}"
    return (
        f"If the difference is what it was here, {signed(mean, 3)} with a standard deviation of "
        f"{differences.std(ddof=1):.2f} over trials, {many} needed to find it (95 %, power 80 %){enough}."
    )


def _all_equal(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())


def write_report(path: Path, results: Mapping[str, Any]) -> None:
    """Write the page."""
    bundles, page = results["bundles"], report_page
    cards = [
        page.card(
            one["bundle"],
            f"{one['successes']} of {one['n']}",
            f"successes; {_between(one['success_interval'])}, mean score {one['mean_score']:.3f}",
        )
        for one in bundles
    ]
    said = [page.verdict(one["verdict"]) + page.note(one["needed"]) for one in results["differences"]]
    names = [one["bundle"] for one in bundles]
    rows = [
        (str(trial + 1), *(f"{one['scores'][trial]:.3g}" for one in bundles), _order(order))
        for trial, order in enumerate(results["orders"])
    ]
    dry = " (dry run: nothing moved)" if results["settings"]["dry_run"] else ""
    page.write_page(
        path,
        title=f"{_made(results)}{dry}",
        subtitle=", ".join(names),
        body=[
            page.grid(cards),
            *said,
            page.section("Bundles", f'<div class="card scroll">{page.number_table(HEADS, _rows(bundles))}</div>'),
            page.note(_SAID),
            page.folded("Every trial", page.number_table(("trial", *names, "order"), rows)),
            page.folded("Settings", page.setting_table(results["settings"])),
        ],
    )


HEADS = ("bundle", "successes", "rate", "95 % interval", "mean score", "95 % interval", "repeated")


def _rows(bundles: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each bundle, under `HEADS`."""
    return [
        (
            one["bundle"],
            f"{one['successes']} of {one['n']}",
            f"{one['success_rate']:.2f}",
            _between(one["success_interval"]),
            f"{one['mean_score']:.3f}",
            _between(one["mean_interval"]),
            str(one["repeated"]),
        )
        for one in bundles
    ]


def _between(interval: Sequence[float] | None) -> str:
    return "all equal" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"


def _order(order: Sequence[int]) -> str:
    """The bundles by their places in the table, as they ran."""
    return ", ".join(str(number + 1) for number in order)


def _made(results: Mapping[str, Any]) -> str:
    """How many trials, and of how many that were planned."""
    trials, planned = results["trials"], results["planned"]
    return f"{trials}{f' of {planned} planned' if trials < planned else ''} trials on {results['robot']}"


def _print(results: Mapping[str, Any], folder: Path) -> None:
    table = Table(*HEADS, title=_made(results))
    for row in _rows(results["bundles"]):
        table.add_row(*map(escape, row))  # of rich's markup
    Console().print(table)
    for one in results["differences"]:
        print(one["verdict"])
        print(one["needed"])
    print(f"report: {folder}/report.html")
