"""`action-diffusion data edit`: which rows and episodes a copy has, and what its episodes are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.batches.sources import open_data
from action_diffusion.datasets.robomimic.attributes import DEMO, demo_names, unique_names
from action_diffusion.datasets.storage.checks import check_key
from action_diffusion.datasets.storage.pieces import Piece, check_alike, write_pieces
from action_diffusion.datasets.storage.provenance import with_provenance
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.rotations import ROTATIONS, as_attribute, declared_rotations
from action_diffusion.datasets.storage.store import Column
from action_diffusion.datasets.storage.tasks import TASK, TASKS, joined_tasks, task_words
from action_diffusion.errors import InputError
from action_diffusion.rotations import RotationColumns


def edit(source: Path, output: Path, wanted: Mapping[str, str]) -> dict[str, Any]:
    """A copy of `source` at `output`, changed as `wanted` says (see the command's help); returns numbers to report.

    Raises `InputError` for what cannot be done, and an `output` that exists.
    """
    if output.exists():
        raise InputError(f"{output} exists: choose another path, or remove it")
    buffer = open_data(source)
    others = [open_data(path) for path in wanted["merge"].split(",")] if "merge" in wanted else []
    check_alike([buffer, *others])
    n, n_rows = buffer.n_episodes, buffer.n_steps
    dropped = set(numbers(wanted["drop"], "drop", n)) if "drop" in wanted else set()
    splits = numbers(wanted["split"], "split", n_rows) if "split" in wanted else []
    trimmed = np.zeros(n_rows, bool)
    for first, last in ranges(wanted["trim"], "trim", n_rows) if "trim" in wanted else ():
        _check_trim(buffer, first, last)
        trimmed[first : last + 1] = True
    parts = [(e, part) for e in range(n) if e not in dropped for part in _kept(buffer, e, trimmed, splits)]
    pieces = [Piece(buffer, first, stop) for _, (first, stop) in parts]
    for other in others:
        starts = np.concatenate([[0], other.episode_ends[:-1]])
        pieces += [Piece(other, int(a), int(b)) for a, b in zip(starts, other.episode_ends, strict=True)]
    what = "edit " + " ".join(f"{name}={text}" for name, text in wanted.items())
    attrs, columns = with_provenance(buffer, what, others), dict[str, Column]()
    if DEMO in buffer or "relabel" in wanted:
        names = [demo_names(buffer)[episode] for episode, _ in parts]
        names += [name for other in others for name in demo_names(other)]
        names = unique_names(names)
        attrs |= {"demos": names, "subsets": _subsets(buffer, others, names, [e for e, _ in parts], wanted)}
        columns[DEMO] = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    if any(task_words(source.attrs) != task_words(buffer.attrs) for source in others):
        attrs[TASKS], columns[TASK] = joined_tasks([(piece.buffer, piece.first, piece.stop) for piece in pieces])
    renames = _renames(buffer, wanted.get("rename"))
    rotations = _rotations(buffer, wanted.get("rotations"))
    if rotations:
        attrs[ROTATIONS] = as_attribute({renames.get(key, key): own for key, own in rotations.items()})
    _write(output, pieces, attrs, columns, renames)
    result = ReplayBuffer.open(output)
    summary: dict[str, Any] = {"output": str(output), "episodes": result.n_episodes, "steps": result.n_steps}
    left_out = {f"{key} ({reason})": None for source in (buffer, *others) for key, reason in source.left_out.items()}
    return summary | ({"left_out": ", ".join(left_out)} if left_out else {})


def _write(
    output: Path, pieces: list[Piece], attrs: Mapping[str, Any], columns: dict[str, Column], renames: Mapping[str, str]
) -> None:
    if renames:
        views = {id(piece.buffer): _renamed(piece.buffer, renames) for piece in pieces}
        pieces = [Piece(views[id(piece.buffer)], piece.first, piece.stop) for piece in pieces]
    write_pieces(output, pieces, attrs, columns)


def _renamed(buffer: ReplayBuffer, renames: Mapping[str, str]) -> ReplayBuffer:
    columns = {renames.get(key, key): buffer[key] for key in buffer.keys}
    return ReplayBuffer(columns=columns, episode_ends=buffer.episode_ends, attrs=buffer.attrs, path=buffer.path)


def _renames(buffer: ReplayBuffer, text: str | None) -> dict[str, str]:
    renames = {}
    for pair in text.split(",") if text else ():
        key, _, name = pair.partition(":")
        _ = buffer[key]  # which says what there is
        if not name:
            raise InputError(f"rename={pair}: expected KEY:NAME")
        check_key(name, f"rename={pair}")
        renames[key] = name
    keys = [renames.get(key, key) for key in buffer.keys]
    if len(set(keys)) < len(keys):
        raise InputError(f"rename={text}: two columns would have the same name")
    return renames


def _rotations(buffer: ReplayBuffer, text: str | None) -> dict[str, tuple[RotationColumns, ...]]:
    """Those that the buffer says, but for columns that `text` (KEY:KIND,…) says something of."""
    given: dict[str, list[str]] = {}
    for pair in text.split(",") if text else ():
        key, _, kind = pair.rpartition(":")
        if not key:
            raise InputError(f"rotations={pair}: expected KEY:KIND, such as eef_quat:quaternion_xyzw")
        given.setdefault(key, []).append(kind)
    return declared_rotations(buffer, given)


def _kept(buffer: ReplayBuffer, episode: int, trimmed: np.ndarray, splits: Sequence[int]) -> list[tuple[int, int]]:
    """Stretches [first, stop) that are left of an episode."""
    end = int(buffer.episode_ends[episode])
    start = int(buffer.episode_ends[episode - 1]) if episode else 0
    kept = np.flatnonzero(~trimmed[start:end]) + start
    if not len(kept):
        return []
    first, stop = int(kept[0]), int(kept[-1]) + 1
    edges = [first, *(row for row in splits if first < row < stop), stop]
    return list(pairwise(edges))


def _check_trim(buffer: ReplayBuffer, first: int, last: int) -> None:
    episode = int(np.searchsorted(buffer.episode_ends, first, side="right"))
    end = int(buffer.episode_ends[episode])
    start = int(buffer.episode_ends[episode - 1]) if episode else 0
    if last >= end or (first > start and last < end - 1):
        raise InputError(
            f"trim={first}-{last}: expected rows at the beginning or the end of an episode; episode {episode} has "
            f"rows {start} to {end - 1} (split= makes two of it)"
        )


def _subsets(
    buffer: ReplayBuffer,
    others: Sequence[ReplayBuffer],
    names: Sequence[str],
    episodes: Sequence[int],
    wanted: Mapping[str, str],
) -> dict[str, list[str]]:
    """Which of the copy's `names` are in which subset. episodes: of `buffer`, those that its first names are of."""
    was = [(buffer, episode) for episode in episodes]
    was += [(other, episode) for other in others for episode in range(other.n_episodes)]
    label: dict[int, str] = {}
    if "relabel" in wanted:
        chosen, _, name = wanted["relabel"].rpartition(":")
        if not chosen or not name:
            raise InputError(f"relabel={wanted['relabel']}: expected EPISODES:NAME")
        label = dict.fromkeys(numbers(chosen, "relabel", buffer.n_episodes), name)
    subsets: dict[str, list[str]] = {}
    old_names = {id(source): demo_names(source) for source in (buffer, *others)}
    for name, (source, episode) in zip(names, was, strict=True):
        if source is buffer and episode in label:
            subsets.setdefault(label[episode], []).append(name)
            continue
        for subset, members in source.attrs.get("subsets", {}).items():
            if old_names[id(source)][episode] in members:
                subsets.setdefault(subset, []).append(name)
    return subsets


def numbers(text: str, option: str, limit: int) -> list[int]:
    """3,7-9 → [3, 7, 8, 9], below `limit`. Raises `InputError`."""
    return sorted({number for first, last in ranges(text, option, limit) for number in range(first, last + 1)})


def ranges(text: str, option: str, limit: int) -> list[tuple[int, int]]:
    """3,7-9 → [(3, 3), (7, 9)]. Raises `InputError`."""
    found = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InputError(f"{option}={text}: expected numbers and ranges, such as 3,7-9")
        pair = int(first), int(last or first)
        if pair[0] > pair[1] or pair[1] >= limit:
            raise InputError(f"{option}={part}: expected numbers from 0 to {limit - 1}, the smaller one first")
        found.append(pair)
    return found
