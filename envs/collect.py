"""`action-diffusion collect`: a scripted expert's episodes into a replay buffer.

Where the episodes begin, and what is recorded of them, `demonstration` says. Simulators of arms record in as many
processes as there are cores, or on the machines of a Ray cluster; what is collected does not depend on where.

The demonstrations in the package, `datasets/embedded/pusht_expert.zarr.zip`, are 932 episodes. The first 400 are made
anew by

    action-diffusion collect task=pusht_state agent=expert episodes=200 output=a.zarr
    action-diffusion collect task=pusht_state agent=expert episodes=200 seed=1000 output=b.zarr

The other 532 begin where a policy that learned from these, in 1,000 optimiser steps, got to from the starts 2000 to
2199, once to three times an episode (`visited_by=` does so once): where it goes wrong is where it needs to be shown
the way (DAgger: Ross et al. 2011).
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion import __version__, envs
from action_diffusion.datasets.robomimic.attributes import pack
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.envs.demonstration import EXPERTS, Demonstrator, Recording, RecordOrder, Source
from action_diffusion.envs.workers import ATTEMPTS, Lost, Workers, count, each, open_simulators
from action_diffusion.errors import InputError, unknown
from action_diffusion.options import Collect
from action_diffusion.progress import progress

SEEN = ("image", "depth", "points")
"""Kinds of observations that are recorded where a task names them."""
FIRST_TEST_SEED = 100_000  # evaluations begin here; no demonstration does


def run(config: Collect) -> dict[str, Any]:
    """`collect` with the values of `configs/collect.yaml`."""
    env = config.task.env
    if env is None:
        raise InputError(f"task={config.task.name} has no simulator to collect in")
    return collect(
        env_name=env["name"],
        settings=_settings(env),
        # A camera whose pictures are kept under another name is rendered from the states when it is trained on.
        cameras=[key for key, value in config.task.seen.items() if value.kind in SEEN and value.source == key],
        agent_name=config.agent,
        episodes=config.episodes,
        seed=config.seed,
        output=config.output,
        min_score=config.min_score,
        visited_by=config.visited_by,
        workers=config.workers,
    )


def _settings(env: Mapping[str, Any]) -> dict[str, Any]:
    """Of an environment of Gymnasium, which is one of many; others record with their own defaults, but for how they are
    seen."""
    given = {key: value for key, value in env.items() if key != "name" and value is not None}
    return (
        given
        if env["name"] == "gymnasium"
        else {key: given[key] for key in ("points", "turned", "panned") if key in given}
    )


def collect(
    *,
    env_name: str,
    settings: Mapping[str, Any] | None = None,
    cameras: Sequence[str] = (),
    agent_name: str = "expert",
    episodes: int,
    seed: int = 0,
    output: str | Path,
    min_score: float = 0.98,
    visited_by: str | Path | None = None,
    max_attempts: int | None = None,
    workers: Workers = None,
) -> dict[str, Any]:
    """Write `episodes` episodes of an expert to the replay buffer `output` (DIR.zarr or FILE.zarr.zip).

    Starts are `seed`, `seed` + 1, …; what is collected depends on nothing else. An episode whose score stays
    below `min_score` is discarded, and counted. At most `max_attempts` (3 x `episodes` + 10) episodes are tried;
    Ctrl-C ends early too. Either way the episodes so far are kept.

    settings: of the simulator, where it is one of many.

    visited_by: a bundle; every episode begins where its policy gets to in 10 to 150 steps, instead of as usual.
    workers: processes, or a Ray cluster (`workers.Workers`); None for as many as there are cores, where an episode
    takes long enough to be worth it.

    Columns: what the simulator says is worth recording and the `cameras`, as observed; `action` float32 [N, A], and
    `reward` float32 [N] for the step that the action began. Returns the numbers to report. Raises `InputError` for an
    unknown environment or agent, an output that exists, starts that belong to evaluation, and where not one episode
    was good enough.
    """
    output = Path(output).expanduser()
    limit = max_attempts if max_attempts is not None else 3 * episodes + 10
    _check(env_name, agent_name, episodes, seed, seed + limit, output)
    if workers is None and env_name in envs.IN_PROCESSES:
        workers = os.cpu_count()
    visited = None if visited_by is None else str(Path(visited_by).expanduser())
    source = Source(env_name, settings or {}, tuple(cameras), visited)
    kept: dict[int, Recording] = {}
    discarded, interrupted = 0, False
    try:
        with progress(f"collecting {episodes} episodes", episodes) as advance:
            for start, recording in _recordings(source, range(seed, seed + limit), episodes, min_score, workers):
                if recording.score < min_score:
                    discarded += 1
                else:
                    kept[start] = recording
                    advance(1)
    except KeyboardInterrupt:
        interrupted = True
    if not kept:
        raise InputError(f"nothing collected: {discarded} episodes scored below min_score={min_score}")
    recordings = [kept[start] for start in sorted(kept)]
    attrs = {"task": env_name, "source": "scripted expert", "version": __version__, "seeds": sorted(kept)}
    _buffer(recordings, attrs, str(output)).save(output)
    return _summary(recordings, discarded=discarded, wanted=episodes, interrupted=interrupted, output=output)


def _recordings(
    source: Source, starts: range, wanted: int, min_score: float, workers: Workers
) -> Iterator[tuple[int, Recording]]:
    """(start, recording) as they are done, of the first starts that it takes to get `wanted` good ones, no others.

    A start that its worker dies of each time is left out, with a word.
    """
    if isinstance(workers, int) and min(workers, wanted) == 1:
        workers = None
    simulators = open_simulators(functools.partial(Demonstrator, source), min(count(workers), wanted), workers)
    try:
        good = begun = 0
        while good < wanted and begun < len(starts):
            now = starts[begun : begun + wanted - good]
            begun += len(now)
            for start, recording in each(simulators, {start: RecordOrder(start) for start in now}):
                if isinstance(recording, Lost):
                    lost = f"its simulator was lost {ATTEMPTS} times ({recording.reason})"
                    warnings.warn(f"start {start}: {lost}; it is left out", stacklevel=2)
                    continue
                good += recording.score >= min_score
                yield start, recording
    finally:
        simulators.close()


def _check(env_name: str, agent_name: str, episodes: int, first: int, end: int, output: Path) -> None:
    if env_name not in EXPERTS:
        raise unknown("environment", env_name, EXPERTS, where="the scripted experts")
    if agent_name != "expert":
        raise unknown("agent", agent_name, ["expert", "teleop", "corrections"])
    if episodes < 1:
        raise InputError(f"episodes={episodes}: collect at least one")
    if first < 0 or end > FIRST_TEST_SEED:
        raise InputError(
            f"seed={first}: demonstrations may use the starts 0 to {FIRST_TEST_SEED - 1}, and this one could "
            f"need those up to {end - 1}; evaluations begin at {FIRST_TEST_SEED}"
        )
    if output.exists():
        raise InputError(f"output={output} exists: choose another path, or remove it")


def _buffer(recordings: Sequence[Recording], attrs: Mapping[str, Any], where: str) -> ReplayBuffer:
    columns = {
        key: np.concatenate([recording.columns[key] for recording in recordings]) for key in recordings[0].columns
    }
    scenes = [recording.scene for recording in recordings]
    if any(scenes):
        packed = pack(((f"data/demo_{index}", scene) for index, scene in enumerate(scenes)), where)
        attrs = {**attrs, "hdf5_attributes": packed}
    return ReplayBuffer.from_arrays(columns, np.cumsum(_lengths(recordings)), {**recordings[0].attrs, **attrs})


def _lengths(recordings: Sequence[Recording]) -> list[int]:
    return [len(recording.columns["reward"]) for recording in recordings]


def _summary(
    recordings: Sequence[Recording], *, discarded: int, wanted: int, interrupted: bool, output: Path
) -> dict[str, Any]:
    lengths = _lengths(recordings)
    summary: dict[str, Any] = {
        "output": str(output),
        "episodes": len(recordings),
        "steps": sum(lengths),
        "median_length": int(np.median(lengths)),
        "mean_score": round(float(np.mean([recording.score for recording in recordings])), 4),
        "discarded": discarded,
    }
    if len(recordings) < wanted:
        why = "interrupted" if interrupted else "attempts used up"
        summary["incomplete"] = f"{why}: {len(recordings)} of {wanted} episodes kept"
    return summary
