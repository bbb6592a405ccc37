"""Rows that belong together: runs of true values, kept within episodes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from action_diffusion.datasets.doctor.survey import Survey


def runs(mask: np.ndarray) -> np.ndarray:
    """[R, 2]: first and last row of every run of true values in `mask` [N]."""
    edges = np.diff(np.concatenate([[0], mask.astype(np.int8), [0]]))
    return np.stack([np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) - 1], axis=1)


def runs_in_episodes(mask: np.ndarray, survey: Survey) -> Iterator[tuple[int, int, int]]:
    """(episode, first row, last row) of every run of true values in `mask` [N], cut where episodes end."""
    for episode, (start, end) in enumerate(zip(survey.starts, survey.ends, strict=True)):
        for first, last in runs(mask[start:end]):
            yield episode, int(start + first), int(start + last)


def usual_steps(steps: np.ndarray, share: float) -> np.ndarray:
    """[D]: what `share` of the `steps` [N, D] stay below, without the five largest, which may be what is looked for."""
    if not len(steps):
        return np.zeros(steps.shape[1:])
    kept = max(1, len(steps) - 5)
    return np.asarray(np.quantile(np.partition(steps, kept - 1, axis=0)[:kept], share, axis=0))


def named(dimensions: np.ndarray | list[int], total: int) -> str:
    """Dimensions in words: "" where they are all there is."""
    if len(dimensions) == total:
        return ""
    shown = ", ".join(str(d) for d in list(dimensions)[:6]) + (", …" if len(dimensions) > 6 else "")
    return f"dimension{'s' if len(dimensions) > 1 else ''} {shown} of {total}: "
