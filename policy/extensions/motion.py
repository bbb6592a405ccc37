"""What episodes, or chunks, do, as points that can be clustered: the ways in which demonstrations do a task.

    actions [L, A] of an episode ─▶ some columns, in shares of their range ─▶ POINTS of them, evenly spaced in time
    aligned:  two columns of a plane; moved, turned and scaled so that each path goes from (0, 0) to (1, 0)

Clusters are those of k-means (Lloyd 1982, begun as by Arthur and Vassilvitskii 2007), the best of several tries.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from scipy.cluster.vq import kmeans2

from action_diffusion.errors import InputError

POINTS = 16
"""Of a motion."""
TRIES = 10
ROUNDS = 50


def motions(paths: Sequence[np.ndarray], columns: Sequence[int] | None, *, aligned: bool) -> np.ndarray:
    """Points [N, POINTS · D] of paths [L, A] each, in the data's units; columns: D of A, None: all.

    Raises `InputError` for columns that are not there, and for another number than two of them where `aligned`.
    """
    n = paths[0].shape[1]
    chosen = list(range(n)) if columns is None else list(columns)
    for column in chosen:
        if column >= n:
            raise InputError(f"columns={chosen}: the action has the columns 0 to {n - 1}")
    if aligned and len(chosen) != 2:
        raise InputError(f"aligned=true is for two columns of a plane, not {len(chosen)}: columns=[0,1]")
    every = np.concatenate([path[:, chosen] for path in paths]).astype(np.float64)
    low, high = every.min(axis=0), every.max(axis=0)
    scale = np.full_like(low, max((high - low).max(), 1e-12)) if aligned else np.maximum(high - low, 1e-12)
    found = np.stack([_resampled((path[:, chosen] - low) / scale) for path in paths])
    return (_aligned(found) if aligned else found).reshape(len(paths), -1)


def _resampled(path: np.ndarray) -> np.ndarray:
    """[L, D] → [POINTS, D], evenly spaced in time."""
    at = np.linspace(0, len(path) - 1, POINTS)
    return np.stack([np.interp(at, np.arange(len(path)), column) for column in path.T], axis=1)


def _aligned(paths: np.ndarray) -> np.ndarray:
    """[N, P, 2], as complex numbers: from 0 to 1. One that ends where it began keeps its size."""
    points = paths[..., 0] + 1j * paths[..., 1]
    way = points[:, -1:] - points[:, :1]
    moved = (points - points[:, :1]) / np.where(np.abs(way) < 1e-3, 1.0, way)
    return np.stack([moved.real, moved.imag], axis=-1)


def clusters(points: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The cluster of each point [N, D], int64 [N], the largest one first, and their centres [count, D].

    Raises `InputError` where there are fewer different points than clusters.
    """
    if len(np.unique(points, axis=0)) < count:
        raise InputError(f"count={count} clusters of fewer than {count} different motions")
    random = np.random.default_rng(seed)
    best, least = None, np.inf
    for _ in range(TRIES):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an empty cluster: another try has none
            centres, _ = kmeans2(points, count, iter=ROUNDS, minit="++", seed=random)
        belongs = nearest(points, centres)
        spread = float(np.square(points - centres[belongs]).sum())
        if len(np.unique(belongs)) == count and spread < least:
            best, least = centres, spread
    if best is None:
        raise InputError(f"count={count} clusters are not found in these motions: give fewer")
    sizes = np.bincount(nearest(points, best), minlength=count)
    best = best[np.argsort(-sizes, kind="stable")]
    return nearest(points, best), best


def nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The nearest of `centres` [K, D] to each of `points` [N, D]: int64 [N]."""
    result: np.ndarray = np.square(points[:, None] - centres).sum(axis=-1).argmin(axis=1)
    return result


def separation(points: np.ndarray, centres: np.ndarray) -> float:
    """How far apart clusters are: the mean of (b − a) / b, a being the distance to the own centre and b that to the
    next one: 1: far; 0: not at all (a simplified silhouette)."""
    distances = np.sort(np.linalg.norm(points[:, None] - centres, axis=-1), axis=1)
    return float(np.mean(1 - distances[:, 0] / np.maximum(distances[:, 1], 1e-12)))
