"""What does not move although other things do, and what does not move at all.

frozen      4 or more rows that repeat the one before them (5 alike), while something else moves
dropped     1 to 3 of them in a camera: a frame that did not come in time
constant    a dimension that does not change in one episode, though in nearly all others
saturated   a dimension at the very limit of its range for 5 rows or more, where it seldom is
idle        nothing moves at an episode's beginning or end, for a second and 10 rows or more
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from action_diffusion.datasets.doctor.finding import Finding
from action_diffusion.datasets.doctor.motion import too_large
from action_diffusion.datasets.doctor.runs import named, runs, runs_in_episodes, usual_steps
from action_diffusion.datasets.doctor.survey import Survey, Values, is_action

FROZEN = 4
"""Rows that repeat the one before."""
RARE = 0.02
"""Share of rows that may repeat the one before while other things move; beyond it that is how the key is."""
MOVED = 0.25
"""Of the median motion: from there on something moves, and a frame should show it."""
SATURATED = 5
AT_ENDS = 0.2
"""Share of rows at the limits, beyond which a dimension lives there."""
USUAL_EPISODES = 0.15
"""Share of episodes with such stays, beyond which they are usual."""
IDLE_ROWS = 10
IDLE = 0.05
"""Of what 99 % of the steps stay below."""
MOVES_ELSEWHERE = 0.8


def motion(survey: Survey, without: str = "") -> np.ndarray:
    """[N]: the largest step of any observation but `without`, as a share of that key's median step
    when it moves."""
    most = np.zeros(survey.n_rows)
    keys = [key for key in survey.observations if key != without] or [key for key in survey.low if key != without]
    parts = [np.where(survey.low[key].motion, survey.low[key].steps, 0) for key in keys]
    spread = [np.where(low.motion, low.values.std(axis=0), 1) for low in (survey.low[key] for key in keys)]
    steps = [(part / np.where(size > 0, size, 1)).max(axis=1) for part, size in zip(parts, spread, strict=True)]
    steps += [camera.steps for key, camera in survey.cameras.items() if key != without]
    for step in steps:
        if (step > 0).any():
            most = np.maximum(most, step / np.median(step[step > 0]))
    return most


def repeated(survey: Survey) -> Iterator[Finding]:
    """Frozen rows, and single frames that did not come."""
    columns = {key: low.repeats for key, low in survey.low.items() if low.motion.any() and not is_action(key)}
    columns |= {key: camera.repeats for key, camera in survey.cameras.items()}
    for key, repeats in columns.items():
        moved = motion(survey, key) > MOVED
        stale = repeats & moved
        share = float(stale[~survey.first].mean()) if (~survey.first).any() else 0.0
        if share > RARE:
            if key in survey.cameras:
                words = f"{share:.0%} of the frames repeat the one before while other things move"
                advice = "the camera is slower than the recording: record at its rate; or what moves is not in its view"
                yield Finding("dropped", key, None, 0, survey.n_rows - 1, share / RARE, words, advice)
            continue
        for episode, first, last in runs_in_episodes(repeats, survey):
            n, n_moved = last - first + 1, int(stale[first : last + 1].sum())
            if n >= FROZEN and n_moved:
                words = f"{n} rows repeat row {first - 1} while other keys move"
                yield Finding("frozen", key, episode, first, last, n / FROZEN, words)
            elif n_moved and key in survey.cameras:
                words = f"{'repeats' if n == 1 else f'{n} rows repeat'} row {first - 1} while other keys move"
                advice = "cut out the row, or take the frame of the next one"
                yield Finding("dropped", key, episode, first, last, float(n), words, advice)


def _lives_at_ends(low: Values) -> np.ndarray:
    """[D]: whether a dimension usually is at its smallest or largest value, as a gripper that opens and closes."""
    with np.errstate(invalid="ignore"):
        finite = np.where(np.isfinite(low.raw), low.raw, low.values)
        return np.asarray(((finite == finite.min(axis=0)) | (finite == finite.max(axis=0))).mean(axis=0) > AT_ENDS)


def constant(survey: Survey) -> Iterator[Finding]:
    """A dimension that never moves at all is meant so: a height that is kept, a gripper that nobody used."""
    for key, low in survey.low.items():
        still = np.stack([(low.steps[s:e] == 0).all(axis=0) for s, e in zip(survey.starts, survey.ends, strict=True)])
        long = survey.ends - survey.starts >= 10
        usually_moves = (
            low.motion
            & ~_lives_at_ends(low)
            & (still[long].mean(axis=0) <= 1 - MOVES_ELSEWHERE if long.any() else False)
        )
        for episode in np.flatnonzero(long & (still & usually_moves).any(axis=1)):
            dimensions = np.flatnonzero(still[episode] & usually_moves)
            start, end = int(survey.starts[episode]), int(survey.ends[episode])
            words = f"{named(dimensions, len(low.motion))}{low.raw[start, dimensions[0]]:g} in the whole episode"
            dims = tuple(map(int, dimensions))
            yield Finding("constant", key, int(episode), start, end - 1, 1.0, words, dimensions=dims)


def saturated(survey: Survey) -> Iterator[Finding]:
    for key, low in survey.low.items():
        found: dict[tuple[int, int, int], list[int]] = {}
        jumped = too_large(survey, low)
        for d in np.flatnonzero(low.motion & ~_lives_at_ends(low)):
            sound = np.isfinite(low.raw[:, d]) & ~np.isin(survey.episode, survey.episode[jumped[:, d]])
            for place in _at_limit(survey, low, int(d), sound) if sound.any() else ():
                found.setdefault(place, []).append(int(d))
        for (episode, first, last), dimensions in found.items():
            n, where = last - first + 1, named(dimensions, low.raw.shape[1])
            words = f"{where}{n} rows at the limit {low.raw[first, dimensions[0]]:g}"
            severity = n / SATURATED
            yield Finding("saturated", key, episode, first, last, severity, words, dimensions=tuple(dimensions))


def _at_limit(survey: Survey, low: Values, d: int, sound: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Long stays at the smallest or largest value. A thing that often rests is believed only if it does so there in
    three episodes: it rests somewhere, and one such place is the outermost. A limit that many episodes stay at is no
    fault. sound: [N], where no jump has moved the values."""
    raw = low.raw[:, d]
    rests = np.mean(low.steps[~survey.first, d] == 0) > 0.2 if (~survey.first).any() else True
    for limit in (raw[sound].min(), raw[sound].max()):
        stays = [stay for stay in runs_in_episodes(raw == limit, survey) if stay[2] - stay[1] + 1 >= SATURATED]
        n_episodes = len({episode for episode, _, _ in stays})
        if n_episodes > (2 if rests else 0) and n_episodes <= max(2, USUAL_EPISODES * len(survey.ends)):
            yield from stays


def idle(survey: Survey, rate: float | None) -> Iterator[Finding]:
    """rate: rows a second, where it is known."""
    least = max(IDLE_ROWS, round(rate or 0))
    moving = np.zeros(survey.n_rows, bool)
    keys = [low for low in survey.low.values() if low.motion.any()]
    for low in keys:
        usual = usual_steps(low.steps[~survey.first], 0.99)
        moving |= ((low.steps > IDLE * usual) & low.motion).any(axis=1)
    if not keys:  # images alone
        for camera in survey.cameras.values():
            moving |= camera.steps > IDLE * usual_steps(camera.steps[~survey.first][:, None], 0.99)[0]
    for episode, (start, end) in enumerate(zip(survey.starts, survey.ends, strict=True)):
        for first, last in runs(~moving[start + 1 : end]) + start + 1:
            n = int(last - first + 1)
            head = first == start + 1
            if n >= least and (head or last == end - 1):
                rows = (int(start), int(last - 1)) if head and last != end - 1 else (int(first), int(last))
                words = f"nothing moves in the {'first' if head else 'last'} {n} rows"
                yield Finding("idle", "all", episode, *rows, n / least, words)
