"""Which columns of a buffer a policy sees where its task names none, and what is said of the others.

A policy must not be told the answer: another version of the command, or how far the recording is. Such columns are told
by the words in their names, by values that only count, and by values that are the action's own. Whoever means one names
it in `task.observations`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.batches.columns import from_zero_to_one
from action_diffusion.datasets.batches.joining import joined
from action_diffusion.datasets.formats.cached import CONVERTED, convert_command
from action_diffusion.datasets.images.pictures import Picture, picture
from action_diffusion.datasets.storage.pieces import SAME_RATE, JoinedColumn
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.store import Column, ZarrColumn
from action_diffusion.envs.robosuite.absolute import COLUMN as ABSOLUTE
from action_diffusion.errors import InputError, unknown
from action_diffusion.options.policy import DiffusionQlOptions, SobolevOptions
from action_diffusion.rotations import RotationColumns

_WORDS = {
    "another version of the action": "action actions command commands commanded cmd ctrl setpoint setpoints desired "
    "leader leaders master masters teleop",
    "it belongs to the row after": "next future",
    "a time": "time times timestamp timestamps stamp clock",
    "it counts": "index indices idx id ids counter tick ticks seq",
    "a reward": "reward rewards return returns discount",
    "a flag": "done dones terminal terminals terminated truncated success successes failure flag flags label labels",
    "it tells of the recording": "demo demos episode episodes",
}
_NAMES = {
    "it counts": ("frame", "frames", "step", "steps", "count", "row", "rows", "i", "n", "t"),
    "a simulator's whole state": ("states",),
}
"""Reason → what the whole name is."""
REWARD = "reward"
"""The column of rewards that is learnt from where none is named."""
_LOOKED_AT = 64
"""Rows."""
_FLAT = 192
"""Bytes a row, 8 × 8 pixels: as many are a picture, not a state."""
_STRAIGHT = 1e-4
"""Of its step from row to row, by which what counts may be off."""
UMI = re.compile(r"robot\d+_(eef_pos|eef_rot_axis_angle|gripper_width)")


def action_source(task: Mapping[str, Any]) -> str:
    """The column that holds the action."""
    return task["action"].get("source") or "action"


def gain_source(config: Mapping[str, Any]) -> str | None:
    """The column of feedback gains that the objective of a training's configuration learns from, if it does."""
    objective = config.get("policy", {}).get("objective", {})
    return objective.get("gain", SobolevOptions.gain) if objective.get("name") == "sobolev" else None


def learnt_rewards(config: Mapping[str, Any]) -> DiffusionQlOptions | None:
    """The objective of a training's configuration, if it learns from rewards."""
    objective = config.get("policy", {}).get("objective", {})
    if objective.get("name") != "diffusion_ql":
        return None
    return DiffusionQlOptions(**{name: value for name, value in objective.items() if name != "name"})


def reward_columns(learnt: DiffusionQlOptions | None) -> dict[str, str]:
    """What it learns from, column → what it is, beside observations and actions."""
    if learnt is None:
        return {}
    ends = {} if learnt.terminal is None else {learnt.terminal: "ends of episodes"}
    return {learnt.reward or REWARD: "rewards", **ends}


def with_rewards(buffer: ReplayBuffer, task: Mapping[str, Any], learnt: DiffusionQlOptions) -> ReplayBuffer:
    """The buffer with a column of rewards: its own, under whichever name, or what PushT's states say.

    Raises `InputError` where there is none, and no column of ends that is asked for.
    """
    if learnt.terminal is not None and learnt.terminal not in buffer.keys:
        raise unknown("key of the buffer for policy.objective.terminal", learnt.terminal, buffer.keys, buffer.name)
    if learnt.terminal is not None:
        _check_number(buffer, learnt.terminal)
    key = learnt.reward or REWARD
    if key in buffer.keys:
        _check_number(buffer, key)
        return buffer
    if learnt.reward is not None:
        raise unknown("key of the buffer for policy.objective.reward", key, buffer.keys, buffer.name)
    for other in ("rewards", "next.reward"):
        if other in buffer.keys:
            _check_number(buffer, other)
            return buffer.with_column(key, buffer[other])
    action = action_source(task)
    is_pusht = (task.get("env") or {}).get("name") == "pusht" and {"state", action} <= set(buffer.keys)
    if is_pusht and buffer["state"].shape[1:] == (5,) and buffer[action].shape[1:] == (2,):
        from action_diffusion.envs.pusht.reward import rewards

        return buffer.with_column(key, rewards(buffer["state"][:], buffer[action][:], buffer.episode_ends))
    raise InputError(
        f"{buffer.name} holds no rewards: add a column {key} [N] of what each row's action earned, 1 for what does the "
        "task, or name another by policy.objective.reward=COLUMN"
    )


def _check_number(buffer: ReplayBuffer, key: str) -> None:
    shape = buffer[key].shape[1:]
    if math.prod(shape) != 1:
        raise InputError(f"{buffer.name}: {key!r} has {list(shape)} values a row, and a reward or an end is one number")


