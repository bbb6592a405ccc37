"""Pictures of what a buffer holds: an episode's numbers over time and its cameras, and how values are spread."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.edit.inspection import DIMENSIONS, Inspection, Key
from action_diffusion.datasets.images.pictures import picture, preview
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.store import Column
from action_diffusion.files import atomic_path
from action_diffusion.progress import progress

FRAMES = 8
"""Of a camera, evenly over the episode."""
POINTS = 5000
"""Rows of a curve, at most."""
SMALL = 160
"""Pixels of a small picture's longer side, at most."""


def plot(buffer: ReplayBuffer, found: Inspection, episode: int, path: Path) -> None:
    """A PNG at `path`, as `drawn` has it."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(drawn(buffer, found, episode))


def drawn(buffer: ReplayBuffer, found: Inspection, episode: int) -> bytes:
    """A PNG: lengths of the episodes, and for each key the numbers or frames of one episode over time, and how each
    dimension is spread over its range in the buffer (of a camera, the brightness of frames)."""
    from matplotlib.figure import Figure

    end = int(buffer.episode_ends[episode])
    start = end - int(found.lengths[episode])
    figure = Figure(figsize=(12, 1.8 * (len(found.keys) + 1)), layout="constrained")
    axes = figure.subplots(len(found.keys) + 1, 2, squeeze=False, width_ratios=[3, 1])
    axes[0, 0].bar(np.arange(len(found.lengths)), found.lengths, width=1.0, color="0.6")
    axes[0, 0].set_title("steps of each episode", fontsize=9)
    axes[0, 1].hist(found.lengths, bins=30, color="0.4")
    axes[0, 1].set_title("steps", fontsize=9)
    with progress("drawing", len(found.keys)) as advance:
        for (left, right), key in zip(axes[1:], found.keys, strict=True):
            if key.image:
                _strip(left, buffer[key.name], start, end)
            else:
                _series(left, buffer[key.name], start, end, found.rate)
            left.set_title(_title(f"{key.name}, episode {episode}"), fontsize=9)
            _spread(right, key)
            advance(1)
    for axis in axes[:, 1]:
        axis.set_yticks([])
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
    return _png(figure)


def small_png(column: Column, row: int) -> bytes | None:
    """A row of a camera as a small PNG; None for what is no picture that can be shown."""
    frame = shown_frame(column, row)
    if frame is None:
        return None
    from matplotlib.image import imsave

    every = -(-max(frame.shape[:2]) // SMALL)
    file = io.BytesIO()
    imsave(file, np.ascontiguousarray(frame[::every, ::every]), format="png")
    return file.getvalue()


def shown_frame(column: Column, row: int) -> np.ndarray | None:
    """uint8 [H, W, 3] of a row; depth as grey, up to its farthest; None for what is no picture that can be shown."""
    shown = picture(column.shape, column.dtype)
    if shown is None or shown.kind == "unknown":
        return None
    pixels = shown.pixels(np.asarray(column[row : row + 1]))[0]
    if shown.kind == "depth":
        return preview(pixels[..., 0])
    frame = np.nan_to_num(np.asarray(pixels, np.float64), posinf=0, neginf=0)
    if column.dtype.kind == "f" and frame.max(initial=0) <= 1:
        frame = frame * 255
    return frame.clip(0, 255).astype(np.uint8)


def _series(axis: Any, column: Column, start: int, end: int, rate: float | None) -> None:
    every = -(-(end - start) // POINTS)
    values = np.asarray(column[start:end])[::every].reshape(-(-(end - start) // every), -1)
    time = np.arange(start, end, every) if rate is None else np.arange(0, end - start, every) / rate
    for d in range(min(values.shape[1], DIMENSIONS)):
        axis.plot(time, values[:, d].astype(float), linewidth=1, label=str(d))
    axis.set_xlabel("row" if rate is None else "s", fontsize=7)
    axis.margins(x=0)
    if values.shape[1] > 1:
        axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))


def _strip(axis: Any, column: Column, start: int, end: int) -> None:
    """Frames side by side, the first and the last of the episode among them."""
    rows = np.unique(np.linspace(start, end - 1, FRAMES).astype(int))
    frames = [frame for frame in (shown_frame(column, int(row)) for row in rows) if frame is not None]
    axis.axis("off")
    if frames:
        axis.imshow(np.concatenate(frames, axis=1))


def _spread(axis: Any, key: Key) -> None:
    for d in range(min(key.sample.shape[1], DIMENSIONS)):
        values = key.sample[np.isfinite(key.sample[:, d]), d]
        if len(values):
            axis.hist((values - values.min()) / (np.ptp(values) or 1.0), bins=40, histtype="step")
    axis.set_xticks([0, 1], ["least", "most"])
    axis.set_title("brightness of frames" if key.image else "spread", fontsize=9)


def _title(text: str) -> str:
    return text.replace("$", r"\$")  # else a formula


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()
