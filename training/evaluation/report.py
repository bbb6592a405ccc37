"""`report.html`: what an evaluation found, on one page that needs nothing else to be read.

Figures (SVG) and small videos are inside the file, larger videos are linked beside it. What is said beside
the numbers matters as much as they do: which chance the intervals cover, and what an error is not.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imsave

from action_diffusion import report_page as page
from action_diffusion.errors import InputError
from action_diffusion.training.evaluation import plots

EMBED_LIMIT = 2 * 1024**2
"""Videos of at least this many bytes are linked, not embedded."""

CURVES: tuple[tuple[str, dict[str, str], dict[str, bool]], ...] = (
    ("Loss", {"loss": "training", "validation_loss": "validation"}, {"logarithmic": True}),
    ("Action error of sampled chunks", {"action_error": "validation"}, {}),
    ("Score of rollouts", {"rollout_score": "mean score"}, {"unit_range": True}),
)
"""Panels of learning curves: title, names in `metrics.jsonl` and their labels, how they are drawn."""


_STARTS = (
    "The intervals cover the choice of starts: where the mean over all starts lies for this trained policy. "
    "They do not cover training: another training seed gives another policy, and only several trainings "
    "show how far apart those are."
)
_NO_SIMULATOR = (
    "This task has no simulator, so there is no success rate: the policy's chunks are compared with what "
    "the demonstrator did from the same observations. A small error does not prove that the robot succeeds, and "
    "where several ways are right a large one does not prove that it fails. The numbers count the steps that would "
    "be executed; padding is left out."
)


@dataclass(frozen=True)
class Clip:
    """A video in a report: what it stands for ("Best"), its start, its score, and the MP4 file.

    last: uint8 [H, W, 3], its last picture, in which the outcome is seen before it is played.
    """

    label: str
    seed: int
    score: float
    path: Path
    last: np.ndarray | None = None

    @property
    def outcome(self) -> str:
        return f"{'success' if self.score >= 1 else 'no success'}, score {self.score:.3f}, seed {self.seed}"


def write_report(
    path: Path, *, results: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], clips: Sequence[Clip]
) -> None:
    """Write the page for the `results` of `evaluation.evaluate`; `metrics` as `read_metrics` gives them."""
    scores, seeds, n = results["scores"], results["seeds"], results["n_episodes"]
    low, high = results["mean_interval"]
    least, most = results["success_interval"]
    cards = [
        page.card("Mean score", f"{results['mean_score']:.3f}", f"95 % interval {low:.3f} to {high:.3f} (bootstrap)"),
        page.card(
            "Success rate",
            _percent(results["success_rate"]),
            f"95 % interval {_percent(least)} to {_percent(most)} (Wilson)",
        ),
        page.card("Median score", f"{np.median(scores):.3f}", f"from {min(scores):.3f} to {max(scores):.3f}"),
        page.card("Episodes", str(n), f"starts from seeds {min(seeds)} to {max(seeds)}"),
    ]
    starts = sorted(zip(seeds, scores, strict=True), key=lambda start: start[1])
    table = page.number_table(("seed", "score"), [(str(seed), f"{score:.4f}") for seed, score in starts])
    histogram = page.figure(plots.plot_scores(scores).decode(), shape="broad")
    body = [
        page.grid(cards),
        page.note(f"{results['score_definition']} {_STARTS}"),
        page.section("Scores", histogram + page.folded("Every episode, the worst first", table)),
    ]
    if results.get("simulator_failures"):
        rows = [(str(one["seed"]), one["reason"]) for one in results["simulator_failures"]]
        said = page.note("These episodes were begun again; one whose simulator was lost every time counts as 0.")
        body.append(page.section("Lost simulators", said + page.word_table(("seed", "what happened"), rows)))
    if clips:
        body.append(page.section("Episodes", page.grid(_video(clip, path.parent) for clip in clips)))
    page.write_page(
        path,
        title=f"{results['task']}: mean score {results['mean_score']:.3f}",
        subtitle=f"{n} episodes in simulation, {results['seconds']:.1f} s{_learnt_from(results)}",
        body=[*body, *_closing(results, metrics)],
    )


def write_offline_report(
    path: Path,
    *,
    results: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    chunks: bytes,
    episode: bytes = b"",
) -> None:
    """Write the page for the `results` of `evaluation.evaluate_offline`; `chunks`: `plot_chunks`, `episode`:
    `plot_episode`."""
    error, n = _percent(results["action_error_relative"]), results["n_windows"]
    count, interval = results["n_action_steps"], results.get("action_error_relative_interval")
    sure = "of each dimension's range in the data"
    if interval:
        sure = f"95 % interval {_percent(interval[0])} to {_percent(interval[1])} (bootstrap over episodes)"
    cards = [
        page.card("Mean action error, of range", error, sure),
        page.card("Windows", str(n), f"{results['n_steps']} executed steps compared"),
        page.card("Action dimensions", str(len(results["names"])), f"{count} steps of a chunk are executed"),
    ]
    if "origin" in results:
        words = {"held_out": "not trained on", "trained": "trained on!", "unknown": "trained on or not: unknown"}
        cards.insert(1, page.card("Episodes", str(results["n_episodes"]), words[results["origin_kind"]]))
    body = [page.grid(cards)]
    if "origin" in results:
        body.append(page.verdict(f"Measured on {results['origin']}.", warning=results["origin_kind"] != "held_out"))
    body.append(page.note(_NO_SIMULATOR))
    if "baselines" in results:
        body.append(page.section("Beside what needs no policy", _baseline_table(results)))
    body.append(page.section("Error by action dimension", _dimension_table(results)))
    ahead = [
        pair for pair in zip(results["steps_ahead"], results["relative_ahead"], strict=True) if pair[1] is not None
    ]
    if ahead:
        curve = plots.plot_error_ahead(*zip(*ahead, strict=True), n_action_steps=count)
        body.append(page.section("Error over the steps of a chunk", page.figure(curve.decode(), shape="broad")))
    body.append(page.section("Predicted and demonstrated", page.figure(chunks.decode(), shape="broad")))
    if episode:
        caption = (
            "The episode whose error is the median. Each mark begins a chunk, sampled from what was recorded there: "
            "errors do not add up as they may on the robot."
        )
        body.append(page.section("Along an episode", page.figure(episode.decode(), caption=caption, shape="broad")))
    page.write_page(
        path,
        title=f"{results['task']}: action error {error} of range",
        subtitle=f"{n} windows, no simulator, {results['seconds']:.1f} s",
        body=[*body, *_closing(results, metrics)],
    )


def _baseline_table(results: Mapping[str, Any]) -> str:
    rows = [("the policy", _percent(results["action_error_relative"]), "")]
    for name, one in results["baselines"].items():
        rows.append((name.replace("_", " "), _percent(one["action_error_relative"]), one.get("verdict", "")))
    positions = {name: made for name, made in results["baselines"]["hold_still"]["made_of"].items() if "[" in made}
    how = "Hold still repeats the position that was measured now"
    how += (
        f" ({', '.join(f'{name}: {made}' for name, made in positions.items())}), "
        if positions
        else ", where it is seen, "
    )
    how += "and in other dimensions the action before; repeat last action does that in all."
    return (
        f'<div class="card scroll">{page.word_table(("", "mean error / range", "the policy beside it"), rows)}</div>'
        + (page.note(how))
    )


def _dimension_table(results: Mapping[str, Any]) -> str:
    units = results.get("units") or [""] * len(results["errors"])
    rows = (
        (
            f"{name} [{unit}]" if unit else name,
            _number(one["mae"]),
            _number(one["rmse"]),
            _number(one["range"]),
            _percent(one["relative_mae"]),
            _percent(one["relative_rmse"]),
        )
        for (name, one), unit in zip(results["errors"].items(), units, strict=True)
    )
    heads = ("dimension", "mean error", "RMSE", "range", "mean error / range", "RMSE / range")
    return f'<div class="card scroll">{page.number_table(heads, rows)}</div>'


def read_metrics(path: Path, clock: str = "step") -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`: JSON objects with `clock`. A line that a kill cut short is left out.

    Raises `InputError` where the file cannot be read, or where no line is such an object.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the learning curves {path}: {error}") from None
    found = [entry for line in lines if (entry := _entry(line, clock)) is not None]
    if lines and not found:
        raise InputError(f'{path} holds no learning curves: its lines are not JSON objects with a "{clock}"')
    return found


def points(
    metrics: Sequence[Mapping[str, Any]], name: str, clock: str = "step"
) -> tuple[np.ndarray, np.ndarray] | None:
    """(steps [n], values [n]) of a number in `metrics`; None where it is not there.

    Of a step that was written twice, by a training that was resumed, the later counts.
    """
    found = {entry[clock]: float(entry[name]) for entry in metrics if _is_number(entry.get(name))}
    steps = sorted(found)
    return (np.array(steps), np.array([found[step] for step in steps])) if found else None


def _entry(line: str, clock: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and _is_number(entry.get(clock)) else None


def _closing(results: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    curves = [panel for panel in (_panel(metrics, *panel) for panel in CURVES) if panel]
    if curves:
        yield page.section("Learning curves", page.grid(curves, wide=True))
    settings = page.folded("Settings", page.setting_table(results["settings"]))
    yield page.section("How it was measured", settings)
    yield page.folded("Versions", page.setting_table(results["versions"]))


def _panel(
    metrics: Sequence[Mapping[str, Any]], title: str, names: Mapping[str, str], drawn: Mapping[str, bool]
) -> str:
    curves = {label: found for name, label in names.items() if (found := points(metrics, name)) is not None}
    if not curves:
        return ""
    last = ", ".join(f"{label} {values[-1]:.4g}" for label, (_, values) in curves.items())
    return page.figure(plots.plot_curves(curves, **drawn).decode(), title=title, caption=f"Last: {last}")


def _video(clip: Clip, folder: Path) -> str:
    if clip.path.stat().st_size < EMBED_LIMIT:
        source = "data:video/mp4;base64," + base64.b64encode(clip.path.read_bytes()).decode()
    else:
        source = clip.path.relative_to(folder).as_posix()
    height, width = (1, 1) if clip.last is None else clip.last.shape[:2]
    return page.figure(
        f'<div class="film" style="aspect-ratio:{width}/{height}"><video controls loop muted playsinline preload="auto"'
        f' poster="{_poster(clip, height / width)}" src="{source}"></video></div>',
        title=clip.label,
        caption=clip.outcome,
    )


def _poster(clip: Clip, aspect: float) -> str:
    """The outcome in words over the last picture: an SVG as a data URI, 320 wide and `aspect` times as high."""
    height, picture = 320 * aspect, ""
    if clip.last is not None:
        file = io.BytesIO()
        imsave(file, clip.last, format="jpeg", pil_kwargs={"quality": 85})
        data = base64.b64encode(file.getvalue()).decode()
        picture = f'<image width="320" height="{height:g}" href="data:image/jpeg;base64,{data}"/>'
    drawn = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 320 {height:g}">{picture}'
        f'<rect width="320" height="30" fill="#1f2328" fill-opacity="0.8"/>'
        f'<text x="10" y="20" font-family="sans-serif" font-size="15" fill="#ffffff">{clip.outcome}</text></svg>'
    )
    return "data:image/svg+xml;base64," + base64.b64encode(drawn.encode()).decode()


def _learnt_from(results: Mapping[str, Any]) -> str:
    given = results.get("demonstrations")
    return f"; learnt from: {given}" if given else ""


def _number(value: float) -> str:
    return f"{value:.4g}"


def _percent(share: float | None) -> str:
    return "constant" if share is None else f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
