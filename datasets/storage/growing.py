"""A replay buffer that grows while it is recorded, and opens at any moment with all rows up to its last commit.

    data/<key>     | 0 1 2 3 4 | 5 6 7 . . | . . . .      rows so far, and room
    <table>/<key>  | 0 1 2 …                              what has no place in a buffer, at a rate of its own
    episode_ends               5     8                    the last one moves on with every commit

`ReplayBuffer.append` adds whole episodes; what is recorded from a running robot must be on disk before its episode is
over. Chunks are written whole and under another name first, what they need to be found is synced before
`episode_ends`, and while it grows the buffer is marked as one that is being appended to: whatever kills the writer,
and if the power goes, `ReplayBuffer.open` sees whole rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from action_diffusion.datasets.storage.growing_column import Fields, GrowingColumn, layout
from action_diffusion.datasets.storage.replay_buffer import APPENDING
from action_diffusion.datasets.storage.store import array_at, open_zarr, reading
from action_diffusion.disk import Disk
from action_diffusion.errors import InputError
from action_diffusion.files import remove, writing

TIME = "time"
"""The column that every table has: above 0, written last, so that it tells how many rows are whole."""
_ASIDE = "aside"
"""Attribute of meta/: [first row, number of rows] that are whole behind the last episode, and not committed."""


class GrowingTable:
    """Columns in one folder, each with the same number of rows. Where there is a column `TIME`, it is written last."""

    def __init__(self, disk: Disk, folder: Path, n_rows: int = 0) -> None:
        keys = sorted((path.parent.name for path in folder.glob("*/zarr.json")), key=lambda key: (key == TIME, key))
        self.columns = {key: GrowingColumn(disk, folder / key, n_rows) for key in keys}

    @property
    def n_rows(self) -> int:
        return next(iter(self.columns.values())).n_rows

    def add(self, rows: Mapping[str, Any]) -> None:
        """Add rows: every column [n, …], n at least 1. Whole chunks are written, the rest is kept until `flush`."""
        for key, column in self.columns.items():
            column.add(np.asarray(rows[key]))

    def flush(self) -> None:
        """Write all rows. A `Disk.flush` makes them last."""
        for column in self.columns.values():
            column.flush()

    def cut(self, n_rows: int) -> None:
        """Forget the rows behind the first `n_rows`, which nothing on disk may count any more."""
        for column in self.columns.values():
            column.cut(n_rows)
            column.trim()

    def finish(self) -> None:
        """Cut off the room behind the last row."""
        for column in self.columns.values():
            column.finish()


class GrowingBuffer:
    """A buffer with the columns `data`, and tables beside them. Made by `create` or `open`.

    Every method raises `InputError` where the disk refuses; what was committed is then as it was.
    """

    def __init__(self, path: Path, disk: Disk, *, tables: Sequence[str]) -> None:
        self.path, self.disk = path, disk
        self._meta = json.loads((path / "meta" / "zarr.json").read_bytes())
        ends = path / "meta" / "episode_ends"
        self.ends: list[int] = np.trim_zeros(np.asarray(zarr.open_array(ends, mode="r")[:]), "b").tolist()
        self._ends = GrowingColumn(disk, ends, len(self.ends))
        self.attrs: dict[str, Any] = json.loads((path / "zarr.json").read_bytes()).get("attributes", {})
        self.data = GrowingTable(disk, path / "data", self.n_rows + self.n_aside)
        self.tables = {name: GrowingTable(disk, path / name) for name in tables}

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        data: Fields,
        tables: Mapping[str, Fields] | None = None,
        attrs: Mapping[str, Any] | None = None,
    ) -> GrowingBuffer:
        """A new one, without a row. Raises `InputError` where `path` exists."""
        if path.exists():
            raise InputError(f"{path} exists: choose another output folder")
        disk, new = Disk(), path.with_name(f".{path.name}.partial")
        groups = {"data": data, **(tables or {})}
        with writing(str(path)):
            remove(new)
            for place, content in layout(groups, attrs=attrs or {}, meta={APPENDING: True}).items():
                disk.make((new / place).parent)
                disk.write(new / place, content)
            disk.flush()
            disk.rename(new, path)
            disk.flush()
            return cls(path, disk, tables=list(tables or ()))

    @classmethod
    def open(cls, path: Path) -> GrowingBuffer:
        """One that was recorded before, to go on with.

        Raises `InputError` where it is no Zarr v3 folder with arrays as `create` makes them.
        """
        if not (path / "meta" / "episode_ends" / "zarr.json").is_file():
            raise InputError(f"{path}: only a Zarr v3 folder can grow: save() a copy of it and record to that")
        open_zarr(path)  # which refuses what might hang, or run
        with reading(str(path)):
            buffer = cls(path, Disk(), tables=())
        with writing(str(path)):
            if APPENDING not in buffer._attrs:
                buffer._describe({APPENDING: True})
            else:  # a writer that was killed may have left files under their temporary names
                for file in path.rglob(".*.partial"):
                    buffer.disk.remove(file)
        return buffer

    @property
    def _attrs(self) -> dict[str, Any]:
        attrs: dict[str, Any] = self._meta.setdefault("attributes", {})
        return attrs

    def _describe(self, attrs: Mapping[str, Any]) -> None:
        others = {name: value for name, value in self._attrs.items() if name not in (APPENDING, _ASIDE)}
        self._meta["attributes"] = {**others, **attrs}
        self.disk.write(self.path / "meta" / "zarr.json", json.dumps(self._meta, indent=2).encode())
        self.disk.flush()

    @property
    def n_rows(self) -> int:
        """In episodes."""
        return self.ends[-1] if self.ends else 0

    @property
    def fields(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Of the columns in data/."""
        return {key: (column.dtype.str, column.shape) for key, column in self.data.columns.items()}

    @property
    def n_aside(self) -> int:
        """Rows behind the last episode that `set_aside` put there."""
        first, n_rows = self._attrs.get(_ASIDE, (0, 0))
        return n_rows if first == self.n_rows else 0

    def set_aside(self, n_rows: int) -> None:
        """Remember that so many rows (of those that `flush` wrote) follow the last episode. 0 forgets them."""
        aside = {_ASIDE: [self.n_rows, n_rows]} if n_rows else {}
        if self._attrs.get(_ASIDE) != aside.get(_ASIDE):
            with writing(str(self.path)):
                self._describe({APPENDING: True, **aside})

    def flush(self) -> None:
        """All rows are on disk, and survive a power cut."""
        with writing(str(self.path)):
            for table in (*self.tables.values(), self.data):
                table.flush()
            self.disk.flush()

    def commit(self, episode_ends: Sequence[int]) -> None:
        """All rows up to the last of `episode_ends` are there, for everybody who opens the buffer from now on."""
        self.flush()
        ends = list(episode_ends)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ends, self.ends, strict=False)))
        with writing(str(self.path)):
            self._ends.cut(same)
            for end in ends[same:]:  # one after the other: no chunk is there before an earlier one
                self._ends.add(np.asarray([end]))
                self._settle()
            self._settle()
        self.ends = ends

    def _settle(self) -> None:
        self._ends.flush()
        self.disk.flush()

    def finish(self, episode_ends: Sequence[int], attrs: Mapping[str, Any] | None = None) -> None:
        """The last commit: afterwards nothing shows that the buffer grew. attrs: that are known only now."""
        self.commit(episode_ends)
        with writing(str(self.path)):
            self.data.cut(self.n_rows)
            for table in (*self.tables.values(), self.data):
                table.finish()
            self._ends.finish()
            if attrs:
                root = json.loads((self.path / "zarr.json").read_bytes())
                self.attrs = root["attributes"] = {**root.get("attributes", {}), **attrs}
                self.disk.write(self.path / "zarr.json", json.dumps(root, indent=2).encode())
            self.disk.flush()
            self._describe({})


def read_table(path: Path, name: str) -> dict[str, np.ndarray]:
    """All columns of a table beside a buffer, up to its last whole row.

    Raises `InputError` where there is no such table, or where it cannot be read.
    """
    file = open_zarr(path)
    places = [place for place in file.infos if place.startswith(f"{name}/")]
    if not places:
        raise InputError(f"{path} has no {name}: it is no record of a deployment")
    file.check(places)
    with reading(f"{path}: {name}"):
        columns = {
            place.removeprefix(f"{name}/"): np.asarray(array_at(file.group, place, str(path))[:])
            for place in sorted(places)
        }
    n_rows = len(np.trim_zeros(columns[TIME], "b"))
    return {key: column[:n_rows] for key, column in columns.items()}
