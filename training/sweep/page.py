"""`report.html` of a sweep: which settings are best, how sure that is, and every run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion import report_page as page
from action_diffusion.errors import InputError
from action_diffusion.statistics import signed
from action_diffusion.training.evaluation import plots
from action_diffusion.training.evaluation.report import points, read_metrics
from action_diffusion.training.sweep.grid import CommandOutput, Sweep, shortened
from action_diffusion.training.sweep.summary import SCORE, Done, SeedGroup, differences, label, unquoted

MOST_DRAWN = 8
"""Groups in a picture of curves."""
CURVES = {
    "step": (
        ("Validation loss", "validation_loss", {"logarithmic": True}),
        ("Training loss", "loss", {"logarithmic": True}),
        ("Action error of sampled chunks", "action_error", {}),
        ("Score of rollouts", "rollout_score", {"unit_range": True}),
    ),
    "env_steps": (
        ("Success", "success", {"unit_range": True}),
        ("Score", "score", {"unit_range": True}),
    ),
}
"""Pictures by the clock that a command's curves have: title, name of the number, how it is drawn."""
_MEASURES = {SCORE: "mean score", "action_error_relative": "mean action error / range"}
_TWO_KINDS = (
    "Over starts: where the mean of these very policies lies over all starts, or episodes (bootstrap; a single run's "
    "success rate: Wilson). Over seeds: where the mean over all trainings with these settings lies (Student's t over "
    "the runs' means, within what the measure can be). A setting is better when both say so."
)
_PAIRED = (
    "All groups began from the same starts, so how hard a start is cancels in a difference; runs with the same seed "
    "are paired, too. The best of many groups is partly lucky, the more so the more were tried: confirm it on other "
    "starts (evaluate seed=…) and with other seeds."
)


def write(path: Path, sweep: Sweep, runs: Sequence[Done], groups: Sequence[SeedGroup]) -> None:
    """Write the page; `runs` and `groups` best first."""
    done = [run for run in runs if run.state == "finished"]
    best = groups[0] if groups else None
    title = f"sweep {sweep.command}: {len(runs)} runs"
    if best is not None:
        title += f", best {_MEASURES[best.measured.measure]} {best.measured.mean:.3f}"
    page.write_page(
        path,
        title=title,
        subtitle=f"action-diffusion sweep {' '.join((sweep.command, *_said(sweep)))}",
        body=[
            page.grid(_cards(runs, done, best)),
            *(_trouble(run) for run in runs if run.state != "finished"),
            *_groups(groups, sweep),
            *_curves(groups, sweep.kind),
            page.section("Every run, best first", _runs(runs)),
        ],
    )


def _said(sweep: Sweep) -> list[str]:
    """Its words, as one would read them."""
    return [*(f"{name}=…" for name in sorted(sweep.names)), *sweep.fixed]


def _cards(runs: Sequence[Done], done: Sequence[Done], best: SeedGroup | None) -> Iterator[str]:
    if best is not None:
        sure = best.over_seeds or best.over_starts
        over = f"over {len(best.runs)} seeds" if best.over_seeds else "over starts"
        said = "no interval: one start" if sure is None else f"95 % interval {_between(sure)} {over}"
        yield page.card(f"Best {_MEASURES[best.measured.measure]}", f"{best.measured.mean:.3f}", said)
        yield page.card("Best settings", label(best.settings), f"of {_counted(runs)} different ones")
    yield page.card("Runs", f"{len(done)} of {len(runs)}", "finished")
    yield page.card("Time", f"{sum(run.seconds for run in runs) / 60:.1f} min", "of all runs together")


def _counted(runs: Sequence[Done]) -> int:
    return len({tuple(item for item in run.settings.items() if item[0] != "seed") for run in runs})


def _trouble(run: Done) -> str:
    why = f": {run.reason}" if run.reason else ""
    return page.verdict(f"{label(run.settings)} {run.state}{why}", warning=True)


