"""The side of a worker: orders in as lines of JSON, answers out, until the input ends.

    {"order": "prepare", "work": "chunk", "settings": {…}, "folder": "…"}   →  {"least": 1, "units": 1, "note": ""}
    {"order": "check", "file": "…"}                                         →  {}, and outputs in that safetensors file
    {"order": "time", "calls": 3}                                           →  {"seconds": 0.41}
    {"order": "release"}   {"order": "about"}                               →  {}   {"torch": "2.10.0", …}

While it works it may say {"progress": "…"}; what goes wrong is {"error": "…"}. Between two orders it only waits for
the next line, so that it costs nothing while another worker is timed.

The lerobot worker imports this file in an environment of its own: nothing but the standard library, torch and
safetensors here.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import save_file

Say = Callable[[str], None]


class Work:
    """One thing to measure, ready to be done again and again.

    least: calls of a turn below which its time says nothing. units: what a call counts for (samples of a batch), or 1
    where its time is what counts. note: what a reader of the result should know. clock: seconds; of the processor where
    a single thread does all, so that other programs' turns on it do not count.
    """

    least = 1
    units = 1
    note = ""
    clock = staticmethod(time.perf_counter)

    def outputs(self) -> dict[str, torch.Tensor]:
        """What is compared with the other side's before anything is timed, by name."""
        return {}

    def call(self) -> None:
        """Do it once."""
        raise NotImplementedError

    def time(self, calls: int) -> float:
        """Seconds that `calls` calls take."""
        began = self.clock()
        for _ in range(calls):
            self.call()
        return self.clock() - began

    def close(self) -> None:
        """Let go of what the garbage collector does not (processes, simulators)."""


Makers = Mapping[str, Callable[[dict[str, Any], Path, Say], Work]]
"""Name of a work → what makes it from the settings of a row, the row's folder, and a way to say how far it is."""


def serve(makers: Makers, about: Callable[[], dict[str, Any]]) -> None:
    """Answer orders on standard output until standard input ends; anything else that is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = _Worker(makers, about, lambda text: _tell(answers, {"progress": text}))
    for line in sys.stdin:
        try:
            answer = worker.obey(json.loads(line))
        except Exception as error:  # whatever went wrong, the other rows can still be measured
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        _tell(answers, answer)
    worker.release()


class _Worker:
    def __init__(self, makers: Makers, about: Callable[[], dict[str, Any]], say: Say) -> None:
        self._makers, self._about, self._say = makers, about, say
        self._work: Work | None = None

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        kind = order["order"]
        if kind == "about":
            return self._about()
        if kind == "release":
            self.release()
            return {}
        if kind == "prepare":
            self.release()
            work = self._makers[order["work"]](order["settings"], Path(order["folder"]), self._say)
            self._work = work
            return {"least": work.least, "units": work.units, "note": work.note}
        assert self._work is not None, "nothing is prepared"
        if kind == "check":
            outputs = self._work.outputs()
            save_file({name: value.detach().contiguous() for name, value in outputs.items()}, order["file"])
            return {}
        assert kind == "time", kind
        gc.disable()  # a collection in the middle of a turn is noise
        try:
            return {"seconds": self._work.time(order["calls"])}
        finally:
            gc.enable()

    def release(self) -> None:
        if self._work is not None:
            self._work.close()
        self._work = None
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # gigabytes of weights, which the next row may need


def instructions() -> str:
    """The widest of the processor's vector instructions that torch uses in this process: avx512, avx2, …"""
    return torch.backends.cpu.get_cpu_capability().lower()


def _tell(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
