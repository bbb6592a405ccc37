"""robomimic's and robosuite's HDF5 to a replay buffer: parallel, resumable, and compared with the source at the end.

    .DIR.zarr.converting/      where DIR.zarr will be; gone when it is there
        identity               of what source, and with what settings; another one starts anew
        observed/              what the simulator showed of each demo, where observations are rendered
        buffer/                the arrays, at their final size from the start; without episode_ends, so it never loads
        journal                the blocks of rows that are written, one a line

A block is some whole chunks of one column, so that no two processes write to the same chunk, and memory holds one block
a process. After the last one `episode_ends` is written, every row is compared with the source, and the buffer takes its
name in one step.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.storage import LocalStore

from action_diffusion.datasets.hdf5.reading import dtype_of, open_hdf5, reading_hdf5
from action_diffusion.datasets.robomimic.attributes import DEMO, TASK_INDEX
from action_diffusion.datasets.robomimic.demo import StoredColumn, is_observation, read_rows, said
from action_diffusion.datasets.robomimic.file import FileLayout, describe
from action_diffusion.datasets.robomimic.observing import Observer, observed
from action_diffusion.datasets.storage.checks import check_finite
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.store import array_at, write_zarr
from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path, locked, remove, sync, writing
from action_diffusion.parallel import in_processes
from action_diffusion.progress import progress

BLOCK_BYTES = 8 << 20
WORKER_BYTES = 64 << 20
"""A second process takes about a second to begin: it must have this much to do."""
_VERSION = 1  # of what the work folder holds


class DemoRows(NamedTuple):
    """Rows `first` to `end` of a demo, named by its group in the file."""

    demo: str
    first: int
    end: int


class Block(NamedTuple):
    """Rows `first` to `end` of a column, and the pieces that they are made of; `stored`: what it is in a demo."""

    column: str
    stored: StoredColumn
    first: int
    end: int
    pieces: list[DemoRows]

    @property
    def n_bytes(self) -> int:
        return (self.end - self.first) * self.stored.n_bytes

    @property
    def line(self) -> str:
        return f"{self.first}-{self.end} {self.column}"


def convert(
    source: str | Path | FileLayout,
    output: str | Path,
    *,
    observer: Observer | None = None,
    workers: int = 1,
    finite: bool = True,
) -> dict[str, Any]:
    """Write the demonstrations in `source` to a replay buffer at `output`, a folder that is not there yet.

    source: an HDF5 file, or what `describe` has said of it.
    observer: adds what the simulator shows of the recorded states (`envs.robosuite.states`). workers: processes; see
    `default_workers`. With more than one, a script that calls this needs `if __name__ == "__main__":`.
    finite: refuse NaN and infinite values; else they arrive as they are, for who looks for them.

    A call that was cut off is gone on with by the same call.

    Columns: see `file`; rows in the file's own types. Attributes: see `demos`. Returns the numbers to
    report. Raises `InputError` for whatever `describe` refuses, a value that is NaN or infinite, an output that
    exists, and a disk that is full (what is done is kept).
    """
    output = Path(output).expanduser()
    _check_output(output)
    layout = source if isinstance(source, FileLayout) else describe(Path(source).expanduser())
    work = output.with_name(f".{output.name}.converting")
    with (
        writing(f"{output} (what is converted so far is kept: the same command goes on with it)"),
        locked(work / "conversion"),
    ):
        _check_output(output)
        _begin(work, layout, observer)
        attrs = _attrs(layout, observer)
        try:
            if observer is not None:
                shown = observed(layout, observer, work / "observed", workers)
                layout = replace(shown, subsets=layout.subsets, tasks=layout.tasks, task_index=layout.task_index)
            left_out = _make_buffer(work, layout, attrs, workers, finite=finite)
        except InputError:
            remove(work / "journal")
            remove(work / "buffer")
            if not any(work.glob("observed/demo_*.hdf5")):
                remove(work)
            raise
        os.rename(work / "buffer", output)
        remove(work)
    return _summary(layout, output, left_out)


def default_workers(layout: FileLayout, *, observing: bool) -> int:
    """One a core; fewer where a file is small and nothing is rendered."""
    cores = os.cpu_count() or 1
    n_bytes = sum(stored.n_bytes for stored in layout.columns.values()) * int(layout.ends[-1])
    return cores if observing else max(1, min(cores, n_bytes // WORKER_BYTES))


def _check_output(output: Path) -> None:
    if output.exists():
        raise InputError(f"{output} exists: choose another path, or remove it")
    if output.suffix == ".zip":
        raise InputError(f"{output}: a conversion makes a folder: give it a name without .zip")


def _begin(work: Path, layout: FileLayout, observer: Observer | None) -> None:
    """Empties the work folder unless it is of the same source, unchanged, and the same settings."""
    stat = layout.path.stat()
    identity = [_VERSION, str(layout.path.resolve()), stat.st_size, stat.st_mtime_ns, observer and observer.settings]
    text = json.dumps(identity)
    if not (work / "identity").exists() or (work / "identity").read_text() != text:
        for name in ("journal", "buffer", "observed"):
            remove(work / name)
        with atomic_path(work / "identity") as temporary:
            temporary.write_text(text)


def _attrs(layout: FileLayout, observer: Observer | None) -> dict[str, Any]:
    return {
        "source": layout.path.name,
        "layout": layout.kind,
        **({"env_args": layout.env_args} if "env_name" in layout.env_args else {}),
        **({"control_rate": layout.control_rate} if layout.control_rate else {}),
        **({"tasks": layout.tasks} if layout.tasks else {}),
        "demos": layout.demos,
        "subsets": layout.subsets,
        "hdf5_attributes": layout.hdf5_attributes,
        **({"observed": dict(observer.settings)} if observer is not None else {}),
    }


def _make_buffer(work: Path, layout: FileLayout, attrs: dict[str, Any], workers: int, *, finite: bool) -> int:
    """Fill work/buffer, check it, and flush it; returns how many demos have a next_obs that is not kept."""
    folder, journal = work / "buffer", work / "journal"
    if not journal.exists():
        remove(folder)
        columns = {column: stored.path for column, stored in layout.columns.items()}
        _create(folder, layout, attrs | {"columns": columns})
        journal.touch()
    _fill(layout, folder, journal, workers, finite=finite)
    _finish(folder, layout)
    left_out = _compare(layout, folder, workers)
    sync(folder)
    return left_out


def _create(folder: Path, layout: FileLayout, attrs: dict[str, Any]) -> None:
    """All arrays at their final size, without their chunks, and no episodes."""
    empty = {column: np.empty((0, *stored.shape), stored.dtype) for column, stored in layout.columns.items()}
    write_zarr(folder, {**empty, **_numbers(layout)}, np.zeros(0, np.int64), attrs)
    for column, stored in layout.columns.items():
        _array(folder, f"data/{column}").resize((int(layout.ends[-1]), *stored.shape))


def _numbers(layout: FileLayout) -> dict[str, np.ndarray]:
    """Columns that the file does not have: of which demo each row is, and of which task where there are several."""
    lengths = np.diff(layout.ends, prepend=0)
    numbers = {DEMO: np.repeat(np.arange(len(layout.demos), dtype=np.int32), lengths)}
    if len(layout.tasks) > 1:
        numbers[TASK_INDEX] = np.repeat(np.array(layout.task_index, np.int64), lengths)
    return numbers


def _array(folder: Path, name: str) -> zarr.Array[Any]:
    with zarr.config.set({"array.write_empty_chunks": True}):  # so that a missing chunk is a lost one
        return array_at(zarr.open_group(LocalStore(folder), mode="r+", use_consolidated=False), name, str(folder))


def _fill(layout: FileLayout, folder: Path, journal: Path, workers: int, *, finite: bool) -> None:
    """Write the blocks that the journal does not name."""
    blocks = [block for column in layout.columns for block in _blocks(layout, folder, column)]
    done = set(journal.read_text().split("\n")[:-1])  # a line without its end was cut off
    todo = [block for block in blocks if block.line not in done]
    total, left = (sum(block.n_bytes for block in some) for some in (blocks, todo))
    write = functools.partial(_write if finite else _write_any, layout.path, folder)
    with progress(f"converting {layout.path.name}", total, total - left) as advance, journal.open("a") as record:
        for block, _ in in_processes(write, todo, workers, "that converts"):
            record.write(block.line + "\n")
            record.flush()
            advance(block.n_bytes)


def _blocks(layout: FileLayout, folder: Path, column: str) -> Iterator[Block]:
    """Whole chunks, of about `BLOCK_BYTES` together."""
    chunk, n_bytes = _array(folder, f"data/{column}").chunks[0], layout.columns[column].n_bytes
    rows = chunk * max(1, BLOCK_BYTES // (chunk * n_bytes))
    for first in range(0, int(layout.ends[-1]), rows):
        yield _block(layout, column, first, min(first + rows, int(layout.ends[-1])))


def _block(layout: FileLayout, column: str, first: int, end: int) -> Block:
    pieces, row = [], first
    while row < end:
        demo = int(np.searchsorted(layout.ends, row, side="right"))
        start, stop = int(layout.ends[demo - 1]) if demo else 0, min(end, int(layout.ends[demo]))
        pieces.append(DemoRows(f"{layout.group}{layout.demos[demo]}", row - start, stop - start))
        row = stop
    return Block(column, layout.columns[column], first, end, pieces)


def _write(source: Path, folder: Path, block: Block) -> None:
    """Rows of a block from the source, which must be finite, to the buffer."""
    _write_any(source, folder, block, finite=True)


def _write_any(source: Path, folder: Path, block: Block, *, finite: bool = False) -> None:
    array = _array(folder, f"data/{block.column}")
    values = np.empty((block.end - block.first, *array.shape[1:]), array.dtype)
    row = 0
    with open_hdf5(source) as file:
        for piece in block.pieces:
            rows = _rows(file, source, piece, block.stored)
            place = f"{piece.demo}/{block.stored.path}".removeprefix("data/")
            if finite:
                check_finite(rows, place, str(source), piece.first)
            values[row : row + len(rows)] = rows
            row += len(rows)
    array[block.first : block.end] = values


def _rows(file: Any, source: Path, piece: DemoRows, stored: StoredColumn) -> np.ndarray:
    with reading_hdf5(f"{source}: {piece.demo}/{stored.path}"):
        return read_rows(file[piece.demo], stored, piece.first, piece.end, f"{source}: {piece.demo}")


def _finish(folder: Path, layout: FileLayout) -> None:
    for abandoned in (folder / "data").rglob("*.partial"):  # chunks that a killed process was writing
        abandoned.unlink()
    ends = _array(folder, "meta/episode_ends")
    ends.resize(layout.ends.shape)
    ends[:] = layout.ends


def _compare(layout: FileLayout, folder: Path, workers: int) -> int:
    """Every row of the source against the buffer as it opens for training.

    Returns in how many demos `next_obs` is there and is not `obs` one step on, all but its last row. Raises
    `InputError` for the first difference.
    """
    buffer = ReplayBuffer.open(folder)
    if buffer.episode_ends.tolist() != layout.ends.tolist() or set(buffer.keys) != {
        *layout.columns,
        *_numbers(layout),
    }:
        raise InputError(f"{layout.path}: the buffer has other episodes or keys than the source: convert again")
    blocks = [block for column in layout.columns for block in _blocks(layout, folder, column)]
    differing: set[str] = set()
    compare = functools.partial(_compare_rows, layout.path, folder)
    with progress("comparing with the source", sum(block.n_bytes for block in blocks)) as advance:
        for block, found in in_processes(compare, blocks, workers, "that compares"):
            differing.update(found)
            advance(block.n_bytes)
    return len(differing)


def _compare_rows(source: Path, folder: Path, block: Block) -> list[str]:
    """The demos of a block whose next_obs is another."""
    values = np.asarray(_array(folder, f"data/{block.column}")[block.first : block.end])
    lengths = [piece.end - piece.first for piece in block.pieces]
    parts = np.split(values, np.cumsum(lengths)[:-1])
    differing = []
    with open_hdf5(source) as file:
        for piece, part in zip(block.pieces, parts, strict=True):
            ahead = _rows(file, source, piece._replace(end=piece.end + 1), block.stored)
            original, following = ahead[: len(part)], _following(file, source, piece, block.stored)
            if following is not None and not _same(following[: len(ahead) - 1], ahead[1:]):
                differing.append(piece.demo)
            if part.dtype != original.dtype.newbyteorder("=") or not _same(part, original):
                raise InputError(
                    f"{source}: {piece.demo}/{block.stored.path} did not arrive in the buffer as it is: convert again"
                )
    return differing


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return np.array_equal(one, other, equal_nan=one.dtype.kind == other.dtype.kind == "f")


def _following(file: Any, source: Path, piece: DemoRows, stored: StoredColumn) -> np.ndarray | None:
    """next_obs where there is one: its rows, and none where they are of another form."""
    path = f"next_{stored.path}"
    with reading_hdf5(f"{source}: {piece.demo}/{path}"):
        dataset = file[piece.demo].get(path) if is_observation(stored.path) else None
        if dataset is None:
            return None
        if not stored.encoded and (dataset.shape[1:], dtype_of(dataset)) != (stored.shape, stored.dtype):
            return np.empty(0)
    return _rows(file, source, piece, stored._replace(path=path))


def _summary(layout: FileLayout, output: Path, left_out: int) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "output": str(output),
        "episodes": len(layout.demos),
        "steps": int(layout.ends[-1]),
        "keys": ", ".join(sorted(layout.columns)),
        "checked": "every value is the source's",
    }
    if layout.subsets:
        summary["subsets"] = ", ".join(f"{name} ({len(members)})" for name, members in layout.subsets.items())
    if layout.tasks:
        summary["tasks"] = ", ".join(repr(task) for task in layout.tasks[:5]) + (", …" if len(layout.tasks) > 5 else "")
    parts = [f"next_obs, which in {left_out} demos is not obs one step on"] if left_out else []
    if parts := parts + list(said(layout.left_out)):
        summary["left_out"] = "; ".join(parts)
    return summary
