"""Figures for reports, as inline SVG that takes its colours and its font from the page around it.

Matplotlib writes fixed colours; a page has a light and a dark face. So figures are drawn in stand-in colours
that occur nowhere else, and each is replaced by a CSS variable with a fallback for viewing the file by
itself. Figures are built as objects, without pyplot: no global state, nothing left open.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from action_diffusion.errors import InputError

INK, FAINT, FIRST, SECOND = "#0000f1", "#0000f2", "#0000f3", "#0000f4"
_VARIABLES = {
    INK: "var(--ink, #24292f)",
    FAINT: "var(--line, #d0d7de)",
    FIRST: "var(--first, #0969da)",
    SECOND: "var(--second, #bc4c00)",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "lines.linewidth": 1.6,
}
MAX_POINTS = 500


def plot_curves(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    logarithmic: bool = False,
    unit_range: bool = False,
) -> bytes:
    """Quantities over training steps: label -> (steps [n], values [n]), two at most. Returns an SVG.

    Long curves are thinned to averages over neighbouring steps, at most 500 points.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.4, 2.2), layout="constrained")
        axes = figure.add_subplot()
        for (label, (steps, values)), colour in zip(curves.items(), (FIRST, SECOND), strict=False):
            steps, values = _thinned(steps), _thinned(values)
            axes.plot(steps, values, color=colour, label=label, marker="o" if len(steps) < 30 else "", ms=3)
        if logarithmic and all((values > 0).all() for _, values in curves.values()):
            _logarithmic(axes)
        if unit_range:
            axes.set_ylim(0, 1.03)
        axes.set_xlabel("training step")
        if len(curves) > 1:
            axes.legend()
        return _svg(figure)


def plot_overlaid(
    curves: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]],
    *,
    clock: str,
    logarithmic: bool = False,
    unit_range: bool = False,
) -> bytes:
    """Groups of curves over `clock`, label -> a (steps [n], values [n]) each; a colour a group. Returns an SVG."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for number, (label, lines) in enumerate(curves.items()):
            for steps, values in lines:
                steps, values = _thinned(steps), _thinned(values)
                mark = "o" if len(steps) < 30 else ""
                axes.plot(steps, values, color=f"C{number}", alpha=0.75, linewidth=1.2, marker=mark, ms=2.5)
            axes.plot([], [], color=f"C{number}", label=label)
        if logarithmic and all((values > 0).all() for lines in curves.values() for _, values in lines):
            _logarithmic(axes)
        if unit_range:
            axes.set_ylim(0, 1.03)
        axes.set_xlabel(clock)
        figure.legend(loc="outside upper left", ncols=2 if len(curves) > 3 else 1)
        return _svg(figure)


def plot_scores(scores: Sequence[float]) -> bytes:
    """A histogram of episode scores in [0, 1], successes (score 1) apart, and their mean; returns an SVG."""
    data = np.asarray(scores)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        axes.hist(
            [data[data < 1], data[data >= 1]],
            bins=list(np.linspace(0, 1, 21)),
            stacked=True,
            color=[FIRST, SECOND],
            label=["score below 1", "success"],
            rwidth=0.85,
        )
        mean = float(data.mean())
        axes.axvline(mean, color=INK, linewidth=1.2, linestyle="--", label=f"mean {mean:.3f}")
        axes.set(xlim=(-0.01, 1.01), xlabel="score of an episode (its maximum reward)", ylabel="episodes")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=False, axis="x")
        figure.legend(loc="outside upper right", ncols=3)
        return _svg(figure)


def plot_pairs(first: Sequence[float], second: Sequence[float], *, labels: Sequence[str]) -> bytes:
    """Scores of two policies on the same starts, a point a start, above the line where `second` wins, and the
    differences by size: SVG."""
    return _pairs(np.asarray(first), np.asarray(second), [f"score of {label}" for label in labels], "starts")


def plot_error_ahead(steps_ahead: Sequence[int], errors: Sequence[float], *, n_action_steps: int) -> bytes:
    """Mean action error, a share of the data's range, over steps from now; returns an SVG.

    The executed steps, 0 to n_action_steps - 1, are shaded.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        _shade(axes, n_action_steps)
        axes.plot(steps_ahead, 100 * np.asarray(errors), color=FIRST, marker="o", ms=3)
        axes.set_ylim(bottom=0)
        axes.set(xlabel="steps from now", ylabel="mean error, % of range")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _svg(figure)


