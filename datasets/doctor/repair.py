"""A repaired copy of a buffer: what can be mended is, what cannot is left out, and the original is not touched.

    nan, outlier    interpolated between the rows before and after, for up to 5 rows of a low-dimensional key;
                    otherwise cut out like frozen rows
    dropped, jump, timing     the episode is split there: windows must not span a gap
    frozen          the rows are cut out, and the episode is split there
    rotation        one name along each episode; the copy says what it is
    skew            the camera's frames are shifted by the lag, and the ends without a frame cut off
    constant        the episode is dropped
    saturated       left alone: what lies beyond the limit is lost, and the rest is right
    duplicate       the copied rows are dropped
    idle            the rows are trimmed

What is left of an episode in pieces of less than 10 rows is dropped, unless it was that short.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.doctor.finding import Finding, counted
from action_diffusion.datasets.doctor.turns import placed
from action_diffusion.datasets.storage.pieces import Changed, Piece, write_pieces
from action_diffusion.datasets.storage.provenance import with_provenance
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.rotations import ROTATIONS, as_attribute, declared_rotations
from action_diffusion.errors import InputError
from action_diffusion.rotations import continuous_rows, parse_rotations

MENDED_ROWS = 5
LEAST_ROWS = 10
_SPLITS = ("dropped", "jump", "timing")
_CUTS = ("nan", "outlier", "frozen", "duplicate", "idle", "dropped")
_LEFT = ("saturated",)


def repair(buffer: ReplayBuffer, findings: Sequence[Finding], output: Path) -> list[str]:
    """Writes the copy, and returns lines that say what was done.

    Raises `InputError` where `output` exists, or nothing would be left.
    """
    mended = [finding for finding in findings if _interpolates(buffer, finding)]
    rest = [finding for finding in findings if finding not in mended and _treatable(finding)]
    left = [finding for finding in findings if finding not in mended and finding not in rest]
    what = f"doctor --fix: {counted((*mended, *rest)) or 'nothing'}"
    turned, said = _turned(buffer, [finding for finding in rest if finding.kind == "rotation"])
    pieces = list(_pieces(_mended(turned, mended), rest))
    if not pieces:
        raise InputError(f"{buffer.name}: nothing would be left of it")
    write_pieces(output, pieces, with_provenance(buffer, what) | said)
    steps = sum(map(len, pieces))
    lines = [f"{output}: {len(pieces)} episodes, {steps} of {buffer.n_steps} rows; {what}"]
    if left:
        lines.append(f"left alone: {counted(left)}")
    return lines


def _treatable(finding: Finding) -> bool:
    of_all = finding.episode is None and finding.kind != "skew"
    return not of_all and finding.kind not in _LEFT


def _interpolates(buffer: ReplayBuffer, finding: Finding) -> bool:
    few = finding.last - finding.first < MENDED_ROWS
    low = finding.key in buffer and len(buffer[finding.key].shape) < 4 and buffer[finding.key].dtype.kind == "f"
    return finding.kind in ("nan", "outlier") and few and low


def _turned(buffer: ReplayBuffer, findings: Sequence[Finding]) -> tuple[ReplayBuffer, dict[str, Any]]:
    """The same with rotations that are continuous along each episode, and the attribute that says which these are."""
    starts = np.concatenate([[0], buffer.episode_ends[:-1]])
    rotations = dict(declared_rotations(buffer))
    for key in sorted({finding.key for finding in findings}):
        column = buffer[key]
        values = np.array(column[:])
        flat = values.reshape(len(values), -1)
        texts = sorted({finding.rotation for finding in findings if finding.key == key})
        rotations[key] = rotations.get(key) or parse_rotations(texts, flat.shape[1], key)
        for rotation in rotations[key]:
            around = placed(rotation, flat, starts)
            for start, end in zip(starts, buffer.episode_ends, strict=True):
                flat[start:end, rotation.columns] = continuous_rows(flat[start:end], around)
        buffer = buffer.with_column(key, values)
    return buffer, {ROTATIONS: as_attribute(rotations)} if rotations else {}


def _mended(buffer: ReplayBuffer, findings: Sequence[Finding]) -> ReplayBuffer:
    """The same with interpolated values in the rows and dimensions of `findings`."""
    for key in sorted({finding.key for finding in findings}):
        column = buffer[key]
        values = np.array(column[:])
        flat = values.reshape(len(values), -1)
        changed = np.zeros(flat.shape, bool)
        for finding in findings:
            if finding.key == key:
                changed[finding.first : finding.last + 1, list(finding.dimensions)] = True
        for finding in findings:
            if finding.key == key and finding.episode is not None:
                _interpolate(flat, changed, finding, *_bounds(buffer, finding.episode))
        rows = np.flatnonzero(changed.any(axis=1))
        buffer = buffer.with_column(key, Changed(column, rows, values[rows]))
    return buffer


def _interpolate(flat: np.ndarray, changed: np.ndarray, finding: Finding, start: int, end: int) -> None:
    for d in finding.dimensions:
        good = np.flatnonzero(~changed[start:end, d]) + start
        rows = np.arange(finding.first, finding.last + 1)
        flat[rows, d] = np.interp(rows, good, flat[good, d]) if len(good) else 0


def _pieces(buffer: ReplayBuffer, findings: Sequence[Finding]) -> Iterator[Piece]:
    for episode in range(buffer.n_episodes):
        own = [finding for finding in findings if finding.episode in (episode, None)]
        if any(finding.kind == "constant" for finding in own):
            continue
        start, end = _bounds(buffer, episode)
        gone = np.zeros(end - start, bool)
        edges = np.zeros(end - start, bool)  # a new piece begins here
        for finding in own:
            if finding.kind in _CUTS and not _between(finding):
                gone[max(0, finding.first - start) : finding.last + 1 - start] = True
            elif finding.kind in _SPLITS:
                edges[finding.first - start] = True
        lags = _lags(own, start, end)
        for lag in lags.values():
            rows = np.arange(end - start) - lag  # the frame that shows row t is in row t − lag
            gone |= (rows < 0) | (rows >= end - start)
            edges[1:] |= np.diff(lag) != 0
        least = min(LEAST_ROWS, end - start)
        for first, stop in _stretches(gone, edges):
            if stop - first >= least:
                shifts = {key: -int(lag[first]) for key, lag in lags.items()}
                yield Piece(buffer, start + first, start + stop, shifts)


def _between(finding: Finding) -> bool:
    """Whether a row is missing before this one, and the row itself is right."""
    return finding.kind == "dropped" and finding.key == "all"


def _lags(findings: Sequence[Finding], start: int, end: int) -> dict[str, np.ndarray]:
    """For each camera that is off, the lag of every row of the episode; an episode's own before that of the buffer."""
    lags: dict[str, np.ndarray] = {}
    for finding in sorted(findings, key=lambda finding: finding.episode is not None):
        if finding.kind == "skew":
            lag = lags.setdefault(finding.key, np.zeros(end - start, int))
            lag[max(0, finding.first - start) : finding.last + 1 - start] = finding.lag
    return lags


def _stretches(gone: np.ndarray, edges: np.ndarray) -> Iterator[tuple[int, int]]:
    """[first, stop) of what is left, in pieces that begin after what is gone, and at `edges`."""
    group = np.cumsum(gone | edges | np.concatenate([[False], gone[:-1]]))
    kept = np.flatnonzero(~gone)
    for number in np.unique(group[kept]):
        rows = kept[group[kept] == number]
        yield int(rows[0]), int(rows[-1]) + 1


def _bounds(buffer: ReplayBuffer, episode: int) -> tuple[int, int]:
    """First row of an episode, and the row after its last."""
    return int(buffer.episode_ends[episode - 1]) if episode else 0, int(buffer.episode_ends[episode])
