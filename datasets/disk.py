"""Files as they must be written so that a power cut spoils nothing.

    write:  temporary name ─▶ fsync ─▶ rename       the old content or the new one, never a part
    flush:  fsync of every folder that changed      from here on the new one

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

    def make(self, folder: Path) -> None:
        """A folder, and those that hold it; what is there already stays."""
        if os.path.isdir(folder):
            return
        self.make(folder.parent)
        os.mkdir(folder)
        self._changed[folder.parent] = None

    def write(self, path: Path, data: Data) -> None:
        """The whole file, which takes the place of one that is there."""
        temporary = path.with_name(f".{path.name}.partial")
        try:
            file = GrowingFile(temporary)
            try:
                file.write(data)
                file.sync()
            finally:
                file.close()
            os.replace(temporary, path)
        except OSError:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise
        self._changed[path.parent] = None

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
        if not os.path.exists(path):
            return False
        os.unlink(path)
        self._changed[path.parent] = None
        return True

    def flush(self) -> None:
        """Everything so far survives a power cut."""
        for folder in self._changed:
            sync_folder(folder)
        self._changed.clear()


def sync_folder(folder: Path) -> None:
    """The names in `folder` survive a power cut, where the file system can promise that at all."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
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
