"""Any replay buffer as robomimic's HDF5, also one that comes from no simulator of robomimic's.

    data/demo_0/actions, rewards, dones, obs/<key>, next_obs/<key>     images as uint8, compressed
    data.attrs["env_args"]                                             a stand-in: trains, but cannot be rolled out
    action_diffusion                                                   what the file says of us, beside robomimic's data

A buffer that came from such a file, or from robosuite, goes back by `datasets.robomimic.export`; files of robomimic's
and robosuite's own are read by `robomimic.convert`. Here is the rest. HDF5 that a process was killed over is not
reliable, so that a conversion that was cut off begins anew.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.formats.columns import (
    PiecewiseColumn,
    RowRange,
    as_images,
    check_rows,
    is_image,
    native,
    rows_a_block,
    spans,
)
from action_diffusion.datasets.formats.contract import MARK, Format, Opened, Settings, kept, restored
from action_diffusion.datasets.formats.journal import Journal
from action_diffusion.datasets.hdf5.reading import check_sound, member, open_hdf5, reading_hdf5
from action_diffusion.datasets.robomimic.attributes import DEMO
from action_diffusion.datasets.robomimic.demo import PLACES, StoredColumn, is_text, read_rows, said
from action_diffusion.datasets.robomimic.file import FileLayout, describe
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.store import Column, row_bytes
from action_diffusion.errors import InputError
from action_diffusion.progress import progress

_PLACES = PLACES | {DEMO: "demos/index"}
"""obs/demo would be read as the number of the demo in this file."""
_GYM = 2
"""robomimic's number for what is not robosuite's."""
ENV_ARGS = {"env_name": "unknown", "type": _GYM, "env_kwargs": {}}


def is_ours(path: Path) -> bool:
    """Whether the file was written here, from a buffer that robomimic's own layout cannot describe."""
    check_sound(path)
    with open_hdf5(path) as file, reading_hdf5(str(path)):
        return member(file, MARK, str(path)) is not None


def opened(path: Path) -> Opened:
    layout = describe(path)
    columns = {layout.columns[key].path: column for key, column in columns_of(layout).items()}
    restored_columns, attrs = restored(columns, _notes(path), str(path))
    buffer = ReplayBuffer(columns=restored_columns, episode_ends=layout.ends, attrs=attrs, path=path)
    return Opened(buffer, tuple(said(layout.left_out)))


def columns_of(layout: FileLayout) -> dict[str, Column]:
    """By key; rows are read from the file when they are asked for."""
    return {
        key: PiecewiseColumn(stored.shape, stored.dtype, layout.ends, functools.partial(_read, layout, stored))
        for key, stored in layout.columns.items()
    }


def _notes(path: Path) -> Any:
    place = f"{path}: {MARK}"
    with open_hdf5(path) as file, reading_hdf5(place):
        notes = member(file, MARK, str(path))
        if notes is None or not is_text(notes) or notes.shape != ():
            raise InputError(f"{place} is no text: the file is not one of ours")
        return json.loads(notes[()])


def _read(layout: FileLayout, stored: StoredColumn, piece: RowRange) -> np.ndarray:
    where = f"{layout.path}: {layout.group}{layout.demos[piece.number]}"
    with open_hdf5(layout.path) as file, reading_hdf5(f"{where}/{stored.path}"):
        demo = file[f"{layout.group}{layout.demos[piece.number]}"]
        rows = read_rows(demo, stored, piece.first, piece.end, where)
    return check_rows(rows, (piece.end - piece.first, *stored.shape), f"{where}/{stored.path}")


def _write(buffer: ReplayBuffer, path: Path, journal: Journal, settings: Settings) -> None:
    if "action" not in buffer:
        raise InputError(f"{buffer.name} has no column action; it has {', '.join(buffer.keys)}")
    odd = [key for key in buffer.keys if "/" in key or 0 in buffer[key].shape]
    if odd:
        raise InputError(f"{buffer.name}: robomimic's files cannot hold {odd[0]!r}")
    import h5py

    columns = {_PLACES.get(key, f"obs/{key}"): _stored(buffer, key) for key in buffer.keys}
    total = sum(row_bytes(column) * buffer.n_steps for column in columns.values())
    firsts = np.concatenate([[0], buffer.episode_ends[:-1]]).tolist()
    with h5py.File(path, "w") as file, progress("writing the demos", total) as advance:
        data = file.create_group("data")
        for index, (first, end) in enumerate(zip(firsts, buffer.episode_ends.tolist(), strict=True)):
            demo = data.create_group(f"demo_{index}")
            demo.attrs["num_samples"] = end - first
            for place, column in columns.items():
                _write_rows(demo, place, column, first, end)
                if place.startswith("obs/"):
                    _write_rows(demo, f"next_{place}", column, first, end, ahead=1)
                advance((end - first) * row_bytes(column))
        data.attrs["total"] = buffer.n_steps
        data.attrs["env_args"] = json.dumps(buffer.attrs.get("env_args", ENV_ARGS))
        names = {key: _PLACES.get(key, f"obs/{key}") for key in buffer.keys}
        file[MARK] = json.dumps(kept(buffer, names))


def _stored(buffer: ReplayBuffer, key: str) -> Column:
    return as_images(buffer[key], key, buffer.name) if is_image(buffer[key]) else buffer[key]


def _write_rows(demo: Any, place: str, column: Column, first: int, end: int, *, ahead: int = 0) -> None:
    """Rows of an episode, or those one step ahead, of which the last is repeated."""
    shape = (end - first, *column.shape[1:])
    options = {"chunks": (1, *shape[1:]), "compression": "gzip", "compression_opts": 1} if is_image(column) else {}
    dataset = demo.create_dataset(place, shape=shape, dtype=native(column.dtype), **options)
    for start, stop in spans(first, end, rows_a_block(column)):
        rows = np.asarray(column[min(start + ahead, end - 1) : min(stop + ahead, end)])
        short = stop - start - len(rows)
        dataset[start - first : stop - first] = np.concatenate([rows, rows[-1:]]) if short else rows


ROBOMIMIC = Format("robomimic", opened, _write)
