"""From a replay buffer to what a run needs: the specification of the policy, and the batches of each step."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from action_diffusion.datasets.batches.columns import depth_size, points_shape, seen_picture
from action_diffusion.datasets.batches.loader import Batch, BatchSource, ObsKey, Sentences, random_crop_offsets
from action_diffusion.datasets.batches.mixing import NONE, Draws, Parts, table
from action_diffusion.datasets.batches.windows import batch_indices, make_windows, split_episodes
from action_diffusion.datasets.images.pictures import picture
from action_diffusion.datasets.robomimic.attributes import subset as named_subset
from action_diffusion.datasets.storage.checks import check_key
from action_diffusion.datasets.storage.pieces import SAME_RATE
from action_diffusion.datasets.storage.replay_buffer import ASSUMED_RATE, ReplayBuffer
from action_diffusion.datasets.storage.rotations import declared_rotations
from action_diffusion.datasets.storage.tasks import TASK, row_tasks, task_words
from action_diffusion.datasets.storage.times import timed
from action_diffusion.envs import ROBOSUITE
from action_diffusion.errors import InputError, unknown
from action_diffusion.memory import Mode
from action_diffusion.options import KINDS
from action_diffusion.policy.spec import IN_FRAME, ActionSpec, ObservationSpec, PolicySpec
from action_diffusion.policy.text import words
from action_diffusion.rotations import RotationColumns
from action_diffusion.training import columns

_WINDOWS = 10_000
"""That are looked at at once."""
_DEPTHS = 1000
MODES: dict[str, Mode | None] = {"auto": None, "memory": "memory", "disk": "disk", "decode": "decode"}
"""Of a `BatchSource`, by `dataset.images`."""
_AHEAD = 2
"""Batches that are decoded while a step is computed."""
_MOST_WIDTH = 40
"""Characters of a name; what was left out together has longer ones."""


def describe(
    task: Mapping[str, Any],
    buffer: ReplayBuffer,
    versions: dict[str, str],
    drop: Sequence[str] | None = None,
    gain: str | None = None,
    text_model: str | None = None,
) -> PolicySpec:
    """The specification of a policy for `task` and the shapes of `buffer`, without normaliser statistics.

    Where the task names no observations, those of `columns.found` are seen; drop: leave out these. Where it says no
    control_rate, it is the buffer's, or that of its time stamps. gain: the column of feedback gains, which is seen only
    by the objective. text_model: the folder of a text encoder that comes as one.
    """
    action = dict(task["action"])
    source = columns.action_source(task)
    columns.check_action(buffer, source)
    _check_state(buffer, source, "the action")
    named = columns.observed(task, drop, buffer, gain)
    if all(options.get("kind") == "text" for options in named.values()):
        reasons = ", ".join(f"{key} ({columns.why_not(buffer, key, source)})" for key in buffer.keys if key != source)
        hint = "; name what it sees all the same: task.observations={KEY: {}}" if reasons else ""
        raise InputError(f"{buffer.name} holds no observations beside {source!r}: {reasons or 'no other key'}{hint}")
    rotations = declared_rotations(buffer, task.get("rotations") or {})
    observations = {
        key: _text(key, options, buffer, text_model)
        if options.get("kind") == "text"
        else _observation(key, dict(options), buffer, rotations)
        for key, options in named.items()
    }
    estimates = {
        key: _observation(key, dict(options), buffer, rotations)
        for key, options in (task.get("estimates") or {}).items()
    }
    sources = {key: spec.source for key, spec in (observations | estimates).items() if spec.text is None}
    became = columns.became(buffer, source, sources, rotations, _dropped(task, drop))
    became |= {
        spec.source: f"observed: {spec.shape[0]} points{' with colours' if spec.shape[1] == 6 else ''}"
        for spec in observations.values()
        if spec.kind == "points"
    }
    became |= _told_words(buffer, observations)
    if gain is not None:
        became[gain] = f"feedback gains: {columns.vector(buffer[gain])}"
    return PolicySpec(
        observations=observations,
        action=ActionSpec(
            shape=(math.prod(buffer[source].shape[1:]),),
            unit=action.get("unit") or "",
            source=source,
            rotations=_fitted(rotations.get(source, ()), buffer, source),
        ),
        n_obs_steps=task["n_obs_steps"],
        horizon=task["horizon"],
        n_action_steps=task["n_action_steps"],
        control_rate=float(task["control_rate"] or buffer.rate or _timed_rate(buffer) or ASSUMED_RATE),
        task=task["name"],
        env=_environment(task.get("env"), buffer),
        demonstrations=str(buffer.attrs.get("source", "")),
        estimates=estimates,
        versions=versions,
        buffer_columns=became,
    )


def _dropped(task: Mapping[str, Any], drop: Sequence[str] | None) -> list[str]:
    """The columns of the observations in `drop`."""
    named = task.get("observations") or {}
    return [named.get(name, {}).get("source") or name for name in drop or ()]


def learnt_from(spec: PolicySpec, buffer: ReplayBuffer) -> list[str]:
    """Lines to print before the first step: what becomes of each column, and the rate."""
    width = min(_MOST_WIDTH, max(map(len, ("rate", *spec.buffer_columns))))
    rate = f"{spec.control_rate:g} steps a second"
    if buffer.rate is None:
        told = timed(buffer)
        if told is None:
            rate += ", which the buffer does not say: task.control_rate=HZ"
        elif math.isclose(told[1], spec.control_rate, rel_tol=SAME_RATE):
            rate += f", by the times in {told[0]}"
        else:
            rate += f", as the task says; by the times in {told[0]} there are {told[1]:g}"
    return [f"{key:{width}}  {words}" for key, words in (*spec.buffer_columns.items(), ("rate", rate))]


def _timed_rate(buffer: ReplayBuffer) -> float | None:
    told = timed(buffer)
    return None if told is None else told[1]


def _environment(env: Mapping[str, Any] | None, buffer: ReplayBuffer) -> dict[str, Any] | None:
    """The task's simulator, as the buffer says that it was recorded."""
    if not env:
        return None
    recorded = {key: buffer.attrs[key] for key in ("env_args",) if key in buffer.attrs and env["name"] in ROBOSUITE}
    return recorded | dict(env)


