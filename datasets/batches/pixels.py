"""Pixels cut out of frames, and made floats: in C (`pixels.c`) where that is faster here, else by numpy and torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from action_diffusion import choice, native

OURS = ("one_pass",)
Pixels = TypeVar("Pixels", np.ndarray, Tensor)


@cache
def library() -> native.Library | None:
    """The compiled code, where there is any."""
    return native.load(Path(__file__).parent, "_pixels", 3)


def crop(frames: np.ndarray, rows: np.ndarray, corners: np.ndarray, size: tuple[int, int]) -> Tensor:
    """`size` (h, w) out of the frames `rows` int64 [B, S], from `corners` int64 [B, 2] (top, left) on: [B, S, h, w, 3].

    frames: uint8 [N, H, W, 3]. Rows and corners must be inside: nothing checks them here.
    Raises `ValueError` for frames of another type, or that do not lie one after the other in memory.
    """
    if frames.dtype != np.uint8 or not frames.flags.c_contiguous:
        raise ValueError("frames must be uint8 in one piece of memory")
    if library() is None:
        return torch.from_numpy(cut(frames, rows, corners, size))
    ways = {
        "numpy": lambda: torch.from_numpy(cut(frames, rows, corners, size)),
        "one_pass": lambda: _crop(frames, rows, corners, size),
    }
    return ways[choice.fastest("crop", (_rounded(rows.size), *size, frames.shape[3]), ways, OURS)]()


def _crop(frames: np.ndarray, rows: np.ndarray, corners: np.ndarray, size: tuple[int, int]) -> Tensor:
    code = library()
    assert code is not None
    _, height, width, channels = frames.shape
    rows, corners = np.ascontiguousarray(rows, np.int64), np.ascontiguousarray(corners, np.int64)
    out = torch.empty((*rows.shape, *size, channels), dtype=torch.uint8, device="cpu")
    code("crop", frames, height, width, channels, rows, corners, *rows.shape, *size, out)
    return out


def cut(frames: Pixels, rows: Pixels, corners: Pixels, size: tuple[int, int]) -> Pixels:
    """What `crop` does, without code of our own and on any device; a tensor's frames may be of any type.

    One indexing operation, whatever B is, of an overlapping view of all the places where a crop can be.
    """
    n, height, width, channels = frames.shape
    places = (n, height - size[0] + 1, width - size[1] + 1, size[0], size[1] * channels)
    strides = (height * width * channels, width * channels, channels, width * channels, 1)
    if isinstance(frames, Tensor):
        view = frames.as_strided(places, strides)
    else:
        view = np.lib.stride_tricks.as_strided(frames, places, strides, writeable=False)  # uint8: a byte an element
    cuts: Pixels = view[rows, corners[:, :1], corners[:, 1:]].reshape(*rows.shape, *size, channels)
    return cuts


def to_float(pixels: Tensor) -> Tensor:
    """uint8 of any shape, 0 to 255, as float32 of the same, 0 to 1."""
    fits = native.computes(pixels) and pixels.dtype == torch.uint8 and pixels.is_contiguous() and pixels.numel() > 0
    if not fits or library() is None:
        return _torch_floats(pixels)
    ways = {"torch": lambda: _torch_floats(pixels), "one_pass": lambda: _floats(pixels)}
    return ways[choice.fastest("pixels_to_float", (_rounded(pixels.numel()),), ways, OURS)]()


def _floats(pixels: Tensor) -> Tensor:
    code = library()
    assert code is not None
    floats = torch.empty_like(pixels, dtype=torch.float32)
    code("scale", pixels, pixels.numel(), floats)
    return floats


def _torch_floats(pixels: Tensor) -> Tensor:
    return pixels.to(torch.float32).mul_(1 / 255)


def _rounded(n: int) -> int:
    """Up to a power of two: sizes that are measured together."""
    return 1 << max(0, n - 1).bit_length()