def _groups(groups: Sequence[SeedGroup], sweep: Sweep) -> Iterator[str]:
    if not groups:
        return
    names = _names([group.settings for group in groups])
    heads = [*names.values(), "runs", _MEASURES[groups[0].measured.measure], "95 % over starts", "95 % over seeds"]
    rows = [
        (
            *(unquoted(group.settings.get(name, "")) for name in names),
            str(len(group.runs)),
            f"{group.measured.mean:.3f}",
            _between(group.over_starts),
            _between(group.over_seeds),
        )
        for group in groups
    ]
    table = f'<div class="card scroll">{page.number_table(heads, rows)}</div>'
    title = "Settings, best first" if sweep.kind.seeded and any("seed" in one for one in sweep.names) else "Best first"
    yield page.section(title, table + page.note(_TWO_KINDS))
    pairs = differences(groups)
    if pairs:
        lines = [
            (
                label(pair["settings"]),
                signed(pair["difference"], 3),
                _between(pair["over_starts"], sign=True),
                _between(pair["over_seeds"], sign=True),
                pair["apart"],
            )
            for pair in pairs
        ]
        top = (f"minus {label(groups[0].settings)}", "difference", "95 % over starts", "95 % over seeds", "told apart")
        shown = f'<div class="card scroll">{page.number_table(top, lines)}</div>'
        yield page.section("Paired differences from the best", shown + page.note(_PAIRED))


def _curves(groups: Sequence[SeedGroup], kind: CommandOutput) -> Iterator[str]:
    """Overlaid: a colour a group, a line a run."""
    if not kind.curves:
        return
    logs = {label(group.settings): _logs(group, kind) for group in groups[:MOST_DRAWN]}
    figures = []
    for title, name, drawn in CURVES[kind.clock]:
        curves = {
            said: [found for log in of_group if (found := points(log, name, kind.clock)) is not None]
            for said, of_group in logs.items()
        }
        if any(curves.values()):
            svg = plots.plot_overlaid(curves, clock=kind.clock.replace("_", " "), **drawn)
            figures.append(page.figure(svg.decode(), title=title))
    if figures:
        rest = f" of the best {MOST_DRAWN} of {len(groups)} settings" if len(groups) > MOST_DRAWN else ""
        yield page.section(f"Curves{rest}", page.grid(figures, wide=True))


def _logs(group: SeedGroup, kind: CommandOutput) -> list[list[dict[str, Any]]]:
    logs = []
    for run in group.runs.values():
        try:
            logs.append(read_metrics(run.folder / kind.curves, clock=kind.clock))
        except InputError:  # a run without one has no line
            continue
    return logs


def _runs(runs: Sequence[Done]) -> str:
    names = _names([run.settings for run in runs])
    measured = [run.measured for run in runs if run.measured is not None]
    measure = _MEASURES[measured[0].measure] if measured else "result"
    simulated = any(one.success_rate is not None for one in measured)
    success = ["success", "95 % (Wilson)"] if simulated else []
    heads = [*names.values(), measure, "95 % over starts", *success, "minutes", "state", "folder"]
    rows = []
    for run in runs:
        found = run.measured
        row = [*(unquoted(run.settings.get(name, "")) for name in names)]
        row += ["", ""] if found is None else [f"{found.mean:.3f}", _between(found.interval)]
        if simulated:
            rate = None if found is None else found.success_rate
            row += ["", ""] if found is None or rate is None else [f"{rate:.2f}", _between(found.success_interval)]
        rows.append([*row, f"{run.seconds / 60:.1f}", run.state, f"runs/{run.name}"])
    return f'<div class="card scroll">{page.number_table(heads, rows)}</div>'


def _names(settings: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Options that differ, and their short names."""
    return shortened(list(dict.fromkeys(name for one in settings for name in one)))


def _between(interval: Sequence[float] | None, *, sign: bool = False) -> str:
    if interval is None:
        return "–"
    low, high = (signed(end, 3) if sign else f"{end:.3f}" for end in np.asarray(interval, dtype=float).tolist())
    return f"{low} to {high}"
