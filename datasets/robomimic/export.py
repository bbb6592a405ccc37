"""A replay buffer back to robomimic's HDF5: what its SequenceDataset, its playback and its metadata reader take.

    column <key>, rows of an episode      ─▶ data/demo_N/obs/<key>        or where attrs["columns"] says it was
    obs                                   ─▶ data/demo_N/next_obs/<key>

        obs       o0 o1 o2 … oT-1
        next_obs  o1 o2 …  oT-1 oT-1      the last is repeated: a buffer does not hold what came after the last action

A buffer that was not converted from HDF5 needs attrs["env_args"]; its columns action, reward, done and states go where
robomimic keeps them, and all others are observations. What other layouts call episode_3 and observations/ is demo_3 and
obs/ here, because that is what robomimic reads; a task in words is demo_N/language_instruction.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.hdf5.reading import check_name, open_hdf5
from action_diffusion.datasets.robomimic.attributes import (
    DEMO,
    TASK_INDEX,
    attributes,
    demo_names,
    subsets_of,
    task_words,
)
from action_diffusion.datasets.robomimic.demo import PLACES
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path
from action_diffusion.progress import progress

_PLACES = PLACES | {"states": "states"}
_OBSERVATIONS = re.compile(r"^observations/(images/)?")


def export(source: str | Path, output: str | Path) -> dict[str, Any]:
    """Write the buffer at `source` to `output`, an HDF5 file that is not there yet, episode by episode.

    The file is compared with the buffer before it takes its name. Returns the numbers to report. Raises `InputError`
    where the buffer has no `env_args` or no column `action`, and for an output that exists.
    """
    buffer, output = ReplayBuffer.open(source), Path(output).expanduser()
    if output.exists():
        raise InputError(f"{output} exists: choose another path, or remove it")
    env_args = buffer.attrs.get("env_args")
    if not isinstance(env_args, dict) or "env_name" not in env_args:
        raise InputError(
            f"{buffer.name} does not say what simulator it is from: robomimic's files need attrs['env_args'], "
            "with env_name"
        )
    places = _places(buffer)
    names = [_demo_name(name, buffer) for name in demo_names(buffer)]
    with atomic_path(output) as temporary:
        _write(temporary, buffer, names, places, env_args)
        _compare(temporary, buffer, names, places)
    return {
        "output": str(output),
        "episodes": buffer.n_episodes,
        "steps": buffer.n_steps,
        "keys": ", ".join(sorted(places.values())),
        "checked": "every value is the buffer's",
    }


def _places(buffer: ReplayBuffer) -> dict[str, str]:
    """Where each column goes in a demo. Raises `InputError` where that is no place, or one for two."""
    kept = buffer.attrs.get("columns", {})
    if not isinstance(kept, dict):
        raise InputError(f"{buffer.name}: attrs['columns'] must say where each column was, as {{'action': 'actions'}}")
    ours = {DEMO, TASK_INDEX} if "tasks" in buffer.attrs else {DEMO}
    places = dict[str, str]()
    for key in buffer.keys:
        if key in ours:
            continue
        place = str(kept.get(key) or _PLACES.get(key, f"obs/{key}"))
        place = _OBSERVATIONS.sub("obs/", place) if place not in ("obs", "observations") else f"obs/{key}"
        place = _PLACES.get(place, place)
        for part in place.split("/"):
            check_name(part, f"{buffer.name}: {place!r:.60}")
        folders = [f"{at}/" for at in places.values()]
        if f"{place}/".startswith(tuple(folders)) or any(at.startswith(f"{place}/") for at in folders):
            raise InputError(f"{buffer.name}: {key} would go to {place}, where another column is: see attrs['columns']")
        places[key] = place
    if "actions" not in places.values():
        raise InputError(f"{buffer.name} has no column action; it has {', '.join(buffer.keys)}")
    return places


def _demo_name(name: str, buffer: ReplayBuffer) -> str:
    number = re.fullmatch(r"[A-Za-z_-]*([0-9]{1,18})", name)
    if number is None:
        raise InputError(f"{buffer.name}: attrs['demos'] has {name!r:.60}, which is no demo_<number>")
    return f"demo_{int(number[1])}"


def _write(
    path: Path, buffer: ReplayBuffer, names: list[str], places: dict[str, str], env_args: dict[str, Any]
) -> None:
    import h5py

    with h5py.File(path, "w") as file, progress("writing the demos", buffer.n_steps) as advance:
        data = file.create_group("data")
        for name, episode in zip(names, buffer.episodes(), strict=True):
            demo = data.create_group(name)
            for key, place in places.items():
                demo.create_dataset(place, data=episode[key])
                if place.startswith("obs/"):
                    following = np.concatenate([episode[key][1:], episode[key][-1:]])
                    demo.create_dataset(f"next_{place}", data=following)
            advance(len(episode[next(iter(places))]))
        for name, words in zip(names, task_words(buffer), strict=True):
            if words:
                data[name]["language_instruction"] = words
        for kept_at, values in attributes(buffer):
            at, _, demo = kept_at.rpartition("/")
            place = f"data/{_demo_name(demo, buffer)}" if at == "data" else kept_at
            if place in file:  # not so where the episode was dropped
                for name, value in values.items():
                    file[place].attrs[name] = value
        for name, length in zip(names, np.diff(buffer.episode_ends, prepend=0), strict=True):
            data[name].attrs["num_samples"] = length
        data.attrs["total"] = buffer.n_steps
        data.attrs["env_args"] = json.dumps(env_args, indent=4)
        for subset, members in subsets_of(buffer).items():
            for part in subset.split("/"):
                check_name(part, f"{buffer.name}: attrs['subsets']")
            kept = [name for name in (_demo_name(member, buffer) for member in members) if name in data]
            file[f"mask/{subset}"] = np.array(kept, dtype="S")


def _compare(path: Path, buffer: ReplayBuffer, names: list[str], places: dict[str, str]) -> None:
    with open_hdf5(path) as file, progress("comparing with the buffer", buffer.n_steps) as advance:
        for name, episode in zip(names, buffer.episodes(), strict=True):
            for key, place in places.items():
                written = file[f"data/{name}/{place}"][()]
                if written.dtype != episode[key].dtype or not np.array_equal(written, episode[key]):
                    raise InputError(f"{buffer.name}: {key} of {name} did not arrive in the file as it is")
            advance(len(written))
