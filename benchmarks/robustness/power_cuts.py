"""Record while every call of the system is noted, cut the power after any of them, and look at what is left.

See `benchmarks.speed.recording cuts=N`.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.record.writer import EpisodeWriter
from benchmarks.robustness.power import KINDS, Log, cut, watched
from benchmarks.robustness.recording_kills import opened

FIELDS = {"image": ("u1", (48, 48, 3)), "state": ("f4", (3000,))}
"""With chunks of some steps, so that a few episodes have several."""
ATTRS = {"control_rate": 10.0}
Episodes = list[tuple[int, ...]]
DEEDS = ("keep", "keep", "discard", "undo", "keep", "reopen", "keep", "keep", "undo", "leave", "keep")


@dataclass(frozen=True)
class Promise:
    """From deed number `since` on: the committed episodes, and the steps of the open one that were flushed."""

    since: int
    episodes: Episodes
    flushed: tuple[int, ...] = ()


@functools.cache
def step(number: int) -> dict[str, np.ndarray]:
    image = np.full((48, 48, 3), number % 83 * 3, np.uint8)
    state = np.random.default_rng(number).random(3000, np.float32)
    state[0] = number
    return {"image": image, "state": state}


def session(root: Path, video: bool) -> tuple[Log, list[Promise]]:
    """Record some episodes to `root`/a.zarr. Returns what was done, and what had been promised when."""
    random, videos, number = np.random.default_rng(0), ["image"] if video else [], 0
    episodes: Episodes = []
    with watched(root) as log:
        promises = [Promise(0, [])]
        writer = EpisodeWriter(root / "a.zarr", FIELDS, ATTRS, videos)

        def promise(flushed: tuple[int, ...] = ()) -> None:
            promises.append(Promise(len(log.deeds), list(episodes), flushed))

        for deed in DEEDS:
            added: tuple[int, ...] = ()
            for _ in range(random.integers(2, 30)):
                writer.add(step(number))
                added, number = (*added, number), number + 1
                if number % 5 == 0:
                    writer.flush()
                    promise(added[:-1] if video else added)
            if deed in ("keep", "leave"):
                if deed == "leave":
                    writer.close()
                    promise(added)
                    writer = EpisodeWriter(root / "a.zarr", FIELDS, ATTRS, videos)
                promises.append(Promise(len(log.deeds), list(episodes)))  # while it commits, this or the next is there
                writer.keep()
                episodes.append(added)
            else:
                promise()
                writer.discard()
            promise()
            if deed == "undo":
                writer.undo()
                episodes.pop()
                promise()
            if deed == "reopen":
                writer.close()
                writer = EpisodeWriter(root / "a.zarr", FIELDS, ATTRS, videos)
        writer.close()
        promise()
    return log, promises


def run(count: int, seed: int, video: bool) -> Iterator[tuple[int, str, str | None]]:
    """`count` cuts: (deed after which the power went, of `KINDS`, what is wrong or None).

    Every other one is shortly before something is promised.
    """
    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "root"
        root.mkdir()
        log, promises = session(root, video)
        for number in range(count):
            n = int(random.integers(len(log.deeds) + 1))
            if number % 2:
                n = max(0, promises[random.integers(len(promises))].since - int(random.integers(8)))
            kind = str(random.choice(list(KINDS)))
            yield n, kind, trial(log, promises, n, kind, random=random, folder=Path(name), video=video)


def trial(
    log: Log, promises: list[Promise], n: int, kind: str, *, random: Any, folder: Path, video: bool
) -> str | None:
    """Cut the power after deed `n`; returns what is wrong with what is left, or None."""
    at = max(i for i, promise in enumerate(promises) if promise.since <= n)
    before, after = promises[at], promises[min(at + 1, len(promises) - 1)]
    remains = folder / "remains"
    shutil.rmtree(remains, ignore_errors=True)
    log.cut(n, remains, cut(kind, random))
    try:
        if not (remains / "a.zarr").exists():
            return "the buffer is not there" if before.episodes or before.flushed else None
        return _look(remains / "a.zarr", before, after, ["image"] if video else [])
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _look(path: Path, before: Promise, after: Promise, videos: list[str]) -> str | None:
    there = _episodes(path)
    if there not in (before.episodes, after.episodes):
        return f"it has {there}, not {before.episodes} or {after.episodes}"
    writer = EpisodeWriter(path, FIELDS, ATTRS, videos)
    n_steps = writer.n_steps
    if n_steps < len(before.flushed) and after.flushed[: len(before.flushed)] == before.flushed:
        return f"{n_steps} steps of the open episode are left, {len(before.flushed)} had been flushed"
    if n_steps:
        writer.keep()
        with_open = _episodes(path)
        if with_open[:-1] != there or len(with_open[-1]) != n_steps:
            return f"with its open episode it has {with_open}, not {there} and {n_steps} steps"
    return None


def _episodes(path: Path) -> Episodes:
    """The steps that the buffer at `path` has; raises where images and states do not agree on that."""
    buffer, episodes = opened(path), []
    if buffer is None:
        return []
    for index in range(buffer.n_episodes):
        rows = buffer.episode(index)
        numbers = tuple(_number(state) for state in rows["state"])
        images = np.stack([step(number)["image"] for number in numbers])
        if np.abs(rows["image"].astype(int) - images).max() > 1:
            raise ValueError(f"images and states of episode {index} do not agree")
        episodes.append(numbers)
    return episodes


def _number(state: np.ndarray) -> int:
    number = int(state[0])
    if not np.array_equal(state, step(number)["state"]):
        raise ValueError("a state is none that was recorded")
    return number
