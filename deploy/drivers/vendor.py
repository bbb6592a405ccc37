"""What drivers share: libraries that may be missing, calls that may hang, numbers that may be none, foreign clocks."""

from __future__ import annotations

import contextlib
import importlib
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from action_diffusion.errors import InputError


def library(module: str, extra: str, then: str = "") -> ModuleType:
    """The vendor's `module`. Raises `InputError` with what to install where it cannot be imported.

    extra: of this package, that brings it; `then`: what has to be run besides.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        more = f" && {then}" if then else ""
        raise InputError(
            f"{module} cannot be imported ({error}): pip install 'action-diffusion[{extra}]'{more}"
        ) from error


def attempt(call: Callable[[], object], seconds: float = 1.0) -> bool:
    """Whether `call` came back without an error within `seconds`: for stopping and closing, which go on regardless.

    One that hangs is left behind in its thread.
    """
    worked = threading.Event()

    def work() -> None:
        try:
            call()
        except Exception:  # that it did not work is all there is to know
            return
        worked.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return worked.is_set()


def numbers(values: Sequence[float], size: int, what: str) -> np.ndarray:
    """`values` as float64 [size]. Raises `ArithmeticError` for another size, NaN and infinity."""
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (size,) or not np.isfinite(array).all():
        raise ArithmeticError(f"{what}: {size} finite numbers were expected, got {array.tolist()}")
    return array


def one_line(error: BaseException) -> str:
    """What a vendor's library says, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def above_zero(where: str, **values: float) -> None:
    """Raises `InputError` for a value that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise InputError(f"{where}: {name}={value} must be above 0")


def sockets() -> dict[int, int]:
    """Sockets of this process, a library's too: descriptor → inode. None where the system has no /proc."""
    folder, found = Path("/proc/self/fd"), {}
    for path in folder.iterdir() if folder.exists() else ():
        with contextlib.suppress(OSError):  # the folder's own, which is closed again
            status = os.stat(path)
            if stat.S_ISSOCK(status.st_mode):
                found[int(path.name)] = status.st_ino
    return found


def same_sockets(known: Mapping[int, int]) -> bool:
    """Whether these `sockets` are still the same ones, so that a library has not silently connected anew."""
    try:
        return all(os.fstat(number).st_ino == inode for number, inode in known.items())
    except OSError:
        return False


class RemoteClock:
    """Our monotonic time (s) of what another machine has stamped by its own clock.

        arrival − stamp = difference of the clocks + time on the way

    The smallest of the last `window` s is that of the message that was quickest: its time on the way is what remains
    unknown, and is part of the latency that calibration finds. The window lets the clocks drift apart.
    """

    def __init__(self, window: float = 10.0) -> None:
        self._window = window
        self._least: deque[tuple[float, float]] = deque()  # (arrival, arrival − stamp), both ascending
        self._stamp, self._last = -np.inf, -np.inf

    def __call__(self, stamp: float, arrival: float) -> float:
        """When it was stamped, never after its `arrival` (s, monotonic), and never before an earlier answer."""
        if stamp < self._stamp:  # the other machine has begun anew
            self._least.clear()
        self._stamp = stamp
        while self._least and self._least[-1][1] >= arrival - stamp:
            self._least.pop()
        self._least.append((arrival, arrival - stamp))
        while self._least[0][0] < arrival - self._window:
            self._least.popleft()
        self._last = max(self._last, min(arrival, stamp + self._least[0][1]))
        return float(self._last)
