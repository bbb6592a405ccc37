"""What a buffer that was converted from robomimic's files still knows of them, in its attributes.

    columns          {"action": "actions", "object": "obs/object", …}    where each column was
    demos            ["demo_0", "demo_1", …]     the column `demo` holds indices into it, so that it and the subsets
    subsets          {"train": ["demo_0", …]}    stay right when episodes are dropped
    env_args         the simulator: env_name, env_version, env_kwargs; not there where the file names none
    tasks            ["pick up the cube", …]     the column `task_index` holds indices into it; one task needs none
    hdf5_attributes  every attribute of the file, of data/ and of each demo: one JSON line each, xz, base64

The last holds a simulator model of some 40 kB a demo. They differ in a few numbers, so that compressed together they
take some 100 bytes each; apart they would make the description of a buffer larger than its low-dimensional data.
"""

from __future__ import annotations

import base64
import json
import lzma
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np

from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError, unknown

DEMO = "demo"
"""The column that says which demo a row is of: an index into attrs["demos"]."""
TASK_INDEX = "task_index"
"""The column that says which of attrs["tasks"] a row is of, where there is more than one."""
LINE_BYTES = 16 << 20
TOTAL_BYTES = 512 << 20
"""The most attributes of a place, and of all, as JSON."""
_MOST_PLACES = 1_000_000
_PART_BYTES = 1 << 20
_DECODER_BYTES = 128 << 20
"""What xz may take for itself: its highest preset needs 65 MB."""


def demo_names(buffer: ReplayBuffer) -> list[str]:
    """For each episode the demo that it was; demo_0, demo_1, … in a buffer that was not converted."""
    if DEMO not in buffer or "demos" not in buffer.attrs:
        return [f"demo_{index}" for index in range(buffer.n_episodes)]
    names, column = buffer.attrs["demos"], np.asarray(buffer[DEMO][:])
    whole = column.ndim == 1 and column.dtype.kind in "iu" and isinstance(names, list)
    indices = column[buffer.episode_ends - 1]
    if not whole or indices.min() < 0 or indices.max() >= len(names) or len(np.unique(indices)) != len(indices):
        raise InputError(f"{buffer.name}: data/{DEMO} must name one of attrs['demos'] for each episode, and each once")
    return [str(names[index]) for index in indices]


def task_words(buffer: ReplayBuffer) -> list[str]:
    """For each episode its task in words; "" where the buffer does not say."""
    tasks = buffer.attrs.get("tasks", [""])
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
        raise InputError(f"{buffer.name}: attrs['tasks'] must be a list of texts")
    if TASK_INDEX not in buffer:
        return [tasks[0] if len(tasks) == 1 else ""] * buffer.n_episodes
    column = np.asarray(buffer[TASK_INDEX][:])
    if column.ndim != 1 or column.dtype.kind not in "iu":
        raise InputError(f"{buffer.name}: {TASK_INDEX} must be one whole number a row")
    return [tasks[index] if 0 <= index < len(tasks) else "" for index in column[buffer.episode_ends - 1].tolist()]


def subsets_of(buffer: ReplayBuffer) -> dict[str, list[str]]:
    """Names of demos by the name of the subset. Raises `InputError` where the attribute is none of that."""
    subsets = buffer.attrs.get("subsets", {})
    if not isinstance(subsets, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in subsets.values()
    ):
        raise InputError(f"{buffer.name}: attrs['subsets'] must name lists of demos, as {{'train': ['demo_0']}}")
    return subsets


def subset(buffer: ReplayBuffer, name: str) -> np.ndarray:
    """Indices (int64, increasing) of the episodes in the subset `name`: what was mask/`name` in the file."""
    subsets = subsets_of(buffer)
    if name not in subsets:
        raise unknown("subset", name, subsets, where=buffer.name)
    return np.flatnonzero(np.isin(demo_names(buffer), subsets[name]))


def unique_names(names: Sequence[str]) -> list[str]:
    """Names as they are, with _2, _3, … behind those that were there before."""
    unique: dict[str, None] = {}
    for name in names:
        candidates = (f"{name}_{number}" for number in count(2))
        unique[name if name not in unique else next(new for new in candidates if new not in unique)] = None
    return list(unique)


