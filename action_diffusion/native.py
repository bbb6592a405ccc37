"""Code in C, compiled when the package was installed, where there was a C compiler.

Without it everything runs as well, more slowly: whoever calls it has another way.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class Library:
    """Functions of a file in C. Their last argument is the number of threads; they share OpenMP's with torch."""

    def __init__(self, path: Path) -> None:
        self.code = ctypes.CDLL(str(path))

    def __call__(self, name: str, *values: Tensor | np.ndarray | int | None) -> None:
        """Arrays are given as pointers, numbers as int64. Nothing is checked."""
        getattr(self.code, name)(*map(_argument, values), ctypes.c_int(torch.get_num_threads()))


def load(folder: Path, name: str) -> Library | None:
    """The compiled `name` in `folder`; None where there is none."""
    paths = sorted(folder.glob(f"{name}*.so"))
    return Library(paths[0]) if paths else None


def _argument(value: Tensor | np.ndarray | int | None) -> ctypes.c_void_p | ctypes.c_int64:
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    return ctypes.c_void_p(None if value is None else value.data_ptr())
