"""Keys of a terminal, which need no screen and come through SSH.

A terminal says when a key is pressed, and repeats it while it is held, but never says that it was let go. So a press
counts for 0.15 s, and repeats go on from there: one press is one nudge, and a held key nudges, waits as long as
the terminal's repeat takes to begin (0.2 to 0.5 s), and then moves steadily.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from typing import Any

from action_diffusion.deploy.teleop.devices.device import Signals
from action_diffusion.deploy.teleop.devices.keys import HELP, Keys
from action_diffusion.errors import InputError

DOWN = 0.15
"""How long (s) a press counts."""
SEQUENCES = {b"\x1b[A": "ArrowUp", b"\x1b[B": "ArrowDown", b"\x1b[C": "ArrowRight", b"\x1b[D": "ArrowLeft"}
NAMES = {"\r": "Enter", "\n": "Enter", "\x7f": "Backspace", "\x08": "Backspace"}


def is_there() -> bool:
    """Whether somebody sits at this process' terminal, and it is in the foreground."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return sys.stdin.isatty() and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    return False


class Terminal:
    """See `device.Device`. Ctrl-C stays what it is."""

    help = HELP

    def __init__(self) -> None:
        self._keys = Keys()
        self._before: list[Any] | None = None
        self._until: dict[str, float] = {}

    def connect(self) -> None:
        if not is_there():
            raise InputError("device=keyboard reads the keys of a terminal, and there is none: device=browser has keys")
        self._file = sys.stdin.fileno()
        self._before = termios.tcgetattr(self._file)
        tty.setcbreak(self._file)

    def poll(self) -> Signals:
        now = time.monotonic()
        pressed = self._read()
        for key in pressed:
            self._until[key] = now + DOWN
        down = [key for key, until in self._until.items() if until > now]
        return self._keys.signals(down, pressed)

    def _read(self) -> list[str]:
        """The keys pressed since the last time."""
        if not select.select([self._file], [], [], 0)[0]:
            return []
        return names(os.read(self._file, 4096))

    def close(self) -> None:
        if self._before is not None:
            termios.tcsetattr(self._file, termios.TCSADRAIN, self._before)
            self._before = None


def names(typed: bytes) -> list[str]:
    """Bytes of a terminal as names of keys; what has no name is its character, in lower case."""
    found: list[str] = []
    for sequence, name in SEQUENCES.items():
        typed = typed.replace(sequence, b"\x00" + name.encode() + b"\x00")
    for index, part in enumerate(typed.split(b"\x00")):
        if index % 2:
            found.append(part.decode())
        else:
            found += [NAMES.get(letter, letter.lower()) for letter in part.decode("utf-8", "ignore")]
    return found
