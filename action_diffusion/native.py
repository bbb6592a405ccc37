"""Code in C, compiled when the package was installed, where there was a C compiler.

Without it everything runs as well, more slowly: whoever calls it has another way.
"""

from __future__ import annotations

import ctypes
import os
import sysconfig
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from action_diffusion.errors import unknown

SETS = "portable", "avx2", "avx512", "neon"
SET_VARIABLE = "ACTION_DIFFUSION_ISA"
"""Names the last of the instruction sets `SETS` that code may use, to have here what runs on another processor."""


class Library:
    """Functions of a file in C. Their last argument is the number of threads.

    OpenMP's threads are shared with torch where its library is the system's (`libgomp.so.1`), as in torch's wheels.
    """

    def __init__(self, path: Path) -> None:
        self.code = ctypes.CDLL(str(path))

    @property
    def instruction_set(self) -> str:
        """Which of `SETS` it uses."""
        self.code.instruction_set.restype = ctypes.c_char_p
        result: str = self.code.instruction_set().decode()
        return result

    def __call__(self, name: str, *values: Tensor | np.ndarray | int | None) -> None:
        """Arrays are given as pointers, numbers as int64. Nothing is checked."""
        getattr(self.code, name)(*map(_argument, values), ctypes.c_int(torch.get_num_threads()))


def load(folder: Path, name: str, abi: int) -> Library | None:
    """The compiled `name` in `folder`; None where there is none for this Python, or, with a warning, another `abi`.

    Raises `InputError` where the environment names an instruction set that does not exist.
    """
    if (most := os.environ.get(SET_VARIABLE)) and most not in SETS:
        raise unknown("instruction set", most, SETS, SET_VARIABLE)
    path = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.exists():
        return None
    try:
        library = Library(path)
        if library.code.abi() == abi:
            return library
    except (OSError, AttributeError):
        pass
    warnings.warn(f"{path.name} is of another version, and torch does its work: pip install again", stacklevel=2)
    return None


def libraries() -> list[Path]:
    """The compiled files of this package."""
    folder, suffix = Path(__file__).resolve().parent, sysconfig.get_config_var("EXT_SUFFIX")
    roots = (folder, folder.parent)  # as installed, and in a checkout
    places = [root / name for root in roots for name in ("policy/kernels", "datasets")]
    return sorted(path for place in places if place.is_dir() for path in place.glob(f"_*{suffix}"))


def traced() -> bool:
    """Whether torch only looks at what is computed now: it traces, compiles or transforms."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined, no-untyped-call]


def computes(x: Tensor) -> bool:
    """Whether x is in this CPU's memory, to be computed with now: not traced, compiled, transformed or cast."""
    return x.is_cpu and not traced() and not torch.is_autocast_enabled("cpu")


def _argument(value: Tensor | np.ndarray | int | None) -> ctypes.c_void_p | ctypes.c_int64:
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    return ctypes.c_void_p(None if value is None else value.data_ptr())
