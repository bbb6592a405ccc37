"""A power cut on paper: what a disk may hold when everything that was not synced is lost, or comes in another order.

    watched(root)     the recorder's calls of the system are noted as they are made
    Log.cut(n, …)     the disk under `root` after the first n of them, and then darkness

A file has what was written before its last fsync. What was written since is there, or not, or in parts: whatever of it
is missing reads as zeros, or the file ends before it. A folder has the names it had at its last fsync. What was
created, renamed or deleted since has happened or not, each regardless of the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from action_diffusion import disk

Names = dict[str, int]
"""Name → number of the file or folder."""
KINDS = {"nothing": 0.0, "half": 0.5, "most": 0.9, "everything": 1.0}
"""Of power cuts: how much of what was not synced has happened all the same."""


@dataclass
class _Node:
    """A file (a folder): bytes (names) that are safe, and what has happened since."""

    is_folder: bool
    content: bytes = b""
    names: Names = field(default_factory=dict)
    since: list[Any] = field(default_factory=list)


class Log:
    """What was done under `root`, in order. Stands in for the module `os`, of which it has the rest as well."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.deeds: list[tuple[Any, ...]] = []
        self._now: dict[Path, int] = {root: 0}
        self._opened: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _add(self, path: Path, *, is_folder: bool) -> int:
        number = len(self.deeds) + 1
        self.deeds.append(("create", self._now[path.parent], path.name, number, is_folder))
        self._now[path] = number
        return number

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)
        self._add(path, is_folder=True)

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        descriptor = os.open(path, flags, mode)
        number = self._now.get(path)
        if number is None:
            number = self._add(path, is_folder=False)
        elif flags & os.O_TRUNC:
            self.deeds.append(("empty", number))
        self._opened[descriptor] = number
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        n = os.write(descriptor, data)
        self.deeds.append(("write", self._opened[descriptor], bytes(data[:n])))
        return n

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)
        self.deeds.append(("sync", self._opened[descriptor]))

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)
        assert source.parent == target.parent
        moved = {path: number for path, number in self._now.items() if path == source or source in path.parents}
        for path, number in moved.items():
            del self._now[path]
            self._now[target / path.relative_to(source)] = number
        folder = self._now[source.parent]
        self.deeds.append(("names", folder, {source.name: None, target.name: moved[source]}))

    def unlink(self, path: Path) -> None:
        os.unlink(path)
        self.deeds.append(("names", self._now[path.parent], {path.name: None}))
        del self._now[path]

    def cut(self, n: int, target: Path, happens: Callable[[], bool]) -> None:
        """Make at `target` what is under `root` after `n` deeds and a power cut; `happens` decides of the unsynced."""
        nodes = self._nodes(n)
        self._make(nodes, 0, target, happens)

    def _nodes(self, n: int) -> dict[int, _Node]:
        nodes = {0: _Node(is_folder=True)}
        for kind, number, *rest in self.deeds[:n]:
            node = nodes[number]
            if kind == "create":
                name, new, is_folder = rest
                nodes[new] = _Node(is_folder)
                node.since.append({name: new})
            elif kind == "sync":
                node.names, node.content = _names(node, lambda: True), _content(node, lambda: True)
                node.since = []
            else:
                node.since.append(rest[0] if rest else None)
        return nodes

    def _make(self, nodes: dict[int, _Node], number: int, path: Path, happens: Callable[[], bool]) -> None:
        node = nodes[number]
        if not node.is_folder:
            path.write_bytes(_content(node, happens))
            return
        path.mkdir()
        for name, inner in _names(node, happens).items():
            self._make(nodes, inner, path / name, happens)


def _names(node: _Node, happens: Callable[[], bool]) -> Names:
    names: dict[str, int | None] = dict(node.names)
    for change in node.since if node.is_folder else []:
        if happens():
            names.update(change)
    return {name: number for name, number in names.items() if number is not None}


def _content(node: _Node, happens: Callable[[], bool]) -> bytes:
    """`None` empties the file. A write that does not happen is a hole where a later one does."""
    content = node.content
    length = len(content)
    for data in [] if node.is_folder else node.since:
        if data is None:
            content, length = (b"", 0) if happens() else (content, 0)
        else:
            if happens():
                content = content[:length].ljust(length, b"\0") + data + content[length + len(data) :]
            length += len(data)
    return content


@contextmanager
def watched(root: Path) -> Iterator[Log]:
    """Note what recordings under `root`, which is empty, do to the disk."""
    log = Log(root)
    with mock.patch.object(disk, "os", log):
        yield log


def cut(kind: str, random: np.random.Generator) -> Callable[[], bool]:
    """Whether something that was not synced has happened, for each in turn; `kind` of `KINDS`."""
    share = KINDS[kind]
    return lambda: bool(random.random() < share)
