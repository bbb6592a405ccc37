"""What a policy without a simulator is asked about: windows of episodes that it was not trained on, where there are."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.batches.loader import BatchSource
from action_diffusion.datasets.batches.mixing import parts_of
from action_diffusion.datasets.batches.sources import names
from action_diffusion.datasets.batches.windows import Windows, make_windows
from action_diffusion.datasets.storage.dimensions import are_names
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.reading import read_config, trained_on
from action_diffusion.policy.spec import PolicySpec
from action_diffusion.training import episodes
from action_diffusion.training.data import held_out_indices, split
from action_diffusion.training.evaluation.offline import EpisodesOrigin, WindowReference, evaluate_offline

MOST_WINDOWS = 512
_BATCH = 64


@dataclass(frozen=True)
class ComparedWindows:
    """Windows to compare on.

    now: int64 [W], the rows at which a policy acts. ends: int64 [E], of the buffer's episodes. n_action_steps: executed
    by each policy that is asked. names, units: of the action's dimensions; a unit may be "".
    """

    now: np.ndarray
    ends: np.ndarray
    n_action_steps: int
    origin: EpisodesOrigin
    names: list[str]
    units: list[str]

    def windows(self, spec: PolicySpec) -> Windows:
        """As long as the policy wants them."""
        return windows_at(self.now, self.ends, spec)


def choose(
    buffer: ReplayBuffer, bundles: Sequence[tuple[Path, PolicySpec]], *, own_data: Sequence[str] | None
) -> ComparedWindows:
    """Windows, the same for all `bundles`, of the episodes in `buffer` that none of them was trained on.

    own_data: the names of the training's `data`, where `buffer` is that: of the episodes that it held out, and
    `InputError` where there is none. Where each episode was trained on, or is a copy of one that was, of all of them,
    and `origin` says so.
    """
    specs = [spec for _, spec in bundles]
    if len({(spec.action.source, spec.action.shape) for spec in specs}) > 1:
        raise InputError(f"policies of other actions do not compare: {', '.join(str(path) for path, _ in bundles)}")
    kinds, unknown, held_out_some = [], [], False
    for path, spec in bundles:
        known = episodes.read(path)
        if known is None:
            unknown.append(str(path))
        kinds.append(_by_split(buffer, path, own_data) if known is None else episodes.recognise(buffer, spec, known))
        held_out_some |= bool(episodes.HELD_OUT in kinds[-1] if known is None else len(known.held_out))
    trained = (np.array(kinds) == episodes.TRAINED).any(axis=0)
    held_out = (np.array(kinds) == episodes.HELD_OUT).any(axis=0) & ~trained
    asked = held_out if own_data is not None and held_out.any() else ~trained
    if own_data is not None and not asked.any() and not held_out_some:
        raise InputError(
            f"{', '.join(str(path) for path, _ in bundles)}: training held out no episode; give data=PATH, "
            "demonstrations to compare with"
        )
    indices = np.flatnonzero(asked if asked.any() else trained)
    now = _rows(buffer.episode_ends, indices, specs[0])
    names, units = _dimensions(buffer, specs[0])
    n = len(np.unique(np.searchsorted(buffer.episode_ends, now, side="right")))
    return ComparedWindows(
        now=now,
        ends=buffer.episode_ends,
        n_action_steps=min(spec.n_action_steps for spec in specs),
        origin=_origin(n, asked, trained, unknown, several=len(bundles) > 1),
        names=names,
        units=units,
    )


def evaluate_held_out(
    policy: DiffusionPolicy,
    source: BatchSource,
    chosen: ComparedWindows,
    *,
    output_dir: Path,
    settings: Mapping[str, Any],
    metrics_file: Path | None,
) -> dict[str, Any]:
    """`evaluate_offline` on windows that were chosen. source: all rows of the buffer, with whatever windows."""
    windows, every = chosen.windows(policy.spec), np.arange(len(chosen.now))
    action = source.values("action").astype(np.float64)
    whose, episode = np.unique(windows.end, return_inverse=True)
    firsts = windows.first[np.unique(episode, return_index=True)[1]]
    rows = [action[first:end] for first, end in zip(firsts, whose, strict=True)]

    def along(index: int) -> Iterator[Any]:
        now = np.arange(firsts[index], whose[index], chosen.n_action_steps)[:MOST_WINDOWS]
        return _batches(source.with_windows(windows_at(now, chosen.ends, policy.spec)), list(policy.spec.observations))

    reference = WindowReference(
        origin=chosen.origin,
        ids=[hashlib.blake2b(part.astype("<f4").tobytes(), digest_size=8).hexdigest() for part in rows],
        episode=episode,
        before=action[np.maximum(windows.now(every) - 1, windows.first)],
        span=np.ptp(np.concatenate(rows), axis=0),
        along=along,
        control_rate=policy.spec.control_rate,
    )
    return evaluate_offline(
        policy=policy,
        task=policy.spec.task,
        batches=_batches(source.with_windows(windows), list(policy.spec.observations)),
        reference=reference,
        names=chosen.names,
        units=chosen.units,
        n_action_steps=chosen.n_action_steps,
        output_dir=output_dir,
        settings=settings,
        metrics_file=metrics_file,
    )


def windows_at(now: np.ndarray, ends: np.ndarray, spec: PolicySpec) -> Windows:
    """The windows in which `spec`'s policy acts at the rows `now` [W] of episodes with `ends` [E]."""
    episode = np.searchsorted(ends, now, side="right")
    return Windows(
        start=now - (spec.n_obs_steps - 1),
        first=np.concatenate([[0], ends[:-1]])[episode],
        end=ends[episode],
        horizon=spec.horizon,
        n_obs_steps=spec.n_obs_steps,
        n_action_steps=spec.n_action_steps,
    )


