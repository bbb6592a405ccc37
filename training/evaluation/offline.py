"""How far sampled chunks are from what the demonstrator did, on episodes that were not trained on where there are.

This is all that can be said of a policy whose task has no simulator, which is the usual case for an arm. It
is not a success rate, and is never called one.

results.json holds `task`, `n_windows`, `n_steps`, `n_action_steps`, `names`, `units`, `action_error` (mean absolute
error, in the data's units, averaged over dimensions), `action_error_relative` (the same as a share of range; None where
every dimension is constant), `errors` (by name: `mae`, `rmse`, `range`, `relative_mae`, `relative_rmse`), `steps_ahead`
[H], `mae_ahead` [H][A], `relative_ahead` [H] (None where no step is left or every dimension is constant), `settings`,
`versions`, `seconds`. With a `WindowReference` also `origin`, `origin_kind`, `n_episodes`, `episode_ids`,
`episode_errors` (relative; None where every dimension is constant), `episode_steps`, `action_error_relative_interval`
(95 %, bootstrap over episodes; None where there is but one) and `baselines` (`baselines.chunks`,
`results.against_baseline`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from einops import reduce
from rich.progress import Progress

from action_diffusion.envs.rollout import Policy, generators
from action_diffusion.errors import InputError
from action_diffusion.policy.reading import versions
from action_diffusion.statistics import paired_interval
from action_diffusion.training.evaluation import baselines
from action_diffusion.training.evaluation.plots import plot_chunks, plot_episode
from action_diffusion.training.evaluation.report import read_metrics, write_offline_report
from action_diffusion.training.evaluation.results import against_baseline, plain, ranks, showing, write_results

Batches = Iterable[tuple[Mapping[str, np.ndarray], np.ndarray, np.ndarray]]


_THUMBNAIL = 160
"""Rows of pixels, at most, of the camera frames in a report."""


@dataclass(frozen=True)
class EpisodesOrigin:
    """What the episodes are to the policy, and the same in a sentence."""

    kind: Literal["held_out", "trained", "unknown"]
    words: str


@dataclass(frozen=True)
class WindowReference:
    """Which episodes the N windows are of, and what these hold beside them.

    ids: a hash of each of the E episodes. episode: int [N], which one each window is of. before: float [N, A], the
    action of the row before now (now's own in an episode's first row). span: float [A], the range of the actions in
    these episodes. along: episode → its windows, in which the executed steps follow one another. control_rate: Hz.
    """

    origin: EpisodesOrigin
    ids: Sequence[str]
    episode: np.ndarray
    before: np.ndarray
    span: np.ndarray
    along: Callable[[int], Batches]
    control_rate: float


def evaluate_offline(
    *,
    policy: Policy,
    batches: Batches,
    output_dir: str | Path,
    settings: Mapping[str, Any],
    reference: WindowReference | None = None,
    task: str = "held-out data",
    names: Sequence[str] = (),
    units: Sequence[str] = (),
    n_action_steps: int | None = None,
    n_plots: int = 4,
    seed: int = 0,
    metrics_file: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare a sampled chunk with the demonstrated one for every window, and write what came of it.

    Writes results.json (what is returned) and report.html into `output_dir`. Errors count the steps that would be
    executed and are not padding; `relative` ones are shares of each dimension's range in these data.

    Args:
        batches: (observations {key: [B, To, …]}, action [B, H, A], mask bool [B, H], False where padded); data's units.
        settings: plain data for the report and results.json.
        reference: for what is said of episodes: where they come from, the error of each, baselines, a curve along one.
        names, units: of the A action dimensions; "action 0" and so on, and none, without.
        n_action_steps: that count as executed; the policy's own without.
        n_plots: windows to plot, from the lowest error to the highest.
        seed: of the noise; each window draws its own.
        metrics_file: a `metrics.jsonl`, for learning curves in the report.
        progress: a bar is added to this one; without it, one is shown on stderr.

    Raises:
        InputError: for no windows or plots, names that are not one for each dimension, shapes that do not fit together,
            actions or chunks that are not finite, unreadable metrics, or a disk that does not take the files.
    """
    folder, now = Path(output_dir), policy.spec.n_obs_steps - 1
    count = n_action_steps or policy.spec.n_action_steps
    if n_plots < 1:
        raise InputError(f"n_plots is {n_plots}; it must be at least 1")
    settings = plain({**settings, "noise_seed": seed})
    metrics = read_metrics(Path(metrics_file)) if metrics_file is not None else []
    began = time.perf_counter()
    sampled = _sample(policy, batches, seed, progress)
    names = _names(names, sampled.demonstrated.shape[2])
    errors = _errors(sampled, now, count, reference)
    counts = {"n_windows": len(errors.error), "n_steps": int(errors.executed.sum()), "n_action_steps": count}
    results: dict[str, Any] = {"task": task, **counts, "names": names, "units": list(units) or [""] * len(names)}
    results |= _by_dimension(errors, names) | _by_step(errors, sampled.mask, now)
    if reference is not None:
        results |= _by_episode(errors, reference)
        results["baselines"] = _baselines(results, sampled, errors, reference, names, now)
    results |= {"settings": settings, "versions": versions(), "seconds": time.perf_counter() - began}
    write_results(folder / "results.json", results)
    labels = [f"{name} [{unit}]" if unit else name for name, unit in zip(names, results["units"], strict=True)]
    chunks = _plot_chosen(sampled, errors, now, labels, count, n_plots)
    whole = b"" if reference is None else _along(policy, reference, results, labels, count, seed, progress)
    write_offline_report(folder / "report.html", results=results, metrics=metrics, chunks=chunks, episode=whole)
    return results


