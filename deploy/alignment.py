"""Observations of one instant from sources that measure at times of their own.

camera front   ▢           ▢           ▢           ▢              frames arrive late
camera wrist        ▢           ▢           ▢                     and at different times
state          ·  ·  ·  ·  ·  ·  ·  ·  ·  ·  ·  ·  ·  ·
                                           ▲                tick
                                           the latest instant of which all sources know:
                                           the frame nearest to it, the state interpolated
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.spatial.transform import Rotation

from action_diffusion.deploy.protocols import Group
from action_diffusion.deploy.rings import Record, RingReader

FRAMES, STATES = 8, 200


def latest_common(t: float, sources: Sequence[RingReader]) -> float | None:
    """The latest instant (s), not after `t`, of which all `sources` have a record or know the next one; None: empty."""
    newest = [source.latest() for source in sources]
    return None if any(record is None for record in newest) else min([t, *(record.t for record in newest if record)])


def nearest(ring: RingReader, t: float) -> Record:
    """The record captured nearest to `t`. Raises `LookupError` for an empty ring."""
    records = ring.last(min(FRAMES, ring.n_slots - 1))
    if not records:
        raise LookupError("no frame yet")
    return min(records, key=lambda record: abs(record.t - t))


def interpolated(ring: RingReader, groups: Sequence[Group], t: float) -> dict[str, np.ndarray]:
    """A state at `t`, group by group, float64 [size]: between the two records around `t`, or the nearest one.

    Raises `LookupError` for an empty ring.
    """
    records = ring.last(min(STATES, ring.n_slots - 1))
    if not records:
        raise LookupError("no state yet")
    before = next((i for i in range(len(records) - 1, -1, -1) if records[i].t <= t), 0)
    a, b = records[before], records[min(before + 1, len(records) - 1)]
    share = float(np.clip((t - a.t) / (b.t - a.t), 0.0, 1.0)) if b.t > a.t else 0.0
    return {group.name: _between(group, a.values, b.values, share) for group in groups}


def _between(group: Group, a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], share: float) -> np.ndarray:
    start, end = a[group.name], b[group.name]
    if group.kind == "hold":
        return start if share < 1 else end
    if group.kind == "linear":
        return start + share * (end - start)
    first = Rotation.from_rotvec(start)
    return (first * Rotation.from_rotvec(share * (first.inv() * Rotation.from_rotvec(end)).as_rotvec())).as_rotvec()
