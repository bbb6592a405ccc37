"""All checks on one buffer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from action_diffusion.datasets.doctor import values
from action_diffusion.datasets.doctor.copies import duplicates
from action_diffusion.datasets.doctor.finding import KINDS, Finding, ordered
from action_diffusion.datasets.doctor.leaks import leaks
from action_diffusion.datasets.doctor.missing import missing_rows
from action_diffusion.datasets.doctor.motion import jumps_and_outliers
from action_diffusion.datasets.doctor.skew import skews
from action_diffusion.datasets.doctor.still import constant, idle, repeated, saturated
from action_diffusion.datasets.doctor.survey import Survey, survey, temporary_folder
from action_diffusion.datasets.doctor.turns import renamed
from action_diffusion.datasets.storage.growing import TIME, read_table
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.times import rate_of
from action_diffusion.errors import InputError

_LEAST_SOUND = 0.3
"""Share of rows."""


def examine(buffer: ReplayBuffer, kinds: Sequence[str] = tuple(KINDS)) -> list[Finding]:
    """What is wrong with `buffer`, by row. Raises `InputError` where it cannot be read."""
    with np.errstate(all="ignore"), temporary_folder() as folder:  # what is beyond numbers is a finding by itself
        surveyed = survey(buffer, Path(folder))
        return ordered([finding for finding in _all(buffer, surveyed) if finding.kind in kinds])


def _all(buffer: ReplayBuffer, surveyed: Survey) -> list[Finding]:
    time = values.time_column(surveyed) or _recorded_time(buffer)
    rate = control_rate(buffer, None if time is None else time[1])
    found = [
        *values.not_finite(surveyed),
        *jumps_and_outliers(surveyed),
        *renamed(surveyed),
        *repeated(surveyed),
        *constant(surveyed),
        *saturated(surveyed),
        *duplicates(surveyed),
        *leaks(surveyed),
        *idle(surveyed, rate),
        *(values.times(surveyed, time[1], time[0]) if time is not None else ()),
    ]
    sound = _sound(surveyed, found)
    return [*found, *missing_rows(surveyed, sound), *skews(surveyed, sound)]


def _sound(surveyed: Survey, found: Sequence[Finding]) -> np.ndarray:
    """[N]: rows that models may learn from: of episodes in which nothing was found, unless hardly any are left."""
    with_findings = [finding.episode for finding in found if finding.episode is not None and finding.kind != "rotation"]
    sound = ~np.isin(surveyed.episode, with_findings)
    return sound if sound.mean() >= _LEAST_SOUND else np.ones(surveyed.n_rows, bool)


def control_rate(buffer: ReplayBuffer, time: np.ndarray | None) -> float | None:
    """Rows a second, as the attributes say, or else the `time` [N] (s) of the rows."""
    said = buffer.attrs.get("control_rate") or buffer.attrs.get("fps")
    if isinstance(said, int | float) and said > 0:
        return float(said)
    return None if time is None else rate_of(time, buffer.episode_ends)


def _recorded_time(buffer: ReplayBuffer) -> tuple[str, np.ndarray] | None:
    """When each row of a deployment's record was (s)."""
    if buffer.attrs.get("kind") != "deployment" or buffer.path is None:
        return None
    try:
        time = read_table(buffer.path, "steps")[TIME]
    except (InputError, KeyError):
        return None
    return (f"steps/{TIME}", time) if len(time) == buffer.n_steps else None
