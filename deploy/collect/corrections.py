"""`action-diffusion collect agent=corrections`: what a person did after taking over, as demonstrations (DAgger style).

    steps/operator   policy policy policy │ person person person person person │ policy policy
    steps/held                            │   x                           x    │
    episode                               │        person person person        │

The policy went where it should not be, and the person showed the way back: these are the states that demonstrations
lack, with the actions that belong there (Ross et al. 2011; with a person who decides when: HG-DAgger, Kelly et al.
2019). Each take-over becomes an episode. Train on it together with what the policy learnt from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion import __version__
from action_diffusion.datasets.storage.growing import read_table
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.deploy.records.stream import RECORD
from action_diffusion.errors import InputError
from action_diffusion.options import Collect, Observation


def run(config: Collect) -> dict[str, object]:
    """`collect` with the values of `configs/collect.yaml` (plain data)."""
    if not config.from_:
        raise InputError("agent=corrections needs from=DIR, the output_dir of a deployment in which somebody took over")
    return corrections(
        record=Path(config.from_).expanduser(),
        output=Path(config.output).expanduser(),
        min_steps=config.min_steps,
        sources=sources(config.task.seen),
    )


def sources(observations: Mapping[str, Observation]) -> dict[str, str]:
    """The policy's keys → columns that a task is trained from, for those that are a whole column."""
    return {key: value.source or key for key, value in observations.items() if not value.columns}


def corrections(*, record: Path, output: Path, min_steps: int, sources: Mapping[str, str]) -> dict[str, object]:
    """Write the person's parts of the deployment `record` to a new replay buffer at `output`, an episode each.

    Columns: the policy's observations under the names in `sources`, `action` float32 and, where something measured
    one in every step, `reward`. Parts of fewer than `min_steps` rows are left out, and counted. Returns the numbers to
    report. Raises `InputError` for what is no record, where nobody took over, and for an output that exists.
    """
    record = record / RECORD if (record / RECORD).exists() else record
    if output.exists():
        raise InputError(f"output={output} exists: choose another path, or remove it")
    buffer = ReplayBuffer.open(record)
    if buffer.attrs.get("kind") != "deployment":
        raise InputError(f"from={record} is a replay buffer, but no record of a deployment")
    steps = read_table(record, "steps")
    parts = taken_over(steps, buffer.episode_ends)
    long = [part for part in parts if part.stop - part.start >= min_steps]
    if not long:
        why = f"none of {len(parts)} take-overs has min_steps={min_steps} steps" if parts else "nobody took over"
        raise InputError(f"from={record}: {why}")
    rows = np.concatenate([np.arange(part.start, part.stop) for part in long])
    columns = {sources.get(key, key): np.asarray(buffer[key][:])[rows] for key in buffer.keys}
    columns["action"] = columns["action"].astype(np.float32)
    if np.isfinite(steps["reward"][rows]).all():
        columns["reward"] = steps["reward"][rows].astype(np.float32)
    ends = np.cumsum([part.stop - part.start for part in long])
    ReplayBuffer.from_arrays(columns, ends, attributes(buffer.attrs, steps, long)).save(output)
    return {
        "output": str(output),
        "episodes": len(long),
        "steps": len(rows),
        "left_out": f"{len(parts) - len(long)} of fewer than {min_steps} steps",
        "share_of_the_record": f"{len(rows) / buffer.n_steps:.1%}",
    }


def attributes(attrs: Mapping[str, Any], steps: Mapping[str, np.ndarray], parts: list[slice]) -> dict[str, object]:
    """What the buffer says of itself: where each episode comes from, beside what the record says."""
    kept = {name: attrs[name] for name in ("task", "control_rate") if name in attrs}
    return {
        **kept,
        "source": "corrections of a person",
        "version": __version__,
        "seeds": [int(steps["seed"][part.start]) for part in parts],
        "first_steps": [int(steps["step"][part.start]) for part in parts],
    }


def taken_over(steps: Mapping[str, np.ndarray], episode_ends: np.ndarray) -> list[slice]:
    """The rows in which a person commanded, without a gap: each part from the first command to the last.

    steps: see `stream.STEPS`. A step that was missed, a pause and the end of an episode end a part.
    """
    n = int(episode_ends[-1]) if len(episode_ends) else 0
    person = steps["operator"][:n] & steps["commanded"][:n]
    new = np.ones(n, dtype=bool)
    new[1:] = (np.diff(steps["control_step"][:n]) != 1) | steps["fresh"][1:n] | ~person[:-1]
    new[np.r_[0, episode_ends[:-1]]] = True
    parts = []
    for start in np.flatnonzero(new & person):
        end = start + 1
        while end < n and person[end] and not new[end]:
            end += 1
        said = start + np.flatnonzero(~steps["held"][start:end])
        if len(said):
            parts.append(slice(int(said[0]), int(said[-1]) + 1))
    return parts