def _text(key: str, options: Mapping[str, Any], buffer: ReplayBuffer, model: str | None) -> ObservationSpec:
    """What the robot was to do, in words."""
    _check_name(key)
    sentences, _ = row_tasks(buffer)
    return replace(words.describe(options.get("encoder"), sentences, model, buffer.name), source=TASK)


def _told_words(buffer: ReplayBuffer, observations: Mapping[str, ObservationSpec]) -> dict[str, str]:
    """What becomes of the words that a buffer has, by the column that says which."""
    told = {key: spec.text for key, spec in observations.items() if spec.text is not None}
    if not told:
        several = TASK in buffer and len(set(task_words(buffer.attrs))) > 1
        return {TASK: "left out: several tasks; task.observations.task={kind: text} tells which"} if several else {}
    sentences = next(iter(told.values())).sentences
    some = ", ".join(f"{one!r}" for one in sentences[:3]) + (", …" if len(sentences) > 3 else "")
    names = f"{', '.join(told)}, {', '.join(str(one.encoder['name']) for one in told.values())}"
    return {TASK: f"observed (as {names}): {some}"}


def _check_name(key: str) -> None:
    check_key(key, "task.observations")
    if key in ("action", IN_FRAME):
        raise InputError(f"task.observations: {key!r} is what the action is called: give the observation another name")


def _observation(
    key: str, options: dict[str, Any], buffer: ReplayBuffer, declared: Mapping[str, Sequence[RotationColumns]]
) -> ObservationSpec:
    _check_name(key)
    source = options.get("source") or key
    if source not in buffer.keys:
        raise unknown(f"key of the buffer for observation {key!r}", source, buffer.keys, buffer.name)
    shape = tuple(buffer[source].shape[1:]) or (1,)
    kind = options.get("kind") or columns.kind_of(buffer[source])
    chosen, rotations = options.get("columns"), tuple(declared.get(source, ()))
    if kind == "image":
        shape = (*seen_picture(buffer, source).size, 3)
    elif kind == "depth":
        shape = depth_size(buffer, source)
    elif kind == "points":
        shape = points_shape(buffer, source)
    elif kind == "state":
        _check_state(buffer, source, f"observation {key!r}")
        if chosen is not None:
            if len(shape) != 1 or not all(0 <= c < shape[0] for c in chosen):
                raise InputError(f"observation {key!r}: columns {chosen} do not exist in {source!r} of {list(shape)}")
            shape = (len(chosen),)
    else:
        raise unknown(f"kind of observation {key!r}", kind, KINDS)
    return ObservationSpec(
        shape=shape,
        dtype={"image": "uint8", "depth": "uint16"}.get(kind, "float32"),
        unit=options.get("unit") or "",
        kind=kind,
        source=source,
        columns=None if chosen is None else tuple(chosen),
        rotations=_fitted(rotations, buffer, source, chosen) if kind == "state" else (),
    )


