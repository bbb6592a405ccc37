"""Is what was written what was there? Each key's SHA-256 of the source and of what is read back; PSNR for lossy video.

The hash is of the rows' bytes in this machine's order, from the first row to the last; NaN of any kind is the same NaN.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from action_diffusion.datasets.formats.columns import is_image, native, rows_a_block, spans
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.store import row_bytes
from action_diffusion.errors import InputError
from action_diffusion.progress import progress

ENOUGH_DB = 40.0


class Likeness(NamedTuple):
    """sha256: of the source's rows, and of the result's where there is no `psnr`, dB; worst: that of one frame."""

    sha256: str
    psnr: float | None = None
    worst: float | None = None

    def __str__(self) -> str:
        if self.psnr is None:
            return f"identical, sha256 {self.sha256}"
        return f"video, PSNR {self.psnr:.1f} dB, of the worst frame {self.worst:.1f} dB"


def verified(source: ReplayBuffer, result: ReplayBuffer, *, lossy: bool) -> dict[str, Likeness]:
    """Compare every row. Raises `InputError` for the first difference, and for images under `ENOUGH_DB`."""
    if not np.array_equal(source.episode_ends, result.episode_ends):
        raise InputError(f"{result.name}: other episodes than {source.name}: convert again")
    if set(source.keys) - set(result.keys):
        raise InputError(f"{result.name} lacks {', '.join(sorted(set(source.keys) - set(result.keys)))}: convert again")
    if _text(source) != _text(result):
        raise InputError(f"{result.name}: other attributes than {source.name}: convert again")
    found = {}
    total = sum(row_bytes(source[key]) * source.n_steps for key in source.keys)
    with progress("comparing with the source", total) as advance:
        for key in source.keys:
            for done in _compare(source, result, key, lossy and is_image(source[key])):
                if isinstance(done, Likeness):
                    found[key] = done
                else:
                    advance(done * row_bytes(source[key]))
    return found


def _text(buffer: ReplayBuffer) -> str:
    return json.dumps(buffer.attrs, sort_keys=True)


def _compare(source: ReplayBuffer, result: ReplayBuffer, key: str, lossy: bool) -> Iterator[int | Likeness]:
    """Rows done, block by block, and at last how alike the columns are."""
    one, other = source[key], result[key]
    where = f"{result.name}: {key}"
    if one.shape != other.shape or native(one.dtype) != native(other.dtype):
        raise InputError(f"{where} is {other.dtype} {list(other.shape)}, not {one.dtype} {list(one.shape)}")
    hashes = hashlib.sha256(), hashlib.sha256()
    squares, worst = 0.0, 0.0
    for first, end in spans(0, one.shape[0], rows_a_block(one)):
        rows, written = np.asarray(one[first:end]), np.asarray(other[first:end])
        hashes[0].update(_plain(rows))
        if lossy:
            errors = _squared_errors(rows, written)
            squares, worst = squares + float(errors.sum()), max(worst, float(errors.max()))
        else:
            hashes[1].update(_plain(written))
            if hashes[0].digest() != hashes[1].digest():
                raise InputError(f"{where} did not arrive as it is in {source.name}, {_place(rows, written, first)}")
        yield end - first
    if not lossy:
        yield Likeness(hashes[0].hexdigest())
        return
    psnr = _decibel(squares / one.shape[0])
    if psnr < ENOUGH_DB:
        raise InputError(f"{where}: PSNR {psnr:.1f} dB, under {ENOUGH_DB:.0f}: convert with video=lossless")
    yield Likeness(hashes[0].hexdigest(), psnr, _decibel(worst))


def _plain(rows: np.ndarray) -> memoryview:
    rows = np.ascontiguousarray(rows, native(rows.dtype))
    if rows.dtype.kind == "f" and np.isnan(rows).any():
        rows = np.where(np.isnan(rows), rows.dtype.type(math.nan), rows)
    return rows.reshape(-1).view(np.uint8).data


def _squared_errors(rows: np.ndarray, written: np.ndarray) -> np.ndarray:
    """Mean over the pixels of each frame [n]."""
    errors = rows.astype(np.float32) - written.astype(np.float32)
    return np.asarray(np.einsum("nhwc,nhwc->n", errors, errors, dtype=np.float64) / errors[0].size)


def _decibel(mean_square: float) -> float:
    return math.inf if mean_square == 0 else 10 * math.log10(255**2 / mean_square)


def _place(rows: np.ndarray, written: np.ndarray, first: int) -> str:
    different = (rows != written).reshape(len(rows), -1).any(axis=1)
    return f"row {first + int(np.argmax(different))}: convert again"
