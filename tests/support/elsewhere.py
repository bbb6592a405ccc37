"""What tests have done in other processes, which find it by this name."""

from __future__ import annotations

import os

import numpy as np


def square(x: int) -> tuple[int, int]:
    return x * x, os.getpid()


def fail_at_three(x: int) -> int:
    if x == 3:
        raise ValueError("three")
    return x


def picture(states: np.ndarray) -> np.ndarray:
    """[n, S] → uint8 [n, 2, 2, 3]"""
    return np.broadcast_to(states[:, 0].astype(np.uint8)[:, None, None, None], (len(states), 2, 2, 3)).copy()
