"""A run as its record has it: what the robot saw, and what the policy was asked and answered, episode by episode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.storage.growing import read_table
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.deploy.hardware.limits import Limits
from action_diffusion.deploy.records.stream import RECORD
from action_diffusion.errors import InputError

Rows = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Recorded:
    """One episode of T steps of a record.

    Attributes:
        seed: its start, which its noise is drawn from.
        seen: observations and `action`, [T, …] each.
        steps: see `stream.STEPS`, [T] each.
        answers: requested control step → the row of `chunks`.
        chunks: see `stream.CHUNKS`.
    """

    seed: int
    seen: Rows
    steps: Rows
    answers: Mapping[int, int]
    chunks: Rows


def open_record(path: Path) -> tuple[dict[str, Any], list[Recorded]]:
    """What the record at `path`, or in the folder of its run, says of the run, and its episodes.

    Raises `InputError` for what is no record, and for one that lacks steps.
    """
    path = path / RECORD if (path / RECORD).exists() else path
    buffer = ReplayBuffer.open(path)
    if buffer.attrs.get("kind") != "deployment":
        raise InputError(f"{path} is a replay buffer, but no record of a deployment")
    if buffer.attrs.get("trials"):
        raise InputError(f"{path} is of trials, in which several policies ran: it cannot be replayed")
    steps, chunks = read_table(path, "steps"), read_table(path, "chunks")
    episodes, first, since = [], 0, -np.inf
    for index, end in enumerate(int(end) for end in buffer.episode_ends):
        rows = {key: column[first:end] for key, column in steps.items()}
        if not np.array_equal(rows["step"], np.arange(end - first)):
            raise InputError(f"{path}: episode {index} lacks steps, so it cannot be replayed")
        until = float(rows["sent"][-1])
        inside = np.flatnonzero((chunks["asked"] > since) & (chunks["asked"] <= until))
        answers = {int(chunks["requested_step"][row]): int(row) for row in inside}
        episodes.append(Recorded(int(rows["seed"][0]), buffer.episode(index), rows, answers, chunks))
        first, since = end, until
    return dict(buffer.attrs), episodes


def plain_limits(limits: Limits) -> dict[str, list[float | str]]:
    """Limits as JSON has them, without infinite numbers."""
    return {
        name: [value if np.isfinite(value) else str(value) for value in values]
        for name, values in limits.plain().items()
    }


def read_limits(values: Mapping[str, Sequence[float | str]]) -> Limits:
    """The inverse of `plain_limits`."""
    return Limits(**{name: np.array([float(value) for value in row]) for name, row in values.items()})
