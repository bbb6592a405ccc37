"""Minimum, maximum, mean, deviation and count of each feature of each episode, as LeRobot normalises by them.

Added in blocks, merged without cancellation (Chan, Golub and LeVeque 1979). Images are counted by value,
which is exact; theirs are per colour, from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

Stats = dict[str, Any]


class ColumnStatistics:
    """Of rows that are added one block after the other. image: they are [n, H, W, 3] uint8, else [n, D]."""

    def __init__(self, *, image: bool) -> None:
        self._image = image
        self._stats: list[Stats] = []

    def add(self, rows: np.ndarray) -> None:
        self._stats.append(_of_images(rows) if self._image else _of_rows(rows))

    def result(self) -> Stats:
        """Plain values; those of images are [3, 1, 1]."""
        return merged(self._stats)


def _of_rows(rows: np.ndarray) -> Stats:
    values = rows.reshape(len(rows), -1).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # whatever is not finite shows
        found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    return {**{name: value.tolist() for name, value in found.items()}, "count": [len(rows)]}


def _of_images(images: np.ndarray) -> Stats:
    levels = np.arange(256) / 255
    counts = np.stack([np.bincount(images[..., colour].ravel(), minlength=256) for colour in range(3)])
    shares = counts / counts.sum(1, keepdims=True)
    mean = shares @ levels
    found = {
        "min": levels[(counts > 0).argmax(1)],
        "max": levels[255 - (counts[:, ::-1] > 0).argmax(1)],
        "mean": mean,
        "std": np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(1)),
    }
    return {**{name: value.reshape(3, 1, 1).tolist() for name, value in found.items()}, "count": [len(images)]}


def merged(parts: Iterable[Stats]) -> Stats:
    """The statistics of all rows together."""
    parts = list(parts)
    counts = np.array([part["count"][0] for part in parts], np.float64)
    kinds = [name for name in parts[0] if name != "count"]
    arrays = {name: np.stack([np.asarray(part[name], np.float64) for part in parts]) for name in kinds}
    shares = (counts / counts.sum()).reshape(-1, *[1] * (arrays["mean"].ndim - 1))
    with np.errstate(over="ignore", invalid="ignore"):
        mean = (shares * arrays["mean"]).sum(0)
        variance = (shares * (arrays["std"] ** 2 + (arrays["mean"] - mean) ** 2)).sum(0)
    return {
        "min": arrays["min"].min(0).tolist(),
        "max": arrays["max"].max(0).tolist(),
        "mean": mean.tolist(),
        "std": np.sqrt(variance).tolist(),
        "count": [int(counts.sum())],
    }
