"""What a buffer that was converted from robomimic's files still knows of them, in its attributes.

    columns          {"action": "actions", "object": "obs/object", …}    where each column was
    demos            ["demo_0", "demo_1", …]     the column `demo` holds indices into it, so that it and the subsets
    subsets          {"train": ["demo_0", …]}    stay right when episodes are dropped
    env_args         the simulator: env_name, env_version, env_kwargs
    hdf5_attributes  every attribute of the file, of data/ and of each demo: one JSON line each, xz, base64

The last holds a simulator model of some 40 kB a demo. They differ in a few numbers, so that compressed together they
take some 100 bytes each; apart they would make the description of a buffer larger than its low-dimensional data.
"""

from __future__ import annotations

import base64
import io
import json
import lzma
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from action_diffusion.datasets.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError, unknown

_LINE_BYTES, _LINES = 64 << 20, 1_000_000
DEMO = "demo"
"""The column that says which demo a row is of: an index into attrs["demos"]."""


def demo_names(buffer: ReplayBuffer) -> list[str]:
    """For each episode the demo that it was; demo_0, demo_1, … in a buffer that was not converted."""
    if DEMO not in buffer or "demos" not in buffer.attrs:
        return [f"demo_{index}" for index in range(buffer.n_episodes)]
    names = buffer.attrs["demos"]
    indices = np.asarray(buffer[DEMO][:])[buffer.episode_ends - 1]
    if indices.min() < 0 or indices.max() >= len(names) or len(np.unique(indices)) != len(indices):
        raise InputError(f"{buffer.name}: data/{DEMO} must name one of attrs['demos'] for each episode, and each once")
    return [str(names[index]) for index in indices]


def subset(buffer: ReplayBuffer, name: str) -> np.ndarray:
    """Indices (int64, increasing) of the episodes in the subset `name`: what was mask/`name` in the file."""
    subsets = buffer.attrs.get("subsets", {})
    if name not in subsets:
        raise unknown("subset", name, subsets, where=buffer.name)
    return np.flatnonzero(np.isin(demo_names(buffer), subsets[name]))


def attributes(buffer: ReplayBuffer) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place in the file, its attributes): "/", "data" and "data/demo_0", …; nothing where none are kept.

    A demo's `model_file` (MJCF) is among them. Read one place at a time.
    """
    if "hdf5_attributes" in buffer.attrs:
        yield from unpack(buffer.attrs["hdf5_attributes"], buffer.name)


def pack(places: Iterable[tuple[str, Mapping[str, Any]]], where: str) -> str:
    """Attributes as h5py gives them to text. Raises `InputError` for values that are neither text nor numbers."""
    packed = io.BytesIO()
    with lzma.open(packed, "wb", preset=1) as lines:
        for place, values in places:
            plain = {name: _plain(value, f"{where}: {place}: attribute {name}") for name, value in values.items()}
            lines.write(json.dumps([place, plain]).encode() + b"\n")
    return base64.b64encode(packed.getvalue()).decode()


def unpack(text: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The inverse of `pack`. Raises `InputError` for what is damaged, or was made to fill memory."""
    n_lines = 0
    try:
        with lzma.open(io.BytesIO(base64.b64decode(text, validate=True))) as lines:
            while line := lines.readline(_LINE_BYTES):
                n_lines += 1
                if len(line) == _LINE_BYTES or n_lines > _LINES:
                    raise ValueError(
                        f"it has lines of more than {_LINE_BYTES >> 20} MB, or more than {_LINES:,} of them"
                    )
                place, plain = json.loads(line)
                yield place, {name: _value(value) for name, value in plain.items()}
    except (lzma.LZMAError, EOFError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: attrs['hdf5_attributes'] is damaged: {error}") from error


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
    return np.asarray(plain["value"], dtype=plain["dtype"]) if isinstance(plain, dict) else plain
