"""Demonstrations of other formats as replay buffers: converted into the cache at their first use, and taken from there.

CACHE/converted/NAME-<source>-<state>.zarr     the copy; state: sizes and times of the source's files, converter
                NAME-<source>-<state>.json     what of the source is not in it, and what was read otherwise

A source that has changed is converted anew, and the older copy goes. The source itself is only read.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import Zstd

from action_diffusion import __version__
from action_diffusion.datasets.formats.contract import Opened, Settings
from action_diffusion.datasets.formats.conversion import convert
from action_diffusion.datasets.formats.registry import detected, is_zarr, named, plugin_format
from action_diffusion.datasets.formats.robomimic import columns_of, is_ours
from action_diffusion.datasets.robomimic import conversion as hdf5
from action_diffusion.datasets.robomimic.demo import said
from action_diffusion.datasets.robomimic.file import ROBOSUITE_TYPE, FileLayout, describe
from action_diffusion.datasets.storage.replay_buffer import ASSUMED_RATE, ReplayBuffer
from action_diffusion.datasets.storage.store import Column, row_bytes
from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path, locked, remove, require_space

CONVERTED = "converted"
"""Attribute of a buffer that was: {"from": path, "format": name}."""
_VERSION = 1
"""Of the converters: another one converts everything anew."""
_TITLES = {
    "lerobot": "a LeRobot data set",
    "aloha": "HDF5, ALOHA's",
    "robomimic": "HDF5",
    "folder": "a folder of CSV",
    "mcap": "ROS 2 bags",
}
_IN_PLACE = ("lerobot",)
"""Formats whose rows can be read in any order without a copy."""
_SAMPLES, _SAMPLE_BYTES, _MARGIN = 4, 2 << 20, 1.2


def convert_command(path: Path, *options: str) -> str:
    """What to type for a copy of one's own."""
    name = path.name.removesuffix(".hdf5").removesuffix(".h5") or "demos"
    if name.endswith((".zarr", ".zarr.zip")):
        name = f"{name.removesuffix('.zip').removesuffix('.zarr')}_copy"
    words = (f"in={path}", f"out={name}.zarr", *options)
    return f"action-diffusion data convert {' '.join(shlex.quote(word) for word in words)}"


def look(path: Path, cache: Path) -> ReplayBuffer:
    """Episodes and columns of what lies at `path`, in any format; rows are read where they are, when asked for.

    Raises `InputError` for what is no format that is read, or does not fit together.
    """
    if _is_buffer(path):
        return ReplayBuffer.open(path)
    copy = _copy(path, cache)
    if _is_made(copy):
        return _opened_copy(path, copy)
    kind = detected(path)
    opened = _opened(kind, path, _layout(kind, path))
    return _named(opened, path, kind)


def as_buffer(path: Path, cache: Path, say: Callable[[str], None], images: str = "disk") -> ReplayBuffer:
    """The replay buffer at `path`, or the copy in `cache` of what lies there in another format, made if need be.

    say: gets one line about a conversion. images: "decode" reads a LeRobot data set where it is, and so does "auto"
    where the disk is too small for a copy. Raises `InputError` for what is no format that is read, what cannot be
    converted without a decision, and a disk that is too small.
    """
    if _is_buffer(path):
        return ReplayBuffer.open(path)
    copy = _copy(path, cache)
    with locked(cache / _stem(path)):
        if _is_made(copy):
            say(f"{path} is read from its copy {copy}, made of it before")
            return _opened_copy(path, copy)
        kind = detected(path)
        layout = _layout(kind, path)
        opened = _opened(kind, path, layout)
        if kind in _IN_PLACE and (images == "decode" or (images == "auto" and not _fits(cache, opened.buffer))):
            say(f"{path} is {_TITLES[kind]}, read where it is: its frames are decoded when they are needed")
            return _named(opened, path, kind)
        _make(path, kind, layout, opened, copy, say)
    return _opened_copy(path, copy)


def _is_buffer(path: Path) -> bool:
    # What is not there is said by whoever opens it. A plugin's format may be a zip, as a buffer may.
    return not path.exists() or (is_zarr(path) and plugin_format(path) is None)


def _copy(path: Path, cache: Path) -> Path:
    """Where the copy of `path` as it is now lies, or would lie."""
    return cache / f"{_stem(path)}-{_digest(_state(path))}.zarr"


def _is_made(copy: Path) -> bool:
    return copy.exists() and _notes(copy) is not None


def _notes(copy: Path) -> dict[str, Any] | None:
    """What stands beside the copy; None where nothing does, or what was not written here."""
    try:
        notes = json.loads(copy.with_suffix(".json").read_bytes())
    except (OSError, ValueError):
        return None
    texts = notes.get("left_out") if isinstance(notes, dict) else None
    known = isinstance(texts, list) and isinstance(notes.get("format"), str) and all(isinstance(t, str) for t in texts)
    return notes if known else None


def _stem(path: Path) -> str:
    return f"{path.resolve().name[:80]}-{_digest(str(path.resolve()))}"