def joined_demos(buffers: Sequence[ReplayBuffer]) -> tuple[list[str], dict[str, list[str]]]:
    """Names of the episodes of all, each once, and the subsets that they are in, by these names."""
    owners = [(buffer, name) for buffer in buffers for name in demo_names(buffer)]
    names = unique_names([name for _, name in owners])
    subsets: dict[str, list[str]] = {}
    for name, (buffer, old) in zip(names, owners, strict=True):
        for subset, members in subsets_of(buffer).items():
            if old in members:
                subsets.setdefault(subset, []).append(name)
    return names, subsets


def attributes(buffer: ReplayBuffer) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place in the file, its attributes): "/", "data" and "data/demo_0", …; nothing where none are kept.

    A demo's `model_file` (MJCF) is among them. Read one place at a time.
    """
    if "hdf5_attributes" in buffer.attrs:
        yield from unpack(buffer.attrs["hdf5_attributes"], buffer.name)


class Packer:
    """Packs places one after the other, each `LINE_BYTES` at most, so that only what is packed stays in memory."""

    def __init__(self, where: str) -> None:
        self._where, self._total = where, 0
        self._compressor, self._parts = lzma.LZMACompressor(preset=1), list[bytes]()

    def add(self, place: str, values: Mapping[str, Any]) -> None:
        """Attributes as h5py gives them. Raises `InputError` for values that are neither text nor numbers."""
        where = f"{self._where}: {place}"
        plain = {name: _plain(value, f"{where}: attribute {name}") for name, value in values.items()}
        line = json.dumps([place, plain]).encode() + b"\n"
        self._total += len(line)
        _check_size(len(line), self._total, where)
        self._parts.append(self._compressor.compress(line))

    def text(self) -> str:
        """All of them. Nothing can be added afterwards."""
        return base64.b64encode(b"".join([*self._parts, self._compressor.flush()])).decode()


def pack(places: Iterable[tuple[str, Mapping[str, Any]]], where: str) -> str:
    """Attributes as h5py gives them to text. Raises `InputError` as `Packer.add`."""
    packer = Packer(where)
    for place, values in places:
        packer.add(place, values)
    return packer.text()


def unpack(text: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The inverse of `pack`. Raises `InputError` for what `pack` cannot have made."""
    where = f"{where}: attrs['hdf5_attributes']"
    try:
        for number, line in enumerate(_lines(base64.b64decode(text, validate=True), where)):
            if number == _MOST_PLACES:
                raise InputError(f"{where} is of more than {_MOST_PLACES:,} places")
            place, plain = json.loads(line)
            if not isinstance(place, str):
                raise ValueError(f"{place!r:.60} is no place")
            yield place, {name: _value(value) for name, value in plain.items()}
    except InputError:
        raise
    except (lzma.LZMAError, EOFError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{where} is damaged: {error}") from error


def _lines(packed: bytes, where: str) -> Iterator[bytes]:
    """Unpacked a part at a time: a few kilobytes can hold gigabytes."""
    decoder, rest, total = lzma.LZMADecompressor(memlimit=_DECODER_BYTES), b"", 0
    while not decoder.eof:
        part = decoder.decompress(packed, max_length=_PART_BYTES)
        if not part and decoder.needs_input:
            raise EOFError("it was cut off")
        packed, total = b"", total + len(part)
        *lines, rest = (rest + part).split(b"\n")
        _check_size(len(rest), total, where)
        yield from lines
    if rest:
        raise EOFError("it was cut off")


def _check_size(line: int, total: int, where: str) -> None:
    if line > LINE_BYTES or total > TOTAL_BYTES:
        raise InputError(f"{where}: attributes may have {LINE_BYTES:,} bytes a place, {TOTAL_BYTES:,} together")


def _plain(value: Any, where: str) -> Any:
    """Text as it is, a list of texts, or {"dtype", "value"} for numbers."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, str):
        return value
    array = np.asarray(value)
    if array.dtype.kind in "biuf":
        return {"dtype": array.dtype.str, "value": array.tolist()}
    texts = [item.decode() if isinstance(item, bytes) else item for item in array.ravel().tolist()]
    if array.ndim == 1 and all(isinstance(text, str) for text in texts):
        return texts
    raise InputError(f"{where} is neither text nor numbers, and cannot be kept")


def _value(plain: Any) -> Any:
    if not isinstance(plain, dict):
        return plain
    dtype = np.dtype(plain["dtype"])
    if dtype.kind not in "biuf":
        raise ValueError(f"{dtype} are no numbers")
    return np.asarray(plain["value"], dtype=dtype)
