"""Files that a data set's own description names: plain files inside of its folder, told apart before they are opened.

A description is somebody else's text. What it names may lie elsewhere (`../..`, a link), may never end (a named pipe),
or may be a name of any length, by a template such as `{x:>10000000000}`; all of these are refused by name.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from action_diffusion.errors import InputError

LONGEST = 1000
"""Characters of a path in a data set."""
TEXT_BYTES = 1 << 28
"""Of a description or a CSV, which are read as a whole."""
_FIELD = re.compile(r"\{(?P<name>\w+)(?::(?:0(?P<width>\d))?d?)?\}")
_POINTER = b"version https://git-lfs.github.com/spec/"


def matching(folder: Path, *patterns: str) -> Iterator[Path]:
    """What `Path.glob` finds, pattern by pattern, but for the `._NAME` that a Mac writes beside NAME on other disks."""
    for pattern in patterns:
        yield from (path for path in folder.glob(pattern) if not path.name.startswith("._"))


def inside(root: Path, name: str | Path, *, most: int | None = None) -> Path:
    """The file `name` of the folder `root`. most: bytes that are read at once.

    Raises `InputError` unless it is a plain file in there, fetched, and no larger.
    """
    file = root / name
    if len(str(name)) > LONGEST or "\0" in str(name):
        raise InputError(f"{root}: a path of {len(str(name))} characters, {str(name)[:40]!r}…, is no file")
    try:
        place = file.resolve()
        if not place.is_relative_to(root.resolve()):
            raise InputError(
                f"{file} leads to {place}, outside of the folder, which is not read: copy it in (cp -rL follows links)"
            )
        stats = file.stat()
        mode = stats.st_mode
        pointer = stat.S_ISREG(mode) and _begins(file, _POINTER)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{file}: no such file") from None
    except (OSError, RuntimeError) as error:  # a loop of links
        raise InputError(f"{file} cannot be read: {error}") from None
    if not stat.S_ISREG(mode):
        kind = "a named pipe" if stat.S_ISFIFO(mode) else "a folder" if stat.S_ISDIR(mode) else "a device or socket"
        raise InputError(f"{file} is {kind}, expected a file")
    if pointer:
        raise InputError(f"{file} is a pointer of Git LFS, its content was not downloaded: git lfs pull in {root}")
    if most is not None and stats.st_size > most:
        raise InputError(f"{file} has {stats.st_size / 1e6:.0f} MB, at most {most / 1e6:.0f} MB are read")
    return file


def _begins(file: Path, content: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(content)) == content


def fields(template: object) -> set[str] | None:
    """Which names a template such as `data/chunk-{chunk_index:03d}` asks for; None where it is no such template."""
    if not isinstance(template, str) or len(template) > LONGEST:
        return None
    rest = _FIELD.sub("", template)
    return None if "{" in rest or "}" in rest else {match["name"] for match in _FIELD.finditer(template)}


def filled(template: str, values: Mapping[str, str | int]) -> str:
    """A template whose `fields` are among the values."""

    def one(match: re.Match[str]) -> str:
        value = values[match["name"]]
        return value if isinstance(value, str) else f"{value:0{match['width'] or 1}d}"

    return _FIELD.sub(one, template)


def natural(name: str) -> list[tuple[int, str]]:
    """A key to sort names by: episode_10 comes after episode_9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
