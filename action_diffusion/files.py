"""Files that are either complete or not there: temporary name in the same folder, fsync, rename."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from action_diffusion.disk import sync_folder
from action_diffusion.errors import InputError


def cache_folder() -> Path:
    """Where decoded, rendered and downloaded data is kept: $XDG_CACHE_HOME or ~/.cache, and our name."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "action-diffusion"


def sync(path: Path, newer_than: float = 0.0) -> None:
    """Flush a file, or what changed in and under a folder since `newer_than` (s), to survive a power cut."""
    for found in [path, *(path.rglob("*") if path.is_dir() else ())]:
        if not found.exists() or found.stat().st_mtime < newer_than:
            continue
        if found.is_dir():
            sync_folder(found)
        elif found.is_file():
            with found.open("rb") as opened:
                os.fsync(opened.fileno())


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path to write a file or folder at; it takes `path`'s place when the block ends well.

    A file replaces its predecessor in one step. A folder cannot: its predecessor is moved aside to
    `<name>.previous` first and deleted last, so that a kill between leaves that copy. An error that is
    the file system's (full, read-only) becomes an `InputError`, and nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial{path.suffix}")
    try:
        with writing(f"{path} (nothing there was changed)"):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove(temporary)
            yield temporary
            sync(temporary)
            _replace(temporary, path)
            sync_folder(path.parent)
    finally:
        remove(temporary)


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turns what the file system refuses (full, read-only) into one `InputError`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {what}: {error.strerror or error}") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time for what is made at `path`; the others wait. A killed one holds nothing up."""
    with writing(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f"{path.name}.lock").open("w")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def writer_lock(path: Path) -> Iterator[None]:
    """Nobody else writes to `path` meanwhile. Raises `InputError` that names the process which does already.

    The lock is on a hidden file beside `path`, which is deleted in the end. A killed process holds nothing up.
    """
    place = path.with_name(f".{path.name}.lock")
    with writing(str(path)):
        place.parent.mkdir(parents=True, exist_ok=True)
    with _held(path, place) as lock:
        with writing(str(place)):
            lock.truncate(0)
            lock.write(f"process {os.getpid()} ({' '.join(sys.argv)})")
            lock.flush()
        try:
            yield
        finally:
            place.unlink(missing_ok=True)


def _held(path: Path, place: Path) -> TextIO:
    while True:
        with writing(str(path)):
            lock = place.open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with lock:
                lock.seek(0)
                who = lock.read().strip() or "another process"
            raise InputError(f"{path} is being written by {who}: end that first, or write elsewhere") from None
        if place.exists() and os.path.samestat(place.stat(), os.fstat(lock.fileno())):
            return lock
        lock.close()  # whoever had it has just deleted it


def _replace(temporary: Path, path: Path) -> None:
    if not path.is_dir():
        os.replace(temporary, path)
        return
    previous = path.with_name(f"{path.name}.previous")
    remove(previous)
    os.rename(path, previous)
    os.rename(temporary, path)
    remove(previous)


def require_space(folder: Path, n_bytes: int, purpose: str) -> None:
    """Raises `InputError` where the disk under `folder` cannot take `n_bytes` for `purpose`."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise InputError(
            f"{purpose} needs {n_bytes / 1e9:.2f} GB in {folder}, which has {free / 1e9:.2f} GB free: "
            "make room, or set XDG_CACHE_HOME to a folder on a larger disk"
        )
