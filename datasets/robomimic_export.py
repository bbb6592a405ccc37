"""A replay buffer back to robomimic's HDF5: what its SequenceDataset, its playback and its metadata reader take.

    column <key>, rows of an episode      ─▶ data/demo_N/obs/<key>        or where attrs["columns"] says it was
    obs                                   ─▶ data/demo_N/next_obs/<key>

        obs       o0 o1 o2 … oT-1
        next_obs  o1 o2 …  oT-1 oT-1      the last is repeated: a buffer does not hold what came after the last action

A buffer that was not converted from HDF5 needs attrs["env_args"]; its columns action, reward, done and states go where
robomimic keeps them, and all others are observations.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.demos import DEMO, attributes, demo_names
from action_diffusion.datasets.files import atomic_path
from action_diffusion.datasets.progress import progress
from action_diffusion.datasets.replay_buffer import ReplayBuffer
from action_diffusion.datasets.robomimic_file import NAMES, open_hdf5
from action_diffusion.errors import InputError

_PLACES = {column: path for path, column in NAMES.items()} | {"states": "states"}


def export(source: str | Path, output: str | Path) -> dict[str, Any]:
    """Write the buffer at `source` to `output`, an HDF5 file that is not there yet, episode by episode.

    The file is compared with the buffer before it takes its name. Returns the numbers to report. Raises `InputError`
    where the buffer has no `env_args` or no column `action`, and for an output that exists.
    """
    buffer, output = ReplayBuffer.open(source), Path(output).expanduser()
    if output.exists():
        raise InputError(f"{output} exists: choose another path, or remove it")
    env_args = buffer.attrs.get("env_args")
    if not isinstance(env_args, dict) or not {"env_name", "env_kwargs"} <= set(env_args):
        raise InputError(
            f"{buffer.name} does not say what simulator it is from: robomimic's files need attrs['env_args'], "
            "with env_name and env_kwargs"
        )
    kept = buffer.attrs.get("columns", {})
    places = {key: kept.get(key) or _PLACES.get(key, f"obs/{key}") for key in buffer.keys if key != DEMO}
    if "actions" not in places.values():
        raise InputError(f"{buffer.name} has no column action; it has {', '.join(buffer.keys)}")
    names = demo_names(buffer)
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
        for place, values in attributes(buffer):
            if place in file:  # not so where the episode was dropped
                for name, value in values.items():
                    file[place].attrs[name] = value
        for name, length in zip(names, np.diff(buffer.episode_ends, prepend=0), strict=True):
            data[name].attrs["num_samples"] = length
        data.attrs["total"] = buffer.n_steps
        data.attrs["env_args"] = json.dumps(env_args, indent=4)
        for name, members in buffer.attrs.get("subsets", {}).items():
            file[f"mask/{name}"] = np.array([member for member in members if member in data], dtype="S")


def _compare(path: Path, buffer: ReplayBuffer, names: list[str], places: dict[str, str]) -> None:
    with open_hdf5(path) as file, progress("comparing with the buffer", buffer.n_steps) as advance:
        for name, episode in zip(names, buffer.episodes(), strict=True):
            for key, place in places.items():
                written = file[f"data/{name}/{place}"][()]
                if written.dtype != episode[key].dtype or not np.array_equal(written, episode[key]):
                    raise InputError(f"{buffer.name}: {key} of {name} did not arrive in the file as it is")
            advance(len(written))