def _rows(ends: np.ndarray, indices: np.ndarray, spec: PolicySpec) -> np.ndarray:
    """Up to MOST_WINDOWS rows to act at, spread evenly over the episodes `indices`."""
    sizes = {"horizon": spec.horizon, "n_obs_steps": spec.n_obs_steps, "n_action_steps": spec.n_action_steps}
    windows = make_windows(ends, episodes=indices, **sizes)
    return windows.now(held_out_indices(windows, MOST_WINDOWS))


def _by_split(buffer: ReplayBuffer, path: Path, own_data: Sequence[str] | None) -> np.ndarray:
    """`episodes.recognise` for a bundle that keeps no hashes: by the split that its configuration gives."""
    kinds = np.full(buffer.n_episodes, episodes.NEW, dtype=f"<U{len(episodes.HELD_OUT)}")
    if own_data is None:
        return kinds
    config = trained_on(read_config(path), path)
    if names(config["data"] or []) == list(own_data):
        dataset = config["dataset"]
        parts = parts_of(buffer, dataset, list(own_data))
        train, held_out = split(
            buffer, parts, val_fraction=dataset["val_fraction"], seed=config["seed"], subset=dataset.get("subset")
        )
        kinds[train], kinds[held_out] = episodes.TRAINED, episodes.HELD_OUT
    return kinds


def _origin(n: int, asked: np.ndarray, trained: np.ndarray, unknown: Sequence[str], *, several: bool) -> EpisodesOrigin:
    """What `n` episodes are to the policies. asked, trained: bool [E], of all episodes."""
    count = f"{n} episode{'s' if n > 1 else ''}"
    if not asked.any():
        who = "at least one of the policies" if several else "the policy"
        words = f"{count} that {who} was trained on: this is no measure of how it does on new ones"
        return EpisodesOrigin("trained", words)
    left_out = f"; of the data's {len(asked)}, {trained.sum()} that it was trained on are left out" * bool(
        trained.any()
    )
    if unknown:
        who = " and ".join(unknown)
        words = f"{count}; whether {who} was trained on them is unknown: no hashes of its episodes are kept"
        return EpisodesOrigin("unknown", words + left_out.replace("that it was", "that, by its configuration, it was"))
    who = "none of the policies was" if several else "the policy was not"
    left_out = left_out.replace("it was", "one of them was") if several else left_out
    return EpisodesOrigin("held_out", f"{count} that {who} trained on{left_out}")


def _dimensions(buffer: ReplayBuffer, spec: PolicySpec) -> tuple[list[str], list[str]]:
    """Names and units of the action's dimensions: the buffer's attributes `names` and `units`, or the task's unit."""
    source, size = spec.action.source, spec.action.shape[0]
    told = [buffer.attrs.get(name) for name in ("names", "units")]
    names, units = (given.get(source) if isinstance(given, Mapping) else None for given in told)
    if names is not None and not are_names(names, size):
        warnings.warn(f"{buffer.name}: names of {source} are not {size} different words, and are left", stacklevel=2)
        names = None
    unit = spec.action.unit or (units if isinstance(units, str) else "")
    parts = [part.strip() for part in unit.split(",")]
    return names or [f"{source} {index}" for index in range(size)], parts if len(parts) == size else [unit] * size


def _batches(source: BatchSource, keys: Sequence[str]) -> Iterator[Any]:
    every = np.arange(len(source))
    for part in np.array_split(every, max(1, -(-len(every) // _BATCH))):
        batch = source.gather(part)
        obs = {key: batch.obs[key].cpu().numpy() for key in keys}
        yield obs, batch.action.cpu().numpy(), batch.mask.cpu().numpy()