def _names(names: Sequence[str], n: int) -> list[str]:
    chosen = list(names) or [f"action {index}" for index in range(n)]
    if len(set(chosen)) != n:
        raise InputError(f"{len(set(chosen))} different names for {n} action dimensions")
    return chosen


class _Sampled(NamedTuple):
    """float64 [N, H, A] twice, bool [N, H], and what was seen now: states [N, D] and small frames [N, h, w, 3]."""

    predicted: np.ndarray
    demonstrated: np.ndarray
    mask: np.ndarray
    states: dict[str, np.ndarray]
    frames: dict[str, np.ndarray]


class _Errors(NamedTuple):
    """Absolute errors, float [N, H, A]; which steps would be executed and are not padding, bool [N, H]; and the range
    of each action, float [A]."""

    error: np.ndarray
    executed: np.ndarray
    span: np.ndarray


def _errors(sampled: _Sampled, now: int, count: int, reference: WindowReference | None) -> _Errors:
    executed = sampled.mask.copy()
    executed[:, :now] = executed[:, now + count :] = False
    if not executed.any():
        raise InputError("every step that would be executed is padding: nothing can be compared")
    span = np.ptp(sampled.demonstrated[sampled.mask], axis=0) if reference is None else reference.span
    return _Errors(np.abs(sampled.predicted - sampled.demonstrated), executed, span)


def _sample(policy: Policy, batches: Batches, seed: int, progress: Progress | None) -> _Sampled:
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    seen: dict[str, list[np.ndarray]] = {}
    n = 0
    with showing(progress) as bars:
        total = len(batches) if isinstance(batches, Sized) else None
        for obs, action, mask in bars.track(batches, total=total, description="windows"):
            pairs = [generators(seed, window) for window in range(n, n + len(action))]
            chunk = policy.predict(
                obs, noise_generator=[noise for noise, _ in pairs], generator=[steps for _, steps in pairs]
            )["action_pred"]
            _check(chunk, action, mask)
            parts.append((chunk.astype(np.float64), action.astype(np.float64), mask.astype(bool)))
            for key, values in obs.items():
                seen.setdefault(key, []).append(
                    _thumbnails(values[:, -1].copy()) if _is_image(values) else values[:, -1]
                )
            n += len(action)
    if not n:
        raise InputError("no held-out windows: keep some episodes for validation")
    chunks, actions, masks = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    now = {key: np.concatenate(values) for key, values in seen.items()}
    frames = {key: values for key, values in now.items() if values.dtype == np.uint8 and values.ndim == 4}
    states = {key: values.reshape(n, -1).astype(np.float64) for key, values in now.items() if key not in frames}
    return _Sampled(chunks, actions, masks, states, frames)


def _is_image(values: np.ndarray) -> bool:
    return values.dtype == np.uint8 and values.ndim == 5


