"""A recording at a lower rate: of each episode the rows nearest to the times of the new rate, from its first row on."""

from __future__ import annotations

import math

import numpy as np

from action_diffusion.datasets.formats.columns import SomeRows
from action_diffusion.datasets.formats.contract import Opened
from action_diffusion.datasets.storage.pieces import SAME_RATE
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.times import timed
from action_diffusion.errors import InputError

_HIGHEST = 1e6
"""Hz: a higher one is none."""


def at_rate(opened: Opened, rate: float | None) -> Opened:
    """What was opened, at `rate` (Hz; None: as it is).

    Where neither its attributes nor its time stamps say another rate, `rate` is its `control_rate`; one that is nearly
    `rate` (`SAME_RATE`) is called that, and every row stays.

    Raises `InputError` for a `control_rate` that is none, and where rows would have to be made up.
    """
    buffer = opened.buffer
    known = buffer.attrs.get("control_rate")
    is_rate = isinstance(known, int | float) and not isinstance(known, bool) and 0 < known <= _HIGHEST
    if known is not None and not is_rate and rate is None:
        raise InputError(f"{buffer.name}: control_rate is {known!r}: give rate=HZ")
    if rate is None or known == rate:
        return opened
    if known is not None and is_rate:
        return _lower(opened, float(known), rate)
    told = timed(buffer)
    if told is not None and not math.isclose(told[1], rate, rel_tol=SAME_RATE):
        return _lower(opened, told[1], rate)
    buffer.attrs["control_rate"] = rate
    return Opened(buffer, opened.left_out, (*opened.said, f"{rate:g} Hz, as rate= says: the source does not say"))


def _lower(opened: Opened, was: float, rate: float) -> Opened:
    buffer = opened.buffer
    if math.isclose(rate, was, rel_tol=SAME_RATE):  # 30 Hz of a camera's 29.97
        buffer.attrs["control_rate"] = rate
        said = (
            f"{rate:g} Hz for {was:g} Hz: every row, {abs(rate / was - 1):.1%} {'faster' if rate > was else 'slower'}"
        )
        return Opened(buffer, opened.left_out, (*opened.said, said))
    if rate > was:
        raise InputError(
            f"rate={rate:g}: {buffer.name} has {was:g} Hz: for a lower rate rows are left out, they are never made up"
        )
    step = was / rate
    step = round(step) if math.isclose(step, round(step), rel_tol=1e-9) else step
    lengths = np.diff(buffer.episode_ends, prepend=0).tolist()
    kept = [_nearest(length, step) for length in lengths]
    rows = np.concatenate(
        [end - length + some for end, length, some in zip(buffer.episode_ends, lengths, kept, strict=True)]
    )
    ends = np.cumsum([len(some) for some in kept])
    listed = ", ".join(map(str, _nearest(math.ceil(4 * step), step)[:4]))
    off = "" if isinstance(step, int) else f", the nearest, up to {500 / was:.1f} ms off"
    said = f"{rate:g} Hz of {was:g} Hz: rows {listed}, … of each episode{off}; {len(rows)} of {buffer.n_steps}"
    columns = {key: SomeRows(buffer[key], rows) for key in buffer.keys}
    attrs = {**buffer.attrs, "control_rate": rate}
    lower = ReplayBuffer(columns=columns, episode_ends=ends, attrs=attrs, path=buffer.path)
    return Opened(lower, opened.left_out, (*opened.said, said))


def _nearest(length: int, step: float) -> np.ndarray:
    """Of rows 0 to `length` those nearest to 0, step, 2 step, …"""
    rows = np.floor(np.arange(math.ceil(length / step)) * step + 0.5).astype(np.int64)
    result: np.ndarray = rows[rows < length]
    return result
