"""Several buffers as one, whose rows stay where they are: `data=[a.zarr,b.zarr]`.

episodes of a    | 0 | 1 | 2 |
episodes of b    | 0 | 1 |         make     | a0 | a1 | a2 | b0 | b1 |
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from action_diffusion.datasets.batches.columns import SeenColumn
from action_diffusion.datasets.images.pictures import picture
from action_diffusion.datasets.robomimic.attributes import DEMO, joined_demos
from action_diffusion.datasets.storage.pieces import JoinedColumn, Piece, check_rates_and_units, units_of
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.rotations import ROTATIONS, as_attribute, declared_rotations
from action_diffusion.datasets.storage.store import Column
from action_diffusion.datasets.storage.tasks import TASK, TASKS, joined_tasks, task_words
from action_diffusion.errors import InputError


def joined(buffers: Sequence[ReplayBuffer], needed: Collection[str]) -> ReplayBuffer:
    """The episodes of all `buffers`, one after the other, with the columns that all of them have.

    needed: columns that all must have, unless none has them. Numbers of other types become the wider one; pictures that
    are stored otherwise in one than in another become what a policy sees of them. Other columns that are not alike are
    left out, with the reason.

    Raises `InputError` for a buffer that is there twice, a needed column that one lacks or has of another shape, and
    where two say other rates, units or rotations.
    """
    _check_once(buffers)
    check_rates_and_units(buffers)
    keys = dict.fromkeys(key for buffer in buffers for key in buffer.keys if key not in (DEMO, TASK))
    differences = {key: difference for key in keys if (difference := _difference(buffers, key))}
    for key in needed:
        if key in differences:
            raise InputError(f"{differences[key]}: what is trained on together needs the same columns")
    parts = [_alike(buffer, buffers, [key for key in keys if key not in differences]) for buffer in buffers]
    pieces = [Piece(part, 0, part.n_steps) for part in parts]
    columns: dict[str, Column] = {key: JoinedColumn(key, pieces) for key in parts[0].keys}
    attrs = _attrs(buffers)
    _add_demos(buffers, columns, attrs)
    _add_tasks(buffers, columns, attrs)
    firsts = np.cumsum([0, *(buffer.n_steps for buffer in buffers[:-1])])
    return ReplayBuffer(
        columns=columns,
        episode_ends=np.concatenate(
            [buffer.episode_ends + first for buffer, first in zip(buffers, firsts, strict=True)]
        ),
        attrs=attrs,
        path=None,
        left_out={key: reason for buffer in buffers for key, reason in buffer.left_out.items()} | differences,
        name=" and ".join(buffer.name for buffer in buffers),
        paths=[path for buffer in buffers for path in buffer.paths],
        parts=[buffer.n_episodes for buffer in buffers],
        remote=any(buffer.remote for buffer in buffers),
    )


def _check_once(buffers: Sequence[ReplayBuffer]) -> None:
    seen: dict[Any, ReplayBuffer] = {}
    for buffer in buffers:
        for path in buffer.paths:
            if path.resolve() in seen:
                raise InputError(f"data= names {buffer.name} twice: its episodes would be trained on and held out")
            seen[path.resolve()] = buffer


def _difference(buffers: Sequence[ReplayBuffer], key: str) -> str:
    """Why a column of some is none of all, in words; empty where it is."""
    having = next(buffer for buffer in buffers if key in buffer)
    for other in buffers:
        if key not in other:
            return f"{other.name} has no column {key}, which {having.name} has"
        ours, theirs = having[key], other[key]
        pictures = [picture(column.shape, column.dtype) for column in (ours, theirs)]
        shown = [found and found.seen and found.size for found in pictures]
        if (shown[0] or shown[1]) and shown[0] == shown[1]:
            continue  # told apart by how they are stored only
        if ours.shape[1:] != theirs.shape[1:] or (any(pictures) and ours.dtype != theirs.dtype):
            return (
                f"{key} has rows {list(theirs.shape[1:])} of {theirs.dtype} in {other.name}, and "
                f"{list(ours.shape[1:])} of {ours.dtype} in {having.name}"
            )
    return ""


def _alike(buffer: ReplayBuffer, buffers: Sequence[ReplayBuffer], keys: Sequence[str]) -> ReplayBuffer:
    """The columns `keys` of `buffer`, pictures as they are seen where they are stored otherwise elsewhere."""
    columns: dict[str, Column] = {}
    for key in keys:
        stored = {(other[key].shape[1:], other[key].dtype) for other in buffers}
        shown = picture(buffer[key].shape, buffer[key].dtype)
        columns[key] = SeenColumn(buffer, key) if shown and len(stored) > 1 else buffer[key]
    return ReplayBuffer(columns=columns, episode_ends=buffer.episode_ends, attrs={}, path=None)


def _attrs(buffers: Sequence[ReplayBuffer]) -> dict[str, Any]:
    """What training takes of the attributes, from the first that says it."""
    names = ("control_rate", "fps", "env_args")
    attrs = {name: buffer.attrs[name] for buffer in reversed(buffers) for name in names if name in buffer.attrs}
    units = {key: unit for buffer in reversed(buffers) for key, unit in units_of(buffer).items()}
    sources = dict.fromkeys(str(buffer.attrs.get("source") or buffer.name) for buffer in buffers)
    rotations = _rotations(buffers)
    said = {"units": units, ROTATIONS: rotations}
    return attrs | {"source": " and ".join(sources)} | {name: value for name, value in said.items() if value}


def _rotations(buffers: Sequence[ReplayBuffer]) -> dict[str, list[str]]:
    """Which columns are rotations, as any of them says it. Raises `InputError` where two say otherwise of one."""
    found: dict[str, tuple[list[str], ReplayBuffer]] = {}
    for buffer in buffers:
        for key, texts in as_attribute(declared_rotations(buffer)).items():
            before, other = found.setdefault(key, (texts, buffer))
            if before != texts:
                raise InputError(
                    f"{buffer.name}: {key} has the rotations {', '.join(texts)}, {other.name} has {', '.join(before)}: "
                    "what is trained on together needs the same numbers"
                )
    return {key: texts for key, (texts, _) in found.items()}


def _add_demos(buffers: Sequence[ReplayBuffer], columns: dict[str, Column], attrs: dict[str, Any]) -> None:
    if any("subsets" in buffer.attrs for buffer in buffers):
        attrs["demos"], attrs["subsets"] = joined_demos(buffers)
        lengths = np.concatenate([np.diff(buffer.episode_ends, prepend=0) for buffer in buffers])
        columns[DEMO] = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)


def _add_tasks(buffers: Sequence[ReplayBuffer], columns: dict[str, Column], attrs: dict[str, Any]) -> None:
    if any(task_words(buffer.attrs) != [""] for buffer in buffers):
        attrs[TASKS], columns[TASK] = joined_tasks([(buffer, 0, buffer.n_steps) for buffer in buffers])