def observed(
    task: Mapping[str, Any], drop: Sequence[str] | None, buffer: ReplayBuffer, gain: str | None = None
) -> dict[str, dict[str, Any]]:
    """The observations of a policy, name → options: those of the task, or else those of `found`, without `drop`; words
    that the task names are beside those that are found.

    gain: the column of feedback gains, which is not observed. Raises `InputError` for a name in `drop` that is not
    there, where nothing is left, and for gains that are not there.
    """
    named, action = task.get("observations"), action_source(task)
    if gain is not None and gain not in buffer.keys:
        raise unknown("key of the buffer for policy.objective.gain", gain, buffer.keys, buffer.name)
    texts = {key: options for key, options in (named or {}).items() if options.get("kind") == "text"}
    named = {key: options for key, options in (named or {}).items() if key not in texts}
    known = [*texts, *(named or [key for key in buffer.keys if key != action])]
    for name in drop or ():
        if name not in known:
            raise unknown("observation", name, known, f"drop of {buffer.name}")
    unnamed = {} if named else {key: options for key, options in found(buffer, action).items() if key != gain}
    seen = {key: dict(options) for key, options in ((named or unnamed) | texts).items() if key not in (drop or ())}
    if drop and not seen:
        raise InputError(f"drop=[{','.join(drop)}] leaves no observation of {buffer.name}")
    return seen


def drawn(task: Mapping[str, Any], drop: Sequence[str] | None, buffer: ReplayBuffer) -> list[str]:
    """Columns of pictures that the task names and the buffer lacks, and that PushT draws from its states."""
    if (task.get("env") or {}).get("name") != "pusht" or "state" not in buffer.keys:
        return []
    named = {key: options for key, options in (task.get("observations") or {}).items() if key not in (drop or ())}
    images = [options.get("source") or key for key, options in named.items() if options.get("kind") == "image"]
    return [key for key in dict.fromkeys(images) if key not in buffer.keys]


def together(
    buffers: Sequence[ReplayBuffer],
    task: Mapping[str, Any],
    drop: Sequence[str] | None,
    gain: str | None = None,
    rewards: Collection[str] = (),
) -> ReplayBuffer:
    """The buffers as one. gain, rewards: columns that are learnt from beside observations and actions.

    Raises `InputError` where what the policy learns from is not in all of them: `joined`.
    """
    if len(buffers) == 1:
        return buffers[0]
    action = action_source(task)
    named = {key: options for key, options in (task.get("observations") or {}).items() if options.get("kind") != "text"}
    seen = [named] if named else [found(buffer, action) for buffer in buffers]
    wanted = {key: options for some in seen for key, options in some.items() if key not in (drop or ())}
    wanted |= task.get("estimates") or {}
    needed = {action, *([gain] if gain else ()), *rewards}
    needed |= {*(options.get("source") or key for key, options in wanted.items())}
    return joined(buffers, sorted(needed - {key for buffer in buffers for key in drawn(task, drop, buffer)}))


def kind_of(column: Column) -> str:
    """What a task that does not say it takes a column for: "image" or "state"."""
    return "state" if picture(column.shape, column.dtype) is None else "image"


def found(buffer: ReplayBuffer, action: str) -> dict[str, dict[str, Any]]:
    """The observations of a task that names none: every camera and state that tells where things are."""
    return {
        key: {"source": key, "kind": kind_of(buffer[key])}
        for key in sorted(buffer.keys)
        if key != action and why_not(buffer, key, action) is None
    }