def _thumbnails(frames: np.ndarray) -> np.ndarray:
    """uint8 [B, H, W, 3] → [B, h, w, 3], means of squares of pixels."""
    size = -(-frames.shape[1] // _THUMBNAIL)
    if size == 1 or min(frames.shape[1:3]) < size:
        return frames
    height, width = (length // size for length in frames.shape[1:3])
    squares = frames[:, : height * size, : width * size].astype(np.float32)
    means: np.ndarray = reduce(squares, "b (h s) (w t) c -> b h w c", "mean", s=size, t=size)
    return means.round().astype(np.uint8)


def _check(chunk: np.ndarray, action: np.ndarray, mask: np.ndarray) -> None:
    if action.ndim != 3 or chunk.shape != action.shape or mask.shape != action.shape[:2]:
        raise InputError(
            f"held-out actions {list(action.shape)}, mask {list(mask.shape)} and predicted chunks "
            f"{list(chunk.shape)} do not fit together: [B, H, A], [B, H] and [B, H, A]"
        )
    for values, what in ((action[mask.astype(bool)], "the held-out actions"), (chunk, "the policy's chunks")):
        if not np.isfinite(values).all():
            raise InputError(f"{what} hold NaN or infinity")


def _by_dimension(errors: _Errors, names: Sequence[str]) -> dict[str, Any]:
    """Mean and root mean square over the executed steps, by name."""
    error, span = errors.error[errors.executed], errors.span
    mae, rmse = error.mean(axis=0), np.sqrt((error**2).mean(axis=0))
    varies = span > 0
    by_name = {
        name: {
            "mae": float(mae[index]),
            "rmse": float(rmse[index]),
            "range": float(span[index]),
            "relative_mae": float(mae[index] / span[index]) if varies[index] else None,
            "relative_rmse": float(rmse[index] / span[index]) if varies[index] else None,
        }
        for index, name in enumerate(names)
    }
    relative = float((mae[varies] / span[varies]).mean()) if varies.any() else None
    return {"action_error": float(mae.mean()), "action_error_relative": relative, "errors": by_name}


def _by_step(errors: _Errors, mask: np.ndarray, now: int) -> dict[str, Any]:
    """Mean at every step of a chunk, counted from now, without padding: where mask [N, H] is False."""
    error, span = errors.error, errors.span
    varies = span > 0
    mae = [error[mask[:, step], step].mean(axis=0) if mask[:, step].any() else None for step in range(mask.shape[1])]
    return {
        "steps_ahead": [step - now for step in range(mask.shape[1])],
        "mae_ahead": [None if row is None else row.tolist() for row in mae],
        "relative_ahead": [
            None if row is None or not varies.any() else float((row[varies] / span[varies]).mean()) for row in mae
        ],
    }


def _by_episode(errors: _Errors, reference: WindowReference) -> dict[str, Any]:
    """Mean relative error of each episode, and the interval over episodes of their mean, each step counted once."""
    error, executed, span = errors
    episode, n = np.repeat(reference.episode, executed.sum(axis=1)), len(reference.ids)
    steps = np.bincount(episode, minlength=n)
    found: dict[str, Any] = {
        "origin": reference.origin.words,
        "origin_kind": reference.origin.kind,
        "n_episodes": n,
        "episode_ids": list(reference.ids),
        "episode_steps": steps.tolist(),
        "episode_errors": None,
        "action_error_relative_interval": None,
    }
    varies = span > 0
    if varies.any():
        relative = (error[executed][:, varies] / span[varies]).mean(axis=1)
        means = np.bincount(episode, weights=relative, minlength=n) / steps
        interval = list(paired_interval(means, np.zeros(n), weights=steps)) if n > 1 else None
        found |= {"episode_errors": means.tolist(), "action_error_relative_interval": interval}
    return found


def _baselines(
    results: Mapping[str, Any],
    sampled: _Sampled,
    errors: _Errors,
    reference: WindowReference,
    names: Sequence[str],
    now: int,
) -> dict[str, Any]:
    """By name, what chunks that need no policy would have had, beside `results`."""
    constant = baselines.chunks(
        sampled.states, reference.before, sampled.demonstrated[:, now], errors.span, list(names)
    )
    found = {}
    for name, (chunk, made_of) in constant.items():
        off = errors._replace(error=np.abs(chunk[:, None] - sampled.demonstrated))
        one = _by_dimension(off, names) | _by_episode(off, reference)
        found[name] = against_baseline(results, one, name) | {"made_of": made_of}
    return found


def _along(
    policy: Policy,
    reference: WindowReference,
    results: Mapping[str, Any],
    labels: Sequence[str],
    count: int,
    seed: int,
    progress: Progress | None,
) -> bytes:
    """The executed steps along the episode whose error is the median, as a plot."""
    errors = results["episode_errors"] or [0.0] * len(reference.ids)
    typical = int(np.argsort(errors, kind="stable")[(len(errors) - 1) // 2])
    sampled, now = _sample(policy, reference.along(typical), seed, progress), policy.spec.n_obs_steps - 1
    steps, real = slice(now, now + count), sampled.mask[:, now : now + count].ravel()
    predicted, demonstrated = (
        chunks[:, steps].reshape(-1, len(labels))[real] for chunks in (sampled.predicted, sampled.demonstrated)
    )
    return plot_episode(
        predicted=predicted,
        demonstrated=demonstrated,
        names=labels,
        control_rate=reference.control_rate,
        n_action_steps=count,
    )


def _plot_chosen(
    sampled: _Sampled, errors: _Errors, now: int, labels: Sequence[str], n_action_steps: int, n_plots: int
) -> bytes:
    chosen = _choose(errors, n_plots)
    rows = [index for _, index in chosen]
    return plot_chunks(
        predicted=sampled.predicted[rows],
        demonstrated=sampled.demonstrated[rows],
        mask=sampled.mask[rows],
        now=now,
        names=labels,
        n_action_steps=n_action_steps,
        titles=[label for label, _ in chosen],
        frames={key: frames[rows] for key, frames in sampled.frames.items()},
    )


def _choose(errors: _Errors, count: int) -> list[tuple[str, int]]:
    """Windows to plot, evenly by their mean relative error over executed steps."""
    error, executed, span = errors
    scale = np.where(span > 0, span, np.inf)
    steps = executed.sum(axis=1)
    total = np.where(executed, (error / scale).mean(axis=2), 0.0).sum(axis=1)
    mean = total / np.maximum(steps, 1)
    order = [index for index in np.argsort(mean, kind="stable").tolist() if steps[index]]
    return [
        (label, order[rank]) for label, rank in ranks(len(order), count, first="Lowest error", last="Highest error")
    ]
