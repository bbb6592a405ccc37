"""Which episodes a policy was trained on: kept in its bundle as hashes, so that none of them is taken for a new one.

    episodes.safetensors    trained, held_out    uint32 [n], increasing

The numbers of an episode (states and action, as float32) are hashed in pieces of 8 rows that overlap, one from each row
on. An episode is one of those that were trained on where half of its pieces are theirs: in another order, file or
format, beside other episodes, as a part of one, and with some rows cut out. Four bytes a row are small beside the
weights.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
from safetensors.numpy import load_file

from action_diffusion.datasets.batches.columns import ObsKey, load
from action_diffusion.datasets.batches.loader import BatchSource
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError
from action_diffusion.policy.spec import PolicySpec
from action_diffusion.training.data import TrainingData

FILE = "episodes.safetensors"
PIECE = 8
"""Rows: so many that episodes of few different actions, such as of a keyboard, still differ."""
SHARE = 0.5
"""Of an episode's different pieces: what all episodes begin with is less."""

TRAINED, HELD_OUT, NEW = "trained", "held_out", "new"
_NONE = np.zeros(0, np.uint32)


class Known(NamedTuple):
    """Hashes of the pieces, uint32 [n] each, increasing, of episodes trained on, and of those held out meanwhile."""

    trained: np.ndarray
    held_out: np.ndarray


def record(buffer: ReplayBuffer, spec: PolicySpec, data: TrainingData, earlier: Path | None) -> Known | None:
    """What to keep of a training; None where it is not known.

    earlier: the bundle whose weights training began with, and whose episodes count as well.
    """
    before = None if earlier is None else read(earlier)
    if earlier is not None and before is None:
        return None
    hashes = pieces(buffer, spec)
    trained, held_out = (
        np.unique(np.concatenate([_NONE, *(hashes[e] for e in _episodes(buffer, source))]))
        for source in (data.train, data.held_out)
    )
    if before is not None:
        trained = np.union1d(before.trained, trained)
    return Known(trained, held_out)


def read(bundle: Path) -> Known | None:
    """What a bundle keeps; None of one from before it did. Raises `InputError` for a file that is damaged."""
    file = Path(bundle) / FILE
    if not file.is_file():
        return None
    try:
        found = load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a readable safetensors file: {error}") from None
    for name in Known._fields:
        if name not in found or found[name].dtype != np.uint32 or found[name].ndim != 1:
            raise InputError(f"{file}: no {name!r} of shape [n] and type uint32, the hashes of episodes")
        if (np.diff(found[name].astype(np.int64)) <= 0).any():
            raise InputError(f"{file}: {name!r} does not increase, so it is not the hashes of episodes")
    return Known(found["trained"], found["held_out"])


def recognise(buffer: ReplayBuffer, spec: PolicySpec, known: Known) -> np.ndarray:
    """Of each episode in `buffer` whether the policy was TRAINED on it, or it was HELD_OUT meanwhile, or is NEW."""
    return np.array([_kind(hashes, known) for hashes in pieces(buffer, spec)])


def _kind(pieces: np.ndarray, known: Known) -> str:
    if _holds(pieces, known.trained):
        return TRAINED
    return HELD_OUT if _holds(pieces, known.held_out) else NEW


def _holds(pieces: np.ndarray, hashes: np.ndarray) -> bool:
    """Whether the share of `pieces` is in `hashes`, which increase."""
    place = np.searchsorted(hashes, pieces)
    there = place < len(hashes)
    return bool((hashes[place[there]] == pieces[there]).sum() >= SHARE * len(pieces))


def pieces(buffer: ReplayBuffer, spec: PolicySpec) -> list[np.ndarray]:
    """Of each episode: the different hashes of its pieces, uint32 [n]; one of a whole episode that is shorter."""
    wanted = [
        ObsKey(value.source, value.columns, "state") for _, value in sorted(spec.states.items()) if not value.text
    ]
    wanted.append(ObsKey(spec.action.source, None, "action"))
    columns = [load(buffer, key).reshape(buffer.n_steps, -1) for key in wanted]
    rows = np.concatenate(columns, axis=1, dtype="<f4") + np.float32(0)  # of -0 and 0, one
    bounds = zip(np.concatenate([[0], buffer.episode_ends[:-1]]), buffer.episode_ends, strict=True)
    return [_hashes(rows[first:end]) for first, end in bounds]


def _hashes(rows: np.ndarray) -> np.ndarray:
    data, width = rows.tobytes(), rows[:1].nbytes
    starts = range(0, max(1, len(rows) - PIECE + 1) * width, width)
    digests = (hashlib.blake2b(data[at : at + PIECE * width], digest_size=4).digest() for at in starts)
    return np.unique(np.frombuffer(b"".join(digests), "<u4")).astype(np.uint32)


def _episodes(buffer: ReplayBuffer, source: BatchSource | None) -> np.ndarray:
    """Indices of the episodes that have windows in `source`."""
    return np.searchsorted(buffer.episode_ends, [] if source is None else np.unique(source.windows.end))
