"""One format to another: resumable, in bounded memory, and compared with the source before the result takes its name.

.NAME.converting/      where NAME will be; gone when it is there
    identity           of what source, to what, with what settings; another one starts anew
    journal            the steps that are done
    NAME               the result so far
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from action_diffusion.datasets.formats.contract import Format, Opened, Settings
from action_diffusion.datasets.formats.journal import Journal
from action_diffusion.datasets.formats.verify import Likeness, verified
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path, locked, remove, sync, writing

_NAME = re.compile(r"(?!\.|__|zarr\.json)[^/\\\0-\x1f]{1,200}")
"""Of a column, which becomes a folder: no path, no name of Zarr's own."""
_VERSION = 1  # of what the work folder holds


def convert(source: Opened, output: Path, to: Format, settings: Settings) -> dict[str, Any]:
    """Write what was opened to `output`, which is not there yet. Returns the numbers to report.

    A call that was cut off is gone on with by the same call. Raises `InputError` for what `to` cannot hold, an output
    that exists, a difference between source and result, and a disk that is full (what is done is kept).
    """
    buffer = source.buffer
    _check_absent(output)
    for key in buffer.keys:
        if not _NAME.fullmatch(key):
            raise InputError(f"{buffer.name}: {key[:80]!r} is no key, which becomes a folder's name: rename it there")
    empty = [key for key in buffer.keys if 0 in buffer[key].shape]
    if empty:
        raise InputError(f"{buffer.name}: {empty[0]} has no values, its shape is {list(buffer[empty[0]].shape)}")
    work = output.with_name(f".{output.name}.converting")
    with (
        writing(f"{output} (what is converted so far is kept: the same command goes on with it)"),
        locked(work / "conversion"),
    ):
        _check_absent(output)
        _begin(work, source, to, settings)
        result = work / output.name
        try:
            to.write(buffer, result, Journal(work / "journal"), settings)
            found = verified(buffer, to.open(result).buffer, lossy=to.lossy(settings))
        except InputError:
            remove(work)
            raise
        sync(result)
        os.rename(result, output)
        remove(work)
    return _summary(source, output, found)


def _check_absent(output: Path) -> None:
    if output.exists():
        raise InputError(f"{output} exists: choose another path, or remove it")


def _begin(work: Path, source: Opened, to: Format, settings: Settings) -> None:
    """Empties the work folder unless it is of the same source, unchanged, read likewise, and the same settings."""
    identity = json.dumps([_VERSION, _fingerprint(source.buffer), source.said, to.name, *settings])
    file = work / "identity"
    if file.exists() and file.read_text() == identity:
        return
    for entry in work.iterdir():
        if entry.suffix != ".lock":
            remove(entry)
    with atomic_path(file) as temporary:
        temporary.write_text(identity)


def _fingerprint(buffer: ReplayBuffer) -> list[Any]:
    """Changes when the source does."""
    if buffer.path is None:
        raise InputError("only what lies on disk is converted: save() the buffer first")
    stats = [buffer.path.stat(), *(file.lstat() for file in buffer.path.rglob("*"))]
    sizes, times = sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)
    return [str(buffer.path.resolve()), len(stats), sizes, times, buffer.n_steps]


def _summary(source: Opened, output: Path, found: Mapping[str, Likeness]) -> dict[str, Any]:
    buffer = source.buffer
    summary: dict[str, Any] = {
        "output": str(output),
        "episodes": buffer.n_episodes,
        "steps": buffer.n_steps,
        **{f"data/{key}": str(likeness) for key, likeness in found.items()},
    }
    if source.said:
        summary["note"] = "; ".join(source.said)
    if source.left_out:
        summary["left_out"] = ", ".join(source.left_out)
    return summary