def _state(path: Path) -> list[object]:
    """Changes when the source does, or the converter."""
    path = path.resolve()
    files = [path] if path.is_file() else sorted(Path(base, name) for base, _, names in os.walk(path) for name in names)
    stats = [(file.relative_to(path).as_posix(), file.lstat()) for file in files]
    return [__version__, _VERSION, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)]


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def _make(
    path: Path, kind: str, layout: FileLayout | None, opened: Opened, copy: Path, say: Callable[[str], None]
) -> None:
    require_space(copy.parent, _copy_bytes(copy.parent, opened.buffer), f"converting {path}")
    say(
        f"{path} is {_TITLES.get(kind, kind)}, {opened.buffer.n_episodes} episodes of {opened.buffer.n_steps} steps "
        f"together: converting it once, to {copy}; for a copy of your own: {convert_command(path)}"
        + "".join(f"; note: {text}" for text in opened.said)
    )
    remove(copy)  # which somebody parted from its notes
    with atomic_path(copy.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps({"format": kind, "left_out": opened.left_out}, indent=1) + "\n")
    if layout is not None:
        hdf5.convert(layout, copy, workers=hdf5.default_workers(layout, observing=False), finite=False)
    else:
        convert(opened, copy, named("zarr"), Settings(opened.buffer.rate or ASSUMED_RATE))
    for old in _copies(path, copy.parent):
        if not old.name.lstrip(".").startswith(copy.stem):
            remove(old)


def _copies(path: Path, cache: Path) -> Iterator[Path]:
    """Everything that was made of `path`, also what was cut off."""
    stem = glob.escape(_stem(path))
    yield from cache.glob(f"{stem}-*")
    yield from cache.glob(f".{stem}-*")


def _opened_copy(path: Path, copy: Path) -> ReplayBuffer:
    notes = _notes(copy)
    if notes is None:  # another process removed it since
        raise InputError(f"{copy}: the notes beside it are gone: run the same command again")
    return _named(Opened(ReplayBuffer.open(copy), tuple(notes["left_out"])), path, notes["format"])


def _named(opened: Opened, path: Path, kind: str) -> ReplayBuffer:
    """The buffer under the name of its source, with what was left out of that."""
    buffer, reasons = opened.buffer, dict[str, str]()
    for text in opened.left_out:
        key, _, reason = text.removesuffix(")").partition(" (")
        reasons[key] = reason or "it is no column"
    return ReplayBuffer(
        columns={key: buffer[key] for key in buffer.keys},
        episode_ends=buffer.episode_ends,
        attrs=buffer.attrs | {CONVERTED: {"from": str(path), "format": kind}},
        path=buffer.path,
        left_out=buffer.left_out | reasons,
        name=str(path),
    )


def _layout(kind: str, path: Path) -> FileLayout | None:
    """Of HDF5 with many demos that was not written here, which has a conversion of its own."""
    return describe(path) if kind == "robomimic" and not is_ours(path) else None


def _opened(kind: str, path: Path, layout: FileLayout | None) -> Opened:
    """Raises `InputError` where the simulator would have to say what was seen."""
    if layout is None:
        return named(kind).open(path)
    simulated = "env_name" in layout.env_args and layout.env_args.get("type") == ROBOSUITE_TYPE
    if simulated and not layout.has_observations:
        command = convert_command(path)
        raise InputError(
            f"{path} holds states of a simulator and no observations, which it has to render: {command}, and with "
            "observations=object,agentview_image,… those that you name"
        )
    attrs = {"control_rate": layout.control_rate} if layout.control_rate else {}
    buffer = ReplayBuffer(columns=columns_of(layout), episode_ends=layout.ends, attrs=attrs, path=path)
    return Opened(buffer, tuple(said(layout.left_out)))


def _copy_bytes(folder: Path, buffer: ReplayBuffer) -> int:
    """What a copy in `folder` takes at most: as much as all values; where that is too much, what samples pack to."""
    folder.mkdir(parents=True, exist_ok=True)
    size: float = sum(row_bytes(buffer[key]) * buffer.n_steps for key in buffer.keys)
    if size > shutil.disk_usage(folder).free:
        size = sum(_packed_bytes(buffer[key]) for key in buffer.keys)
    return int(size)


def _fits(folder: Path, buffer: ReplayBuffer) -> bool:
    return _copy_bytes(folder, buffer) <= shutil.disk_usage(folder).free


def _packed_bytes(column: Column) -> float:
    """About what a column takes as Zarr, from some stretches of its rows."""
    rows = max(1, _SAMPLE_BYTES // row_bytes(column))
    firsts = np.unique(np.linspace(0, max(0, column.shape[0] - rows), _SAMPLES).astype(int))
    samples = [np.ascontiguousarray(column[first : first + rows]) for first in firsts.tolist()]
    packed = sum(len(Zstd(level=3).encode(sample)) for sample in samples)
    share = packed / sum(sample.nbytes for sample in samples)
    return _MARGIN * share * row_bytes(column) * column.shape[0]
