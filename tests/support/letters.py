"""A text encoder for tests: how often each letter is there, as a vector of length 1."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from action_diffusion.errors import InputError
from action_diffusion.registry import TEXT_ENCODERS


@TEXT_ENCODERS.register("letters")
class Letters:
    """asked: every sentence that was encoded, in order."""

    size = 26
    version: str | None = "letters 1"
    asked: ClassVar[list[str]] = []

    def __init__(self, *, case: bool = False) -> None:
        self._case = case

    def encode(self, sentence: str) -> np.ndarray:
        self.asked.append(sentence)
        counts = np.array([sentence.lower().count(chr(97 + i)) for i in range(26)], np.float32)
        if not counts.any():
            raise InputError(f"{sentence!r} has no letters")
        result: np.ndarray = counts / np.linalg.norm(counts)
        return result
