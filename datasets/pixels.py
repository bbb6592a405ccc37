"""Pixels cut out of frames, and made floats: in C (`pixels.c`) where it was compiled, else by numpy and torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from action_diffusion import native


@cache
def library() -> native.Library | None:
    """The compiled code, where there is any."""
    return native.load(Path(__file__).parent, "_pixels", 2)


def crop(
    frames: np.ndarray, rows: np.ndarray, corners: np.ndarray, size: tuple[int, int], floats: Tensor | None = None
) -> Tensor:
    """`size` (h, w) out of the frames `rows` int64 [B, S], from `corners` int64 [B, 2] (top, left) on: [B, S, h, w, 3].

    frames: uint8 [N, H, W, 3]. Rows and corners must be inside: nothing checks them here. floats: float32 of that
    shape, to be filled with what `to_float` makes of them, and returned, in one pass over memory.
    Raises `ValueError` for frames or floats of another type, or that do not lie one after the other in memory.
    """
    if frames.dtype != np.uint8 or not frames.flags.c_contiguous:
        raise ValueError("frames must be uint8 in one piece of memory")
    if floats is not None and not (floats.shape == (*rows.shape, *size, frames.shape[3]) and _is_plain(floats)):
        raise ValueError("floats must be float32 in one piece of memory, of the crops' shape")
    n, height, width, channels = frames.shape
    code = library()
    if code is not None:
        rows, corners = np.ascontiguousarray(rows, np.int64), np.ascontiguousarray(corners, np.int64)
        shape = (*rows.shape, *size, channels)
        out = torch.empty(shape, dtype=torch.uint8, device="cpu") if floats is None else floats
        places = (out, None) if floats is None else (None, out)
        code("crop", frames, height, width, channels, rows, corners, *rows.shape, *size, *places)
        return out
    room = height - size[0], width - size[1]
    view = (n, room[0] + 1, room[1] + 1, size[0], size[1] * channels)
    strides = (height * width * channels, width * channels, channels, width * channels, 1)
    cuts = np.lib.stride_tricks.as_strided(frames, view, strides, writeable=False)
    cut = torch.from_numpy(cuts[rows, corners[:, :1], corners[:, 1:]].reshape(*rows.shape, *size, channels))
    return cut if floats is None else to_float(cut, floats)


def to_float(pixels: Tensor, out: Tensor | None = None) -> Tensor:
    """uint8 of any shape, 0 to 255, as float32 of the same, 0 to 1; written into `out` if it is given."""
    floats = torch.empty_like(pixels, dtype=torch.float32) if out is None else out
    code = library() if native.computes(pixels) else None
    if code is not None and pixels.dtype == torch.uint8 and pixels.is_contiguous() and _is_plain(floats):
        code("scale", pixels, pixels.numel(), floats)
        return floats
    return floats.copy_(pixels).mul_(1 / 255)


def _is_plain(floats: Tensor) -> bool:
    return floats.is_cpu and floats.dtype == torch.float32 and floats.is_contiguous()
