"""Demonstrations as columns: one row a step, episodes one after the other, on disk (Zarr) or in memory.

    data/state   | 0 1 2 3 4 | 5 6 7 | 8 9 ...        rows
    episodes     |     0     |   1   |  2
    episode_ends             5       8     ...        row after the last step of each

An append writes the rows first and `episode_ends` last, so that a process killed in between leaves the
earlier episodes readable. What it left behind is cut off by the next append.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore

from action_diffusion.datasets.storage.checks import (
    check_dtype,
    check_episode_ends,
    check_finite,
    check_key,
    check_lengths,
)
from action_diffusion.datasets.storage.objects import ObjectCache, is_url
from action_diffusion.datasets.storage.store import (
    Column,
    ZarrColumn,
    ZarrFile,
    array_at,
    create_array,
    open_zarr,
    reading,
    write_zarr,
)
from action_diffusion.datasets.storage.tasks import TASK, with_task
from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path, sync, writer_lock, writing

APPENDING = "appending"  # attribute of meta/ while there may be rows that episode_ends does not count yet
ASSUMED_RATE = 10.0
"""Rows a second (Hz) of a buffer that does not say it."""
ENDS = "meta/episode_ends"
DATA = "data/"
VIDEOS = "videos"  # attribute of a buffer with columns that are videos: key → {"shape": [H, W, 3], "rate": Hz}


class ReplayBuffer:
    """Columns of equal length with the rows at which episodes end.

    Made by `open`, `create` or `from_arrays`. `buffer[key]` has `shape` and `dtype`, and gives numpy arrays
    when indexed by rows, in the type they are stored in. `path` is None for a buffer in memory. `left_out`: what lies
    beside the columns in data/ and is none, with the reason. `name`: what messages call it, by default its path.
    `paths`: where its columns lie, by default at its path. `parts`: of buffers that were joined, how many episodes each
    has; () of one that was not. remote: its rows are in an object store.
    """

    def __init__(
        self,
        *,
        columns: Mapping[str, Column],
        episode_ends: np.ndarray,
        attrs: Mapping[str, Any],
        path: Path | None,
        left_out: Mapping[str, str] | None = None,
        name: str | None = None,
        paths: Sequence[Path] | None = None,
        parts: Sequence[int] = (),
        remote: bool = False,
    ) -> None:
        for key in columns:
            check_key(key, str(path or "a buffer in memory"))
        self._columns = dict(columns)
        self.episode_ends = episode_ends
        self.attrs = dict(attrs)
        self.path = path
        self.left_out = dict(left_out or {})
        self.name = name or (str(path) if path else "the buffer in memory")
        self.paths = tuple(([path] if path else []) if paths is None else paths)
        self.parts = tuple(parts)
        self.remote = remote

    @classmethod
    def open(cls, path: str | Path, cache: ObjectCache | None = None) -> ReplayBuffer:
        """The buffer at `path`: Zarr v2 or v3 (UMI's too), a folder or a zip, or a folder at s3://…, gs://… or
        https://…, by way of `cache`. Nothing is read but its description.

        Arrays in groups of data/ have the groups' names before theirs: data/obs/state is the column `obs.state`. Words,
        single values, and one value an episode are `left_out`.

        Raises `InputError` for a path that is missing or damaged, what `open_zarr` refuses, arrays of unequal length,
        and `episode_ends` that do not increase up to the last row.
        """
        remote = is_url(path)
        path = str(path) if remote else Path(path).expanduser()
        file = open_zarr(path, cache)
        where = str(path)
        ends, interrupted = _episode_ends(file)
        columns_at, left_out = _columns_at(file, ends)
        file.check(columns_at.values())
        n_rows = int(ends[-1])
        with reading(where):
            attrs: dict[str, Any] = dict(file.group.attrs)
        lengths = {key: file.infos[place].shape[0] for key, place in columns_at.items()}
        if lengths or VIDEOS not in attrs:
            check_lengths(lengths, n_rows, where, allow_longer=interrupted)
        columns: dict[str, Column] = {key: file.column(place, n_rows) for key, place in columns_at.items()}
        if VIDEOS in attrs and isinstance(path, str):
            raise InputError(f"{where} has videos, which are read from a disk only: fetch it")
        if isinstance(path, str):
            return cls(
                columns=columns, episode_ends=ends, attrs=attrs, path=None, left_out=left_out, name=where, remote=True
            )
        if VIDEOS in attrs:
            from action_diffusion.datasets.storage.video_column import video_columns  # which needs PyAV

            columns |= video_columns(path, attrs.pop(VIDEOS), ends)
        return cls(columns=columns, episode_ends=ends, attrs=attrs, path=path, left_out=left_out)

    @classmethod
    def create(cls, path: str | Path, *, attrs: Mapping[str, Any] | None = None) -> ReplayBuffer:
        """An empty buffer that will be a Zarr v3 folder at `path` from its first `append` on."""
        path = Path(path).expanduser()
        if path.exists():
            raise InputError(f"{path} exists: choose another path, or open it and append")
        if path.suffix == ".zip":
            raise InputError(f"{path}: a zip cannot grow: record into a folder, then save() it as a zip")
        return cls(columns={}, episode_ends=np.zeros(0, np.int64), attrs=attrs or {}, path=path)

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, np.ndarray],
        episode_ends: Sequence[int] | np.ndarray,
        attrs: Mapping[str, Any] | None = None,
    ) -> ReplayBuffer:
        """A buffer in memory of `arrays` [N, ...], checked as `open` does; the arrays are not copied."""
        ends = check_episode_ends(np.asarray(episode_ends), "arrays")
        columns = {key: np.asarray(array) for key, array in arrays.items()}
        for key, array in columns.items():
            check_dtype(array.dtype, key, "arrays")
        check_lengths({key: len(array) for key, array in columns.items()}, int(ends[-1]), "arrays")
        return cls(columns=columns, episode_ends=ends, attrs=attrs or {}, path=None)

    @property
    def keys(self) -> list[str]:
        return list(self._columns)

    @property
    def n_episodes(self) -> int:
        return len(self.episode_ends)

    @property
    def n_steps(self) -> int:
        return int(self.episode_ends[-1]) if self.n_episodes else 0

    @property
    def rate(self) -> float | None:
        """Rows a second (Hz), as the attributes say it; None where they do not. `InputError` for what is no rate."""
        for name in ("control_rate", "fps"):
            said = self.attrs.get(name)
            if said is not None:
                if isinstance(said, bool) or not isinstance(said, int | float) or not 0 < said < math.inf:
                    raise InputError(f"{self.name}: attribute {name} is {said!r}, expected a number of Hz above 0")
                return float(said)
        return None

    def __contains__(self, key: str) -> bool:
        return key in self._columns

    def __getitem__(self, key: str) -> Column:
        if key not in self._columns:
            raise InputError(f"{self.name}: no key {key!r} in data/; it has {', '.join(self.keys) or 'none'}")
        return self._columns[key]

    def with_column(self, key: str, column: Column) -> ReplayBuffer:
        """The same buffer with one more column [N, ...], which stays where it is (nothing is written)."""
        check_lengths({key: column.shape[0]}, self.n_steps, self.name)
        return ReplayBuffer(
            columns={**self._columns, key: column},
            episode_ends=self.episode_ends,
            attrs=self.attrs,
            path=self.path,
            left_out=self.left_out,
            name=self.name,
            paths=self.paths,
            parts=self.parts,
            remote=self.remote,
        )

    def episode(self, index: int) -> dict[str, np.ndarray]:
        """All columns of episode `index` (negative from the end), rows [T, ...] in memory."""
        if not -self.n_episodes <= index < self.n_episodes:
            raise InputError(f"{self.name}: no episode {index}, there are {self.n_episodes}")
        index %= self.n_episodes
        first = int(self.episode_ends[index - 1]) if index else 0
        end = int(self.episode_ends[index])
        return {key: np.asarray(column[first:end]) for key, column in self._columns.items()}

    def episodes(self) -> Iterator[dict[str, np.ndarray]]:
        """Every episode in order."""
        return (self.episode(index) for index in range(self.n_episodes))

    def append(self, episode: Mapping[str, np.ndarray], task: str | None = None) -> None:
        """Add one episode: every key of the buffer, rows [T, ...] of the same shape and type, T at least 1.

        task: what was to be done, in words; episodes before the first one with words have none (`datasets.tasks`).
        On disk an episode is either there as a whole or not at all, whenever the process is killed.
        """
        self._refuse_to_lose()
        episode, attrs = with_task(self, episode, task)
        old = self._columns
        if old and task is not None and TASK not in old:
            old = {**old, TASK: np.zeros(self.n_steps, np.int64)}
        rows = self._checked(episode, old)
        length = len(next(iter(rows.values())))
        ends = np.append(self.episode_ends, self.n_steps + length)
        if self.path is None:
            self._columns = {key: np.concatenate([old[key], rows[key]]) if old else rows[key] for key in rows}
        elif not self._columns:
            with atomic_path(self.path) as temporary:
                write_zarr(temporary, rows, ends, attrs)
        else:
            what = f"episode {self.n_episodes} to {self.path} (those before it are unharmed)"
            with writer_lock(self.path), writing(what):
                self._append_on_disk(self.path, rows, ends, attrs)
        if self.path is not None:
            self._columns = ReplayBuffer.open(self.path)._columns
        self.episode_ends, self.attrs = ends, attrs

    def _refuse_to_lose(self) -> None:
        if self.left_out and self.path is not None:
            raise InputError(
                f"{self.name} also holds {', '.join(self.left_out)}, which would not stay in step: save() a copy, "
                "which has only numbers, and change that"
            )

    def _checked(self, episode: Mapping[str, np.ndarray], columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
        """The episode's rows in the order of the buffer's columns, which they must fit."""
        rows = {key: np.asarray(values) for key, values in episode.items()}
        where = f"episode for {self.name}"
        if not rows or (columns and set(rows) != set(columns)):
            raise InputError(
                f"{where} has keys {', '.join(sorted(rows)) or '(none)'}; "
                f"expected {', '.join(sorted(columns)) or 'at least one'}"
            )
        for key, values in rows.items():
            check_key(key, where)
            check_dtype(values.dtype, key, where)
            check_finite(values, key, where)
            if columns:
                column = columns[key]
                if values.shape[1:] != column.shape[1:] or values.dtype != column.dtype:
                    raise InputError(
                        f"{where}: {key} has rows {list(values.shape[1:])} of {values.dtype}, "
                        f"the buffer has {list(column.shape[1:])} of {column.dtype}"
                    )
        lengths = {key: len(values) for key, values in rows.items()}
        check_episode_ends(np.asarray([min(lengths.values())]), where)
        check_lengths(lengths, min(lengths.values()), where)
        return {key: rows[key] for key in columns or rows}

    def _append_on_disk(
        self, path: Path, rows: Mapping[str, np.ndarray], ends: np.ndarray, attrs: Mapping[str, Any]
    ) -> None:
        if not (path / "zarr.json").is_file():
            raise InputError(f"{path}: only a Zarr v3 folder can grow: save() a copy and append to that")
        if any(not isinstance(column, ZarrColumn) for column in self._columns.values()):
            raise InputError(f"{path} has videos: record to it, or save() a copy and append to that")
        started = time.time() - 1
        store = LocalStore(path)
        with zarr.config.set({"array.write_empty_chunks": True}):
            group = zarr.open_group(store, mode="r+", use_consolidated=False)
            meta = group["meta"]
            meta.attrs[APPENDING] = True
            if attrs != self.attrs:
                group.attrs.update(attrs)
            if TASK in rows and TASK not in self._columns:  # rows until now have the first words
                create_array(group.require_group("data"), TASK, (self.n_steps,), np.dtype(np.int64))[:] = 0
            for key, values in rows.items():
                array = array_at(group, self._place(key), str(path))
                array.resize((self.n_steps, *array.shape[1:]))  # cuts off what an interrupted append left
                array.resize((int(ends[-1]), *array.shape[1:]))
                array[self.n_steps :] = values
            sync(path / "data", newer_than=started)
            counted = array_at(group, "meta/episode_ends", str(path))
            counted.resize(ends.shape)
            counted[:] = ends
            sync(path / "meta")
            del meta.attrs[APPENDING]

    def _place(self, key: str) -> str:
        column = self._columns.get(key)
        return column.place if isinstance(column, ZarrColumn) else f"data/{key}"  # a new one: tasks

    def drop(self, indices: Sequence[int] | np.ndarray) -> None:
        """Remove episodes. On disk the file is written anew and takes the old one's place.

        Raises `InputError` for an index that does not exist, and where no episode would be left.
        """
        self._refuse_to_lose()
        dropped = np.unique(np.asarray(indices, np.int64))
        if ((dropped < 0) | (dropped >= self.n_episodes)).any():
            raise InputError(f"{self.name}: cannot drop {dropped.tolist()}, there are {self.n_episodes} episodes")
        kept = np.setdiff1d(np.arange(self.n_episodes), dropped)
        if len(kept) == 0:
            raise InputError(f"{self.name}: cannot drop all {self.n_episodes} episodes")
        firsts = np.concatenate([[0], self.episode_ends[:-1]])
        lengths = self.episode_ends - firsts
        rows = np.concatenate([np.arange(firsts[i], self.episode_ends[i]) for i in kept])
        ends = np.cumsum(lengths[kept])
        if self.path is None:
            self._columns = {key: column[rows] for key, column in self._columns.items()}
        else:
            columns = {key: _Rows(column, rows) for key, column in self._columns.items()}
            with writer_lock(self.path), atomic_path(self.path) as temporary:
                write_zarr(temporary, columns, ends, self.attrs)
            self._columns = ReplayBuffer.open(self.path)._columns
        self.episode_ends = ends

    def save(self, path: str | Path) -> None:
        """Write the buffer as Zarr v3, a zip where `path` ends in .zip; it replaces what is at `path`."""
        if not self.n_episodes:
            raise InputError(f"{self.name} holds no episodes: nothing to save")
        with atomic_path(Path(path).expanduser()) as temporary:
            write_zarr(temporary, self._columns, self.episode_ends, self.attrs)


def _episode_ends(file: ZarrFile) -> tuple[np.ndarray, bool]:
    """int64 [E], and whether an append was interrupted."""
    file.check([ENDS])
    with reading(f"{file.path}: {ENDS}"):
        ends = np.asarray(array_at(file.group, ENDS, str(file.path))[:])
        interrupted = APPENDING in file.group["meta"].attrs
    if interrupted:  # it may have grown without its new value being written
        ends = np.trim_zeros(ends, "b")
    return check_episode_ends(ends, str(file.path)), interrupted


def _columns_at(file: ZarrFile, ends: np.ndarray) -> tuple[dict[str, str], dict[str, str]]:
    """Key → place of the arrays that are columns, and key → reason for the others in data/."""
    columns: dict[str, str] = {}
    left_out = {}
    for place, info in file.infos.items():
        if not place.startswith(DATA):
            continue
        key = place.removeprefix(DATA).replace("/", ".")
        if key in columns or key in left_out:
            raise InputError(f"{file.path}: two arrays in data/ have the key {key}: rename one of them")
        if info.dtype is None:
            left_out[key] = f"it holds {info.values}, and only numbers can be used"
        elif not info.shape:
            left_out[key] = "it is a single value"
        elif 0 in info.shape[1:]:
            left_out[key] = f"it has no values, its shape is {list(info.shape)}"
        elif info.shape[0] == len(ends) != ends[-1]:
            left_out[key] = "it has one row an episode, and not one a step"
        else:
            columns[key] = place
    return columns, left_out


class _Rows:
    """Some rows of a column, read when asked for."""

    def __init__(self, column: Column, rows: np.ndarray) -> None:
        self._column, self._rows = column, rows
        self.shape = (len(rows), *column.shape[1:])
        self.dtype = column.dtype

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        return np.asarray(self._column[self._rows[rows]])