def _fitted(
    rotations: Sequence[RotationColumns], buffer: ReplayBuffer, source: str, chosen: Sequence[int] | None = None
) -> tuple[RotationColumns, ...]:
    """Around the mean rotation that the buffer has, in places among the `chosen` columns, if all of them are there."""
    if not rotations:
        return ()
    rows = np.asarray(buffer[source][:]).reshape(buffer.n_steps, -1)
    for rotation in rotations:
        missing = np.flatnonzero(rotation.missing(rows))
        if len(missing):
            raise InputError(
                f"{buffer.name}: {source!r} has {rotation.no_rotation}, which are no rotation, in {len(missing)} rows, "
                f"row {missing[0]} first: mend these, or drop their episodes (action-diffusion data doctor lists them)"
            )
    fitted = [rotation.fitted(rows) for rotation in rotations]
    if chosen is None:
        return tuple(fitted)
    places = {column: place for place, column in enumerate(chosen)}
    kept = []
    for rotation in fitted:
        found = [places.get(column, -1) for column in range(rotation.columns.start, rotation.columns.stop)]
        if found[0] >= 0 and found == list(range(found[0], found[0] + len(found))):
            kept.append(replace(rotation, first=found[0]))
    return tuple(kept)


def _check_state(buffer: ReplayBuffer, source: str, what: str) -> None:
    """Refuses pictures, whose pixels would be taken for so many states."""
    column = buffer[source]
    if picture(column.shape, column.dtype) is not None:
        raise InputError(
            f"{buffer.name}: {source!r} has shape {list(column.shape)} of {column.dtype}, a picture, and cannot be "
            f"{what}: give kind: image, or store what it holds as [N, D]"
        )


