"""Where a buffer comes from: what was done, to which file, and when, in its attribute `provenance`.

    [{"what": "edit drop=3", "source": "demos.zarr", "sha256": "…", "when": "2026-01-31T12:00:00+00:00", "version": …}]

The oldest comes first. A source that has a provenance of its own brings it along.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from action_diffusion import __version__
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer

PROVENANCE = "provenance"
_BLOCK = 1 << 20


def file_hash(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of lines `<SHA-256 of a file>  <its path in the folder>`, by path."""
    if path.is_file():
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()
    files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    lines = (f"{file_hash(path / name)}  {name}\n" for name in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def with_provenance(buffer: ReplayBuffer, what: str, others: Sequence[ReplayBuffer] = ()) -> dict[str, Any]:
    """The attributes of `buffer`, for what is made of it and of `others` by doing `what`.

    A deployment's record has tables beside its rows that are not copied: what is made of it is no such record.
    """
    attrs = {name: value for name, value in buffer.attrs.items() if (name, value) != ("kind", "deployment")}
    steps: list[Mapping[str, Any]] = []
    for source in (buffer, *others):
        steps += source.attrs.get(PROVENANCE, [])
        entry = {"what": what, "source": source.path.name if source.path else "memory"}
        if source.path is not None:
            entry["sha256"] = file_hash(source.path)
        when = datetime.now(UTC).isoformat(timespec="seconds")
        steps.append(entry | {"when": when, "version": __version__})
    return attrs | {PROVENANCE: steps}
