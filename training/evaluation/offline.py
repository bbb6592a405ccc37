"""How far sampled chunks are from what the demonstrator did, on episodes that were not trained on.

This is all that can be said of a policy whose task has no simulator, which is the usual case for an arm. It
is not a success rate, and is never called one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from action_diffusion.envs.rollout import Policy, generators
from action_diffusion.errors import InputError
from action_diffusion.policy.bundle import versions
from action_diffusion.training.evaluation.plots import plot_chunks
from action_diffusion.training.evaluation.report import read_metrics, write_offline_report
from action_diffusion.training.evaluation.results import plain, ranks, showing, write_results

Batches = Iterable[tuple[Mapping[str, np.ndarray], np.ndarray, np.ndarray]]


def evaluate_offline(
    *,
    policy: Policy,
    batches: Batches,
    output_dir: str | Path,
    settings: Mapping[str, Any],
    task: str = "held-out data",
    names: Sequence[str] = (),
    n_plots: int = 4,
    seed: int = 0,
    metrics_file: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare a sampled chunk with the demonstrated one for every held-out window, and write what came of it.

    Writes results.json (what is returned) and report.html into `output_dir`. Errors count the steps that
    would be executed and are not padding; `relative` ones are shares of each dimension's range in the
    held-out data.

    Args:
        batches: (observations {key: [B, To, ...]}, action [B, H, A], mask bool [B, H]: False where padded),
            in the data's units.
        settings: plain data for the report and results.json.
        names: of the A action dimensions; "action 0" and so on without.
        n_plots: windows to plot, from the lowest error to the highest.
        seed: of the noise; each window draws its own.
        metrics_file: a `metrics.jsonl`, for learning curves in the report.
        progress: a bar is added to this one; without it, one is shown on stderr.

    Returns:
        `task`, `n_windows`, `n_steps`, `n_action_steps`, `names`, `action_error` (mean absolute error, in the
        data's units, averaged over dimensions), `action_error_relative` (the same as a share of range; None
        where every dimension is constant), `errors` (by name: `mae`, `rmse`, `range`, `relative_mae`,
        `relative_rmse`), `steps_ahead` [H], `mae_ahead` [H][A], `relative_ahead` [H] (None where no step is
        left or every dimension is constant), `settings`, `versions`, `seconds`.

    Raises:
        InputError: for no windows or plots, names that are not one for each dimension, shapes that do not fit
            together, actions or chunks that are not finite, unreadable metrics, or a disk that does not take
            the files.
    """
    folder, spec = Path(output_dir), policy.spec
    if n_plots < 1:
        raise InputError(f"n_plots is {n_plots}; it must be at least 1")
    settings = plain({**settings, "noise_seed": seed})
    metrics = read_metrics(Path(metrics_file)) if metrics_file is not None else []
    began = time.perf_counter()
    predicted, demonstrated, mask = _sample(policy, batches, seed, progress)
    names = _names(names, demonstrated.shape[2])
    executed = _executed(mask, spec.n_obs_steps - 1, spec.n_action_steps)
    error, span = np.abs(predicted - demonstrated), np.ptp(demonstrated[mask], axis=0)
    results = {
        "task": task,
        "n_windows": len(predicted),
        "n_steps": int(executed.sum()),
        "n_action_steps": spec.n_action_steps,
        "names": names,
        **_by_dimension(error[executed], span, names),
        **_by_step(error, mask, span, spec.n_obs_steps - 1),
        "settings": settings,
        "versions": versions(),
        "seconds": time.perf_counter() - began,
    }
    write_results(folder / "results.json", results)
    chosen = _choose(error, executed, span, n_plots)
    rows = [index for _, index in chosen]
    chunks = plot_chunks(
        predicted=predicted[rows],
        demonstrated=demonstrated[rows],
        mask=mask[rows],
        now=spec.n_obs_steps - 1,
        names=names,
        n_action_steps=spec.n_action_steps,
        titles=[label for label, _ in chosen],
    )
    write_offline_report(folder / "report.html", results=results, metrics=metrics, chunks=chunks)
    return results