def why_not(buffer: ReplayBuffer, key: str, action: str) -> str | None:
    """Why a column is no observation unless a task names it. action: the column that is learnt."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", key)]
    for reason, bad in _WORDS.items():
        if set(words) & set(bad.split()):
            return reason
    for reason, names in _NAMES.items():
        if key.lower() in names:
            return reason
    column = buffer[key]
    if words[:1] == ["is"] or column.dtype == bool:
        return "a flag"
    shown = picture(column.shape, column.dtype)
    if shown is not None and not shown.seen:
        is_depth = column.dtype == np.uint16 or "depth" in key.lower()
        one_channel = "depth" if is_depth else "a map of one channel"
        what = one_channel if shown.kind == "depth" else "a picture of no layout that is known"
        return f"{what}, which is not learnt from ({list(column.shape[1:])} {column.dtype})"
    if column.dtype == np.uint8 and column.shape[1:] >= (_FLAT,) and len(column.shape) == 2:
        return f"a picture in one row, which is not learnt from ({column.shape[1]} uint8): store it as [N, H, W, 3]"
    if column.shape[1:] in ((), (1,)) and _counts(np.asarray(column[:]).ravel(), buffer.episode_ends):
        return "it only counts rows or episodes"
    if action in buffer.keys and _same(column, buffer[action]):
        return "it holds the action's own values"
    return None


def _same(column: Column, other: Column) -> bool:
    """Whether all values are equal, but for what float32 rounds."""
    if column.shape != other.shape or column.dtype.kind not in "iuf" or other.dtype.kind not in "iuf":
        return False
    parts = (slice(0, _LOOKED_AT), slice(None))  # most differ at once
    return all(np.allclose(column[part], other[part], rtol=1e-6, atol=1e-9) for part in parts)


def _counts(values: np.ndarray, ends: np.ndarray) -> bool:
    """Whether values [N] change by the same from row to row of every episode, or from episode to episode."""
    steps = np.diff(values.astype(np.float64))
    new = np.zeros(len(steps), bool)
    new[ends[:-1] - 1] = True  # steps to the next episode
    within, across = steps[~new], steps[new]
    if len(within) < 2:
        return False
    if not within.any():
        return len(across) > 1 and bool((across == 1).all())
    step = float(np.median(within))
    return step != 0 and bool((np.abs(within - step) <= _STRAIGHT * abs(step)).all())


def became(
    buffer: ReplayBuffer,
    action: str,
    sources: Mapping[str, str],
    rotations: Mapping[str, Sequence[RotationColumns]] | None = None,
    dropped: Collection[str] = (),
) -> dict[str, str]:
    """What a policy makes of each column of a buffer, in words. sources: observation → its column; dropped: columns."""
    words = {}
    for key in buffer.keys:
        seen_as = [name for name, source in sources.items() if source == key]
        if key == action:
            words[key] = f"the action: {vector(buffer[key])}"
        elif seen_as:
            alias = "" if seen_as == [key] else f" (as {', '.join(seen_as)})"
            words[key] = f"observed{alias}: {_what(buffer[key])}"
        elif key in dropped:
            words[key] = "left out: drop"
        else:
            words[key] = f"left out: {why_not(buffer, key, action) or 'the task does not name it'}"
        for rotation in (rotations or {}).get(key, ()):
            last = rotation.columns.stop - 1
            words[key] += f", {rotation.first} to {last} a rotation ({rotation.representation})"
        words[key] += _absent(buffer[key])
    return words | {key: f"left out: {reason}" for key, reason in buffer.left_out.items()}


def _what(column: Column) -> str:
    shown = picture(column.shape, column.dtype)
    if shown is not None and shown.kind == "depth":
        return f"depth of {shown.size[1]} × {shown.size[0]} pixels"
    return vector(column) if shown is None else _camera(column, shown)


def vector(column: Column) -> str:
    """A row, in words."""
    row = column.shape[1:] or (1,)
    n = int(np.prod(row))
    return f"{n} value{'s' if n > 1 else ''}" + (
        f", {list(row)} as one vector, the last axis fastest" if len(row) > 1 else ""
    )


def _camera(column: Column, shown: Picture) -> str:
    changes = [shown.change] if shown.change else []
    if from_zero_to_one(column):
        changes.append("floats from 0 to 1, times 255 and rounded")
    return ", ".join([f"a camera of {shown.size[1]} × {shown.size[0]} pixels", *changes])


def _absent(column: Column) -> str:
    parts = column.columns if isinstance(column, JoinedColumn) else [column]
    found = [part.absent() for part in parts if isinstance(part, ZarrColumn)]
    n_missing, n_chunks = sum(len(missing) for missing, _ in found), sum(n_chunks for _, n_chunks in found)
    return f"; {n_missing} of {n_chunks} chunks are not in the file, which means the fill value" if n_missing else ""


def check_action(buffer: ReplayBuffer, action: str) -> None:
    """Raises `InputError` where the buffer does not have it."""
    if action not in buffer.keys:
        error = unknown("key of the buffer for task.action.source", action, buffer.keys, buffer.name)
        raise InputError(f"{error}{_without_action(buffer, action)}")


def check_rate(buffer: ReplayBuffer, wanted: float | None, whose: str = "the policy's control_rate") -> None:
    """Raises `InputError` where the buffer says another rate (Hz) than is wanted; None: whatever it has."""
    rate = buffer.rate
    if wanted is None or rate is None or math.isclose(rate, wanted, rel_tol=SAME_RATE):
        return
    lower = f"; a copy of it: {convert_command(Path(buffer.name), f'rate={wanted:g}')}" if wanted < rate else ""
    raise InputError(
        f"{buffer.name} has {rate:g} steps a second, {whose} is {wanted:g}: take demonstrations of that rate, "
        f"or train without task.control_rate{lower}"
    )


def _without_action(buffer: ReplayBuffer, action: str) -> str:
    """What to do about a buffer without the action, in words; empty where there is nothing particular to say."""
    if action == ABSOLUTE:
        return f"; action-diffusion data absolute in={buffer.name} out=NAME.zarr makes it"
    converted = buffer.attrs.get(CONVERTED, {})
    if converted.get("format") == "folder":
        command = convert_command(Path(converted["from"]), "action=COLUMN,COLUMN", "state=COLUMN,COLUMN")
        return f"; say which columns of the CSV files it is: {command}"
    parts = [key for key in sorted(buffer.keys) if UMI.fullmatch(key)]
    if not parts:
        close = difflib.get_close_matches(action, buffer.keys, n=1)
        return f" task.action.source={close[0]} takes it" if close else ""
    return (
        f"; these are UMI's keys, and its actions are where the hand is next: add a column action [N, A] with the next "
        f"row's {', '.join(parts)} (docs/training.md shows how)"
    )
