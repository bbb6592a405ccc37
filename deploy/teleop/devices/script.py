"""Targets from a file or a pipe: demonstrations that a program gives, without a screen and without anybody.

    start                 words are orders: start, keep, discard, undo, finish
    256 300               numbers are the command of the next control step, in the data's units
    keep

A line a control step; lines that are empty or begin with # are left out. A simulator waits for the next line, and the
end is a finish.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TextIO

import numpy as np

from action_diffusion.deploy.teleop.devices.device import Ask, Signals
from action_diffusion.errors import InputError


class Script:
    """See `device.Device`.

    Args:
        path: a file; "-": what is piped in.
    """

    help = "a script drives"

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: TextIO | None = None
        self._line = 0

    def connect(self) -> None:
        if self._path == "-":
            self._file = sys.stdin
            return
        try:
            self._file = Path(self._path).expanduser().open(encoding="utf-8")
        except OSError as error:
            raise InputError(f"script={self._path}: {error.strerror}") from None

    def poll(self) -> Signals:
        """Waits for the next line of numbers. Raises `InputError` for a line that is neither an order nor numbers."""
        assert self._file is not None
        for line in self._file:
            self._line += 1
            words = line.split("#")[0].split()
            if not words:
                continue
            if words[0].isalpha() and words[0] not in ("nan", "inf"):
                return Signals(engaged=False, why="the script gives an order", orders=(self._order(words),))
            return Signals(target=self._numbers(words))
        return Signals(engaged=False, why="the script is over", orders=(Ask.FINISH,))

    def _order(self, words: list[str]) -> Ask:
        try:
            (word,) = words
            return Ask[word.upper()]
        except (KeyError, ValueError):
            names = ", ".join(order.name.lower() for order in Ask)
            raise InputError(f"script, line {self._line}: {' '.join(words)!r} is none of {names}") from None

    def _numbers(self, words: list[str]) -> np.ndarray:
        try:
            return np.array([float(word) for word in words])
        except ValueError:
            raise InputError(f"script, line {self._line}: {' '.join(words)!r} is not numbers") from None

    def close(self) -> None:
        if self._file is not None and self._file is not sys.stdin:
            self._file.close()
