"""Ctrl-C that saves: the first asks the loop to stop, the second interrupts at once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


class Interrupted(Exception):
    """Ctrl-C (or a termination signal): the run was saved at `step`."""

    def __init__(self, step: int):
        super().__init__(f"interrupted at step {step}")
        self.step = step


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether a stop was asked for, by SIGINT or SIGTERM."""
    asked = False

    def request(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, before[signal.Signals(number)])

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, request)
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        pass
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