def plot_chunks(
    *,
    predicted: np.ndarray,
    demonstrated: np.ndarray,
    mask: np.ndarray,
    now: int,
    names: Sequence[str],
    n_action_steps: int,
    titles: Sequence[str] = (),
    frames: Mapping[str, np.ndarray] | None = None,
) -> bytes:
    """Predicted against demonstrated chunks: a row of panels for each action dimension, a column for each
    window, and above them what each camera saw.

    Args:
        predicted, demonstrated: [N, H, A] in the data's units.
        mask: bool [N, H]; padded steps (False) of the demonstration are left out.
        now: the chunk's step that is executed first (To - 1); the horizontal axis counts from it.
        names: of the A action dimensions, with units.
        n_action_steps: the executed steps [now : now + n_action_steps] are shaded.
        titles: one for each window, or none.
        frames: camera → uint8 [N, h, w, 3], at now.

    Returns:
        An SVG document.

    Raises:
        InputError: where shapes, names or titles do not fit together.
    """
    n, horizon, size = _checked_chunks(predicted, demonstrated, mask, names, titles)
    shown = np.where(mask[..., None], demonstrated, np.nan)
    ahead = np.arange(horizon) - now
    cameras = frames or {}
    heights = [2.1 * seen.shape[1] / seen.shape[2] for seen in cameras.values()] + [1.3] * size
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(max(4.8, 2.4 * n), 0.6 + sum(heights)), layout="constrained")
        grid = figure.subplots(len(heights), n, squeeze=False, height_ratios=heights)
        for panels, (camera, seen) in zip(grid, cameras.items(), strict=False):
            _show(panels, camera, seen)
        panels = grid[len(cameras) :]
        for row, name in enumerate(names):
            panels[row, 0].set_ylabel(name)
            for column, axes in enumerate(panels[row]):
                axes.sharex(panels[0, 0])
                axes.sharey(panels[row, 0])
                axes.label_outer()
                _shade(axes, n_action_steps)
                axes.plot(ahead, shown[column, :, row], color=INK, label="demonstrated")
                axes.plot(ahead, predicted[column, :, row], color=FIRST, label="predicted", marker="o", ms=2.5)
        for axes, title in zip(grid[0], titles, strict=False):
            axes.set_title(title, fontsize=9)
        for axes in panels[-1]:
            axes.set_xlabel("steps from now")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3)
        return _svg(figure)


def plot_episode(
    *,
    predicted: np.ndarray,
    demonstrated: np.ndarray,
    names: Sequence[str],
    control_rate: float,
    n_action_steps: int,
) -> bytes:
    """Along an episode: the steps that would be executed, chunk after chunk, each from what was recorded there.

    predicted, demonstrated: [T, A] in the data's units. names: of the A dimensions, with units. control_rate: Hz. A
    mark is where a chunk of n_action_steps begins. Returns an SVG.
    """
    time = np.arange(len(predicted)) / control_rate
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 0.7 + 1.4 * len(names)), layout="constrained")
        grid = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
        for index, (axes, name) in enumerate(zip(grid, names, strict=True)):
            axes.set_ylabel(name)
            axes.plot(time, demonstrated[:, index], color=INK, label="demonstrated")
            axes.plot(
                time, predicted[:, index], color=FIRST, label="predicted", marker="o", ms=2.5, markevery=n_action_steps
            )
        grid[-1].set_xlabel("seconds")
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2)
        return _svg(figure)


def plot_error_pairs(first: Sequence[float], second: Sequence[float], *, labels: Sequence[str]) -> bytes:
    """Relative errors of two policies on the same episodes, a point an episode, below the line where `second` errs
    less, and the differences by size: SVG."""
    x, y = (100 * np.asarray(values) for values in (first, second))
    return _pairs(x, y, [f"error of {label}, % of range" for label in labels], "episodes")


def _pairs(x: np.ndarray, y: np.ndarray, labels: Sequence[str], what: str) -> bytes:
    """On the left y over x [n], within the range of both; on the right y - x, the smallest first."""
    low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
    margin = 0.05 * (high - low) or 0.01
    limits = (low - margin, high + margin)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(limits, limits, color=INK, linewidth=1.0, linestyle="--")
        left.scatter(x, y, s=16, color=FIRST, alpha=0.7)
        left.set(xlim=limits, ylim=limits, aspect="equal", xlabel=labels[0], ylabel=labels[1])
        left.xaxis.set_major_locator(MaxNLocator(5))
        differences = np.sort(y - x)
        right.axhline(0.0, color=INK, linewidth=1.0)
        right.bar(np.arange(1, len(differences) + 1), differences, width=0.8, color=FIRST)
        right.axhline(float(differences.mean()), color=SECOND, linewidth=1.2, linestyle="--", label="mean")
        right.legend(frameon=False)
        right.set(xlabel=f"{what}, by difference", ylabel="difference: first minus second policy")
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _svg(figure)


def _checked_chunks(
    predicted: np.ndarray,
    demonstrated: np.ndarray,
    mask: np.ndarray,
    names: Sequence[str],
    titles: Sequence[str],
) -> tuple[int, int, int]:
    if predicted.ndim != 3 or not len(predicted) or predicted.shape != demonstrated.shape:
        raise InputError(
            f"predicted chunks {list(predicted.shape)} and demonstrated chunks {list(demonstrated.shape)} "
            "must both be [N, H, A] with N >= 1"
        )
    n, horizon, size = predicted.shape
    if mask.shape != (n, horizon):
        raise InputError(f"the mask has shape {list(mask.shape)}, the chunks need {[n, horizon]}")
    if len(names) != size:
        raise InputError(f"{len(names)} names for {size} action dimensions")
    if titles and len(titles) != n:
        raise InputError(f"{len(titles)} titles for {n} windows")
    return n, horizon, size


def _show(panels: np.ndarray, camera: str, frames: np.ndarray) -> None:
    """What a camera saw, uint8 [N, h, w, 3], in a row of N panels."""
    panels[0].set_ylabel(camera)
    for axes, picture in zip(panels, frames, strict=True):
        axes.imshow(picture, interpolation="none")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)


def _shade(axes: Axes, n_action_steps: int) -> None:
    axes.axvspan(-0.5, n_action_steps - 0.5, color=SECOND, alpha=0.1, linewidth=0, label="executed")


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def _thinned(values: np.ndarray) -> np.ndarray:
    """At most MAX_POINTS averages over equally many neighbours."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) <= MAX_POINTS:
        return values
    return np.array([part.mean() for part in np.array_split(values, MAX_POINTS)])


def _svg(figure: Figure) -> bytes:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]  # an HTML page has no room for the XML prologue
    return re.sub("#0000f[1-4]", lambda match: _VARIABLES[match.group()], text).encode()