@dataclass(frozen=True)
class TrainingData:
    """The training windows, and the held-out ones (None where nothing is held out).

    train_rows: int64 [n], the buffer's rows in the episodes that are trained on. parts: what the windows are drawn
    from.
    """

    train: BatchSource
    held_out: BatchSource | None
    train_rows: np.ndarray
    parts: Parts

    def chunks(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """For every training window: the observation `key` now [W, ...] and the chunk [W, H, A]."""
        indices = np.arange(len(self.train))
        now, rows = self.train.windows.now(indices), self.train.windows.rows(indices)
        return self.train.values(key)[now], self.train.windowed("action", rows).cpu().numpy()

    def history(self, key: str) -> np.ndarray:
        """For every training window what is seen of the observation `key`, [W, To, ...]."""
        rows = self.train.windows.rows(np.arange(len(self.train)))[:, : self.train.n_obs_steps]
        return self.train.windowed(key, rows).cpu().numpy()

    def statistics_rows(self, key: str) -> np.ndarray:
        """What the training windows hold of an observation, or of "action": [n, ...], each row at least once; of words,
        each sentence, of depth a thousand rows at most. A rotation's row is there for each of the numbers that windows
        have for it.
        """
        if key in self.train.told:
            return self.train.values(key)
        if key in self.train.depths:
            some = np.unique(np.linspace(0, len(self.train_rows) - 1, _DEPTHS).round().astype(np.int64))
            return self.train.windowed(key, self.train_rows[some][:, None])[:, 0].cpu().numpy()
        return self._statistics(key)[0]

    def statistics_weights(self, key: str) -> np.ndarray | None:
        """How much each of `statistics_rows` counts, float64 [n], or for `IN_FRAME` each of `chunks`, so that a part
        counts by its share; None where each counts as any."""
        if self.parts.weights is None or key in self.train.told:
            return None
        rows = self.train.windows.now(np.arange(len(self.train))) if key == IN_FRAME else self._statistics(key)[1]
        part = part_of_rows(self.parts, self.train.buffer, rows)
        counts = np.bincount(part, minlength=len(self.parts.names))
        weights: np.ndarray = np.array([float(share) for share in self.shares()])[part] / counts[part]
        return weights

    def _statistics(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Values [n, ...], and the buffer's row of each, int64 [n]."""
        values = self.train.windowed(key, self.train_rows[:, None])[:, 0].cpu().numpy()
        if not self.train.has_rotations(key):
            return values, self.train_rows
        found, whose = [values], [self.train_rows]
        for indices in np.array_split(np.arange(len(self.train)), 1 + len(self.train) // _WINDOWS):
            steps = self.train.windows.rows(indices)[:, : None if key == "action" else self.train.n_obs_steps]
            others = self.train.windowed(key, steps).cpu().numpy()
            differ = (others != values[np.searchsorted(self.train_rows, steps)]).any(axis=-1)
            found.append(others[differ])
            whose.append(steps[differ])
        return np.concatenate(found), np.concatenate(whose)

    def part_of_windows(self, source: BatchSource) -> np.ndarray:
        """The part of each window of `source`, int64 [W]."""
        return part_of_rows(self.parts, source.buffer, source.windows.now(np.arange(len(source))))

    @functools.cached_property
    def windows(self) -> np.ndarray:
        """How many windows to train on each part has, int64 [P]."""
        return np.bincount(self.part_of_windows(self.train), minlength=len(self.parts.names))

    def shares(self) -> tuple[Fraction, ...]:
        """Of each part, among the windows that are drawn."""
        return self.parts.shares(self.windows)

    def draws(self, seed: int) -> Draws | None:
        """What says which windows a batch holds; None where each is drawn as often as any."""
        return None if self.parts.weights is None else Draws(self.part_of_windows(self.train), self.shares(), seed)

    def table(self) -> list[str]:
        """`mixing.table`; no line where there is one part of no weight."""
        n = len(self.parts.names)
        if n == 1 and self.parts.weights is None:
            return []

        def episodes(source: BatchSource | None) -> np.ndarray:
            ends = np.unique([] if source is None else source.windows.end).astype(np.int64)
            return np.bincount(part_of_rows(self.parts, self.train.buffer, ends - 1), minlength=n)

        return table(self.parts, episodes(self.train), episodes(self.held_out), self.windows)


def part_of_rows(parts: Parts, buffer: ReplayBuffer, rows: np.ndarray) -> np.ndarray:
    """The part that each of a buffer's `rows` is of, in their shape."""
    found: np.ndarray = parts.of_episode[np.searchsorted(buffer.episode_ends, rows, side="right")]
    return found


def split(
    buffer: ReplayBuffer, parts: Parts | None, *, val_fraction: float, seed: int, subset: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Increasing indices of the episodes to train on, and of those that are held out: of each part that has a weight,
    else of all together; none where there is one only."""
    chosen = np.arange(buffer.n_episodes) if subset is None else named_subset(buffer, subset)
    groups = [chosen]
    if parts is not None and parts.weights is not None:
        groups = [chosen[parts.of_episode[chosen] == part] for part in np.unique(parts.of_episode) if part != NONE]
    pairs = [
        [group[part] for part in split_episodes(len(group), val_fraction if len(group) > 1 else 0.0, seed)]
        for group in groups
    ]
    train, held_out = (np.sort(np.concatenate(parts_of_them)) for parts_of_them in zip(*pairs, strict=True))
    return train, held_out


def prepare(
    buffer: ReplayBuffer,
    spec: PolicySpec,
    *,
    device: torch.device,
    val_fraction: float,
    seed: int,
    max_episodes: int | None = None,
    subset: str | None = None,
    parts: Parts | None = None,
    memory_gb: float | None = None,
    images: str = "auto",
    cache_dir: Path | None = None,
    gain: str | None = None,
    rewards: Mapping[str, Any] | None = None,
    text_model: str | None = None,
) -> TrainingData:
    """Split by episode and load what the policy needs into the fastest memory that holds it.

    Raises `InputError` where the buffer has another rate than the policy, and where a part that has a weight has no
    episode to train on.
    subset: use the episodes of this named subset only (`datasets.demos`: robomimic's filter keys). parts: what the
    windows are drawn from, in which shares. images: where they are kept, one of `MODES`. gain: the column of feedback
    gains. rewards: what a `BatchSource` takes for `gather(critic=True)`. text_model: the folder of a text encoder that
    comes as one.
    """
    columns.check_rate(buffer, spec.control_rate)
    train, held_out = split(buffer, parts, val_fraction=val_fraction, seed=seed, subset=subset)
    if max_episodes is not None:
        train = train[:max_episodes]
    parts = parts or Parts((buffer.name,), None, np.zeros(buffer.n_episodes, np.int64))
    _check_parts(parts, train, subset, max_episodes)
    sizes = {"horizon": spec.horizon, "n_obs_steps": spec.n_obs_steps, "n_action_steps": spec.n_action_steps}
    source = BatchSource(
        buffer=buffer,
        windows=make_windows(buffer.episode_ends, episodes=train, **sizes),
        observations={
            k: ObsKey(v.source, v.columns, _kind(v))
            for k, v in (spec.observations | spec.estimates).items()
            if v.text is None
        },
        action_key=spec.action.source,
        n_obs_steps=spec.n_obs_steps,
        device=device,
        memory_gb=memory_gb,
        mode=MODES[images],
        cache_dir=cache_dir,
        told=_told(buffer, spec, text_model),
        gain_key=gain,
        **(rewards or {}),
        rotations={k: v.rotations for k, v in spec.states.items()} | {"action": spec.action.rotations},
    )
    ends = buffer.episode_ends
    starts = np.concatenate([[0], ends[:-1]])
    rows = np.concatenate([np.arange(starts[e], ends[e]) for e in train])
    validation = None
    if len(held_out):
        validation = source.with_windows(make_windows(ends, episodes=held_out, **sizes))
    return TrainingData(source, validation, rows, parts)


def _check_parts(parts: Parts, train: np.ndarray, subset: str | None, max_episodes: int | None) -> None:
    """Raises `InputError` where a part that has a weight has none of the episodes `train`."""
    for part, weight in enumerate(parts.weights or ()):
        if weight and part not in parts.of_episode[train]:
            options = {"subset": subset, "max_episodes": max_episodes}
            said = " and ".join(f"dataset.{name}={value}" for name, value in options.items() if value is not None)
            raise InputError(
                f"{parts.names[part]} has the weight {weight:g}, and no episode to train on"
                f"{f' with {said}' if said else ''}: give it the weight 0"
            )


def _told(buffer: ReplayBuffer, spec: PolicySpec, model: str | None) -> dict[str, Sentences]:
    """The words of each observation that is some."""
    if not spec.texts:
        return {}
    sentences, of_row = row_tasks(buffer)
    return {key: Sentences(words.embed(text, sentences, model), of_row) for key, text in spec.texts.items()}


def _kind(spec: ObservationSpec) -> Any:
    return spec.kind


class StepBatches:
    """The batch of a training step: a pure function of seed, step and process.

    crop: (h, w) to cut at random while images are gathered, at one place for all frames of a window. Images of several
    sizes have no such place, and are left whole, for the encoder to cut. draws: of parts that have weights.
    """

    def __init__(
        self,
        source: BatchSource,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        crop: tuple[int, int] | None = None,
        draws: Draws | None = None,
    ):
        self.source, self.seed, self.rank, self.world, self.draws = source, seed, rank, world, draws
        self.sizes = set(source.frame_sizes.values())
        self.crop = crop if len(self.sizes) == 1 else None

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, step: int, batch_size: int, generator: torch.Generator) -> Batch:
        """See `trainer.StepSource`."""
        if self.source.mode == "decode":
            for ahead in range(step, step + 1 + _AHEAD):
                self.source.prefetch(self._indices(ahead, batch_size), critic=self.source.rewarded)
        indices = self._indices(step, batch_size)
        if self.crop is None:
            return self.source.gather(indices, critic=self.source.rewarded)
        (size,) = self.sizes
        random = np.random.default_rng([self.seed, step, 0])
        whole = random_crop_offsets(batch_size * self.world, size, self.crop, random)
        offsets = np.split(whole, self.world)[self.rank]
        return self.source.gather(indices, crop=self.crop, offsets=offsets, critic=self.source.rewarded)

    def _indices(self, step: int, batch_size: int) -> np.ndarray:
        if self.draws is None:
            return batch_indices(len(self.source), batch_size, self.seed, step, self.rank, self.world)
        return self.draws.batch(batch_size, step, self.rank, self.world)


def held_out_indices(source: Sized, count: int) -> np.ndarray:
    """Up to `count` window indices, spread evenly over the held-out episodes."""
    return np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(np.int64))
