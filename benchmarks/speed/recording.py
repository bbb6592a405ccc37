"""Try to spoil a recording of two cameras of 320×240 at 30 Hz, and measure whether it keeps up.

    python -m benchmarks.speed.recording kills=200        kill -9 the recorder at random moments
    python -m benchmarks.speed.recording cuts=5000        cut the power at random moments, on paper (`robustness.power`)
    python -m benchmarks.speed.recording seconds=60       the share of steps that come more than 5 ms late

Every second file has its images as video. After a kill the file must open at once, have every episode that was
committed, as it was, and of the open one all but the last second. Steps are counted as late when `add` has returned
more than 5 ms after they were due, without a recorder (so late is the machine), raw, and as video, for `seconds` each.
`seed=N` gives other moments. Exit code: 0, 1 where something was lost or more than 0.1 % of steps were late, 2 for bad
input.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.record.recorder import Recorder
from benchmarks.command import command, options, positive, whole
from benchmarks.robustness import power_cuts
from benchmarks.robustness.recording_kills import ATTRS, CAMERAS, FIELDS, HZ, KilledRecording, pictures, step

LATE = 0.005
MOST_LATE = 0.001
_EPISODE = 10.0


def lateness(add: Callable[[dict[str, np.ndarray]], object], keep: Callable[[], object], seconds: float) -> np.ndarray:
    """How much later (s) than due each step was done, [N], in a loop at 30 Hz with episodes of 10 s."""
    late = []
    for first in np.arange(0.0, seconds, _EPISODE):
        due = time.monotonic() + 0.1
        for number in range(int(min(_EPISODE, seconds - first) * HZ)):
            row = step(number)  # cameras have their own processes
            time.sleep(max(0.0, due - time.monotonic()))
            add(row)
            late.append(time.monotonic() - due)
            due += 1 / HZ
        keep()
    return np.asarray(late)


def measure(seconds: float) -> Iterator[tuple[str, np.ndarray, float]]:
    """(what was recorded how, lateness of each step (s), the longest that `keep` took (s))."""
    pictures()
    for name, video in (("no recorder", None), ("raw", ()), ("video", CAMERAS)):
        kept: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.zarr"
            with Recorder.open(path, FIELDS, ATTRS, video=video) if video is not None else nullcontext() as recorder:
                yield name, lateness(*_doing(recorder, kept), seconds), max(kept, default=0.0)


def _doing(recorder: Recorder | None, kept: list[float]) -> tuple[Callable[[Any], object], Callable[[], object]]:
    def keep() -> None:
        started = time.monotonic()
        recorder.keep() if recorder else None
        kept.append(time.monotonic() - started)

    return (recorder.add if recorder else lambda row: None), keep


def _late(seconds: float) -> int:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    bad = False
    for name, late, kept in measure(seconds):
        share = float((late > LATE).mean())
        bad |= share > MOST_LATE and name != "no recorder"
        at = f"99.9th percentile {1e3 * np.percentile(late, 99.9):.1f} ms, most {1e3 * late.max():.1f} ms"
        print(f"{name}: {share:.3%} of {len(late)} steps late ({at}), keep took {kept:.2f} s at most", flush=True)
    return int(bad)


def _kills(n: int, seed: int) -> int:
    random, good = np.random.default_rng(seed), 0
    lost, opened = [0.0], [0.0]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(n):
            if number % 5 == 0:  # what was killed is recorded to again
                recording = KilledRecording(Path(folder) / f"{number}.zarr", CAMERAS if number // 5 % 2 else ())
            found = recording.run(wait=random.uniform(0.2, 5.0), seed=int(random.integers(1 << 30)))
            good += found.wrong is None
            lost.append(found.lost)
            opened.append(found.open_seconds)
            print(f"{number + 1}: {found}", flush=True)
    print(
        f"{good} of {n} without loss; of open episodes {max(lost):.2f} s at most; {max(opened):.2f} s to open at most"
    )
    return int(good < n)


def _cuts(n: int, seed: int) -> int:
    good = 0
    for video in (False, True):
        for at, kind, wrong in power_cuts.run(n // 2 + (n % 2 and not video), seed, video):
            good += wrong is None
            if wrong is not None:
                print(
                    f"{'video' if video else 'raw'}, after deed {at}, of the rest {kind} happened: {wrong}", flush=True
                )
    print(f"{good} of {n} without loss")
    return int(good < n)


@command
def main(words: Sequence[str]) -> int:
    """See the module."""
    given = options(words, {"kills": "0", "cuts": "0", "seconds": "", "seed": "0"})
    seed, code = whole("seed", given["seed"], least=0), 0
    for name, try_ in (("kills", _kills), ("cuts", _cuts)):
        n = whole(name, given[name], least=0)
        code |= try_(n, seed) if n else 0
    if given["seconds"] or not words:
        code |= _late(positive("seconds", given["seconds"] or "60"))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
