"""A recorder that is killed, and a look at what it leaves. See `benchmarks.speed.recording`."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from action_diffusion.datasets.record.recorder import Recorder
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError

HZ = 30.0
CAMERAS = ("front", "wrist")
FIELDS = {**dict.fromkeys(CAMERAS, ("u1", (240, 320, 3))), "state": ("f8", (7,)), "action": ("f4", (7,))}
ATTRS = {"control_rate": HZ}
MOST_LOST = 1.0
_N_PICTURES, _BIT, _N_BITS = 64, 16, 20
Episodes = list[tuple[int, ...]]


@functools.cache
def pictures() -> np.ndarray:
    """What cameras see [64, 240, 320, 3]: shapes that move over a gradient, and the noise of a sensor."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:240, :320]
    ground = np.stack([x * 0.6, y * 0.8, 255 - x * 0.5], -1)
    found = np.empty((_N_PICTURES, 240, 320, 3), np.uint8)
    for number in range(_N_PICTURES):
        picture = ground + random.normal(0, 2, ground.shape)
        angle = 2 * np.pi * number / _N_PICTURES
        inside = (x - 160 - 80 * np.cos(angle)) ** 2 + (y - 120 - 50 * np.sin(angle)) ** 2 < 900
        picture[inside] = (200, 30, 40)
        found[number] = picture.clip(0, 255)
    return found


def step(number: int) -> dict[str, np.ndarray]:
    """Step `number`, which can be told from all others by each of its values: pictures have it in bars."""
    bits = (number >> np.arange(_N_BITS) & 1).astype(np.uint8) * 255
    row = {"state": np.full(7, float(number)), "action": np.full(7, number, np.float32)}
    for index, camera in enumerate(CAMERAS):
        picture = pictures()[(number + 20 * index) % _N_PICTURES].copy()
        picture[:_BIT] = np.repeat(bits, _BIT)[None, :, None]
        row[camera] = picture
    return row


def record(path: str, video: str, seed: str) -> None:
    """Record at 30 Hz for ever, in a process of its own, and print each deed before it is done, and "done" after it."""
    random, number = np.random.default_rng(int(seed)), int(seed) % (1 << 19)
    pictures()
    with Recorder.open(path, FIELDS, ATTRS, video=[camera for camera in video.split(",") if camera]) as recorder:
        print("ready", flush=True)
        while True:
            due = time.monotonic()
            for _ in range(random.integers(5, 60)):
                time.sleep(max(0.0, due - time.monotonic()))
                recorder.add(step(number))
                print(f"+ {number}", flush=True)
                number, due = number + 1, due + 1 / HZ
            deed = str(random.choice(["keep", "keep", "keep", "discard", "undo"]))
            for part in [deed] if deed != "undo" else ["discard", *["undo"] * (recorder.n_episodes > 0)]:
                print(part, flush=True)
                getattr(recorder, part)()
                print("done", flush=True)


@dataclass(frozen=True)
class AfterKill:
    """After a kill: what is wrong, seconds of the open episode that were lost, and seconds that opening took."""

    wrong: str | None
    lost: float
    open_seconds: float
    n_episodes: int

    def __str__(self) -> str:
        said = self.wrong or f"{self.n_episodes} episodes intact"
        return f"{said}, {self.lost:.2f} s of the open one lost, opened in {1e3 * self.open_seconds:.0f} ms"


@dataclass
class KilledRecording:
    """A file that is recorded to and killed, again and again. `episodes` are those that must be there."""

    path: Path
    video: tuple[str, ...]
    episodes: Episodes = field(default_factory=list)

    def run(self, *, wait: float, seed: int) -> AfterKill:
        """Record for `wait` seconds, kill, look, and keep what was open."""
        call = "import sys; from benchmarks.robustness.recording_kills import record; record(*sys.argv[1:])"
        words = [sys.executable, "-c", call, str(self.path), ",".join(self.video), str(seed)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env) as process:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                return AfterKill("it did not start", 0.0, 0.0, 0)
            time.sleep(wait)
            process.kill()
            said = process.stdout.read().split("\n")[:-1]
        possible, added, is_dropped = self._possible(said)
        try:
            return self._look(possible, added, is_dropped)
        except Exception as error:  # whatever it is, the file is spoiled
            return AfterKill(f"{type(error).__name__}: {error}", 0.0, 0.0, 0)

    def _possible(self, said: list[str]) -> tuple[list[Episodes], tuple[int, ...], bool]:
        """What the file may hold, without the deed under way and with it; the open episode, and if it is dropped."""
        episodes, added, under_way = list(self.episodes), [], ""
        for line in said:
            if line.startswith("+"):
                added.append(int(line[2:]))
            elif line == "done":
                episodes, added, under_way = _after(under_way, episodes, added), [], ""
            else:
                under_way = line
        return [episodes, _after(under_way, episodes, added)], tuple(added), under_way == "discard"

    def _look(self, possible: list[Episodes], added: tuple[int, ...], is_dropped: bool) -> AfterKill:
        started = time.monotonic()
        buffer = opened(self.path)
        seconds = time.monotonic() - started
        there = [numbers(buffer, index) for index in range(buffer.n_episodes)] if buffer else []
        if there not in possible:
            return AfterKill(f"it has {there}, not {possible[0]} or {possible[1]}", 0.0, seconds, len(there))
        left = 0 if there == possible[0] else len(added)  # what was under way was done
        with Recorder.open(self.path, FIELDS, ATTRS, video=self.video) as recorder:
            if there == possible[0] and recorder.n_steps:
                left = recorder.n_steps
                recorder.keep()
                there.append(tuple(range(added[0], added[0] + left)))
        self.episodes = there
        buffer = opened(self.path)
        if there and (buffer is None or numbers(buffer, -1) != there[-1] or buffer.n_episodes != len(there)):
            return AfterKill(f"the open episode is not {there[-1]}", 0.0, seconds, len(there))
        lost = 0.0 if is_dropped else max(0, len(added) - left) / HZ
        return AfterKill(f"{lost:.2f} s were lost" if lost > MOST_LOST else None, lost, seconds, len(there))


def opened(path: Path) -> ReplayBuffer | None:
    """The buffer at `path`; None where it has no episode yet, or has gone because it was closed without one."""
    if not path.exists():
        return None
    try:
        return ReplayBuffer.open(path)
    except InputError as error:
        if "holds no episodes" in str(error):
            return None
        raise


def numbers(buffer: ReplayBuffer, index: int) -> tuple[int, ...]:
    """The steps of an episode. Raises `ValueError` where a value is not that of its step."""
    rows = buffer.episode(index)
    found = tuple(int(state) for state in rows["state"][:, 0])
    for row, number in enumerate(found):
        for key, value in step(number).items():
            is_same = np.array_equal(rows[key][row], value)
            if not is_same and not (key in CAMERAS and _close(rows[key][row], value)):
                raise ValueError(f"episode {index}, step {row}: {key} is not what was recorded")
    return found


def _close(picture: np.ndarray, original: np.ndarray) -> bool:
    """As video keeps it: the same bars, and elsewhere about the same colours."""
    bars = np.abs(picture[4 : _BIT - 4, _BIT // 2 :: _BIT].astype(int) - original[4 : _BIT - 4, _BIT // 2 :: _BIT])
    return bool(bars.max() < 60 and np.abs(picture.astype(int) - original).mean() < 4)


def _after(deed: str, episodes: Episodes, added: list[int]) -> Episodes:
    if deed == "keep":
        return [*episodes, tuple(added)]
    return episodes[:-1] if deed == "undo" else episodes
