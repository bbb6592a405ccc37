"""Files as they must be written so that a power cut spoils nothing.

    write:  under a temporary name
    flush:  fsync ─▶ rename                         the old content or the new one, never a part
            fsync of every folder that changed      from here on the new one

What must not be there before something else is, is written after a `flush`. Errors are the system's (`OSError`).
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

Data = bytes | memoryview


class Disk:
    """All writes of one recording, and which folders they changed since the last `flush`."""

    def __init__(self) -> None:
        self._changed: dict[Path, None] = {}
        self._written: dict[Path, Path] = {}  # file → temporary name

    def make(self, folder: Path) -> None:
        """A folder, and those that hold it; what is there already stays."""
        if os.path.isdir(folder):
            return
        self.make(folder.parent)
        os.mkdir(folder)
        self._changed[folder.parent] = None

    def write(self, path: Path, data: Data) -> None:
        """The whole file, which takes the place of one that is there at the next `flush`."""
        temporary = path.with_name(f".{path.name}.partial")
        self._written[path] = temporary
        file = GrowingFile(temporary)
        try:
            file.write(data)
        finally:
            file.close()

    def create(self, path: Path) -> GrowingFile:
        """An empty file, to be written bit by bit."""
        self._changed[path.parent] = None
        return GrowingFile(path)

    def rename(self, source: Path, target: Path) -> None:
        """In the same folder; a file at `target` is replaced."""
        os.replace(source, target)
        self._changed[target.parent] = None

    def remove(self, path: Path) -> bool:
        """Delete a file; returns whether it was there."""
        if path in self._written:
            os.unlink(self._written.pop(path))
        if not os.path.exists(path):
            return False
        os.unlink(path)
        self._changed[path.parent] = None
        return True

    def flush(self) -> None:
        """Everything so far survives a power cut. All files are synced in a row, which costs hardly more than one."""
        for temporary in self._written.values():
            _sync(temporary, os.O_RDONLY)
        for path, temporary in self._written.items():
            self.rename(temporary, path)
        self._written.clear()
        for folder in self._changed:
            sync_folder(folder)
        self._changed.clear()


def sync_folder(folder: Path) -> None:
    """The names in `folder` survive a power cut, where the file system can promise that at all."""
    try:
        _sync(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class GrowingFile:
    """A file that is written from its beginning on; what is there is cut off."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)

    def write(self, data: Data) -> int:
        """Append; returns the number of bytes, which is that of `data`."""
        view = memoryview(data).cast("B")
        rest = view
        while len(rest):
            rest = rest[os.write(self._descriptor, rest) :]
        return len(view)

    def sync(self) -> None:
        """The content so far survives a power cut (but its name only after the folder's `Disk.flush`)."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """May be called twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