def _names(names: Sequence[str], n: int) -> list[str]:
    chosen = list(names) or [f"action {index}" for index in range(n)]
    if len(set(chosen)) != n:
        raise InputError(f"{len(set(chosen))} different names for {n} action dimensions")
    return chosen


def _executed(mask: np.ndarray, now: int, count: int) -> np.ndarray:
    """Which steps [N, H] would be executed and are not padding."""
    executed = mask.copy()
    executed[:, :now] = executed[:, now + count :] = False
    if not executed.any():
        raise InputError("every step that would be executed is padding: nothing can be compared")
    return executed


def _sample(
    policy: Policy, batches: Batches, seed: int, progress: Progress | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted and demonstrated chunks, float64 [N, H, A] each, and the mask [N, H]."""
    chunks: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    n = 0
    with showing(progress) as bars:
        total = len(batches) if isinstance(batches, Sized) else None
        for obs, action, mask in bars.track(batches, total=total, description="held-out windows"):
            pairs = [generators(seed, window) for window in range(n, n + len(action))]
            chunk = policy.predict(
                obs, noise_generator=[noise for noise, _ in pairs], generator=[steps for _, steps in pairs]
            )["action_pred"]
            _check(chunk, action, mask)
            chunks.append(chunk.astype(np.float64))
            actions.append(action.astype(np.float64))
            masks.append(mask.astype(bool))
            n += len(action)
    if not n:
        raise InputError("no held-out windows: keep some episodes for validation")
    return np.concatenate(chunks), np.concatenate(actions), np.concatenate(masks)


def _check(chunk: np.ndarray, action: np.ndarray, mask: np.ndarray) -> None:
    if action.ndim != 3 or chunk.shape != action.shape or mask.shape != action.shape[:2]:
        raise InputError(
            f"held-out actions {list(action.shape)}, mask {list(mask.shape)} and predicted chunks "
            f"{list(chunk.shape)} do not fit together: [B, H, A], [B, H] and [B, H, A]"
        )
    for values, what in ((action[mask.astype(bool)], "the held-out actions"), (chunk, "the policy's chunks")):
        if not np.isfinite(values).all():
            raise InputError(f"{what} hold NaN or infinity")


def _by_dimension(error: np.ndarray, span: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Mean and root mean square of `error` [steps, A], by name."""
    mae, rmse = error.mean(axis=0), np.sqrt((error**2).mean(axis=0))
    varies = span > 0
    errors = {
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
    return {"action_error": float(mae.mean()), "action_error_relative": relative, "errors": errors}


def _by_step(error: np.ndarray, mask: np.ndarray, span: np.ndarray, now: int) -> dict[str, Any]:
    """Mean of `error` [N, H, A] at every step of a chunk, counted from now, without padding."""
    varies = span > 0
    mae = [error[mask[:, step], step].mean(axis=0) if mask[:, step].any() else None for step in range(mask.shape[1])]
    return {
        "steps_ahead": [step - now for step in range(mask.shape[1])],
        "mae_ahead": [None if row is None else row.tolist() for row in mae],
        "relative_ahead": [
            None if row is None or not varies.any() else float((row[varies] / span[varies]).mean()) for row in mae
        ],
    }


def _choose(error: np.ndarray, executed: np.ndarray, span: np.ndarray, count: int) -> list[tuple[str, int]]:
    """Windows to plot, evenly by their mean relative error over executed steps."""
    scale = np.where(span > 0, span, np.inf)
    steps = executed.sum(axis=1)
    total = np.where(executed, (error / scale).mean(axis=2), 0.0).sum(axis=1)
    mean = total / np.maximum(steps, 1)
    order = [index for index in np.argsort(mean, kind="stable").tolist() if steps[index]]
    return [
        (label, order[rank]) for label, rank in ranks(len(order), count, first="Lowest error", last="Highest error")
    ]
