"""Observations of one instant from sources that measure at times of their own.

camera front   ▢           ▢           ▢           ▢              frames arrive late
camera wrist        ▢           ▢           ▢                     and at different times
state          ·  ·  ·  ·  ·  ·  ·  ·  ·  ·  ·  ·  ·  ·
                                           ▲                tick
                                           the latest instant of which all sources know:
                                           the frame nearest to it, the state interpolated
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.spatial.transform import Rotation

from action_diffusion.deploy.hardware.protocols import Group
from action_diffusion.deploy.ipc.rings import Record, RingReader

FRAMES, STATES = 8, 200
"""How many of the newest records are looked at."""


def latest_common(t: float, sources: Sequence[RingReader]) -> float | None:
    """The latest instant (s), not after `t`, up to which all `sources` have records; None where one is empty."""
    newest = [source.times(2)[-1:] for source in sources]
    return min([t, *(moment for ((_, moment),) in newest)]) if all(newest) else None


def nearest(ring: RingReader, t: float) -> Record:
    """The record captured nearest to `t`. Raises `LookupError` for an empty ring."""
    for number, _ in sorted(ring.times(min(FRAMES, ring.n_slots - 1)), key=lambda entry: abs(entry[1] - t)):
        record = ring.read(number)
        if record is not None:  # overwritten since
            return record
    raise LookupError("no frame yet")


def interpolated(ring: RingReader, groups: Sequence[Group], t: float) -> dict[str, np.ndarray]:
    """A state at `t`, group by group, float64 [size]: between the two records around `t`, or the nearest one.

    Raises `LookupError` for an empty ring.
    """
    times = ring.times(min(STATES, ring.n_slots - 1))
    before = max(0, bisect.bisect_right(times, t, key=lambda entry: entry[1]) - 1)
    around = [ring.read(number) for number, _ in times[before : before + 2]]
    a, b = (around[0], around[-1]) if around else (None, None)
    if a is None or b is None:
        raise LookupError("no state yet")
    share = float(np.clip((t - a.t) / (b.t - a.t), 0.0, 1.0)) if b.t > a.t else 0.0
    return {group.name: _between(group, a.values, b.values, share) for group in groups}


def _between(group: Group, a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], share: float) -> np.ndarray:
    start, end = a[group.name], b[group.name]
    if group.kind == "hold":
        return start if share < 1 else end
    if group.kind == "linear":
        result: np.ndarray = start + share * (end - start)
        return result
    first = Rotation.from_rotvec(start)
    turn = share * (first.inv() * Rotation.from_rotvec(end)).as_rotvec()
    turned: np.ndarray = (first * Rotation.from_rotvec(turn)).as_rotvec()
    return turned
