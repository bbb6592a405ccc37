"""Observations for demonstrations that hold only states: the simulator is put into each state and looked at.

    source.hdf5  data/demo_1/{states, actions}
                      │ observer(model, states), one demo at a time, several simulators beside each other
                      ▼
    folder/demo_1.hdf5  obs/<key> [T, …]     one finished file a demo, so that a call that was cut off goes on
    folder/all.hdf5     robomimic's layout, made of links to the source and to those files

What `all.hdf5` shows is then converted like any other file; only its links are followed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from action_diffusion.datasets.hdf5.reading import open_hdf5
from action_diffusion.datasets.robomimic.file import FileLayout, describe
from action_diffusion.datasets.storage.checks import check_dtype, check_finite
from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path
from action_diffusion.parallel import in_processes
from action_diffusion.progress import progress


class Observer(Protocol):
    """Says what recorded states look like. It travels to other processes, so it must pickle."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that the observations depend on, as plain data; kept in the buffer's attributes."""

    def __call__(self, model: str | None, states: np.ndarray) -> dict[str, np.ndarray]:
        """model: the demo's own MJCF, where the file has it; states [T, S] -> {key: [T, …]}."""


def observed(layout: FileLayout, observer: Observer, folder: Path, workers: int) -> FileLayout:
    """Of a file in robomimic's layout, in `folder`, that has the source's demos and what `observer` says of them.

    Demos that an earlier call finished are not looked at again. Raises `InputError` where the source has no states,
    or the observer gives other than T rows of finite numbers.
    """
    if "states" not in layout.columns:
        raise InputError(f"{layout.path} has no states: the simulator cannot show what they look like")
    folder.mkdir(parents=True, exist_ok=True)
    lengths = dict(zip(layout.demos, np.diff(layout.ends, prepend=0).tolist(), strict=True))
    todo = [name for name in layout.demos if not (folder / f"{name}.hdf5").exists()]
    total, left = sum(lengths.values()), sum(lengths[name] for name in todo)
    with progress("rendering the recorded states", total, total - left) as advance:
        work = functools.partial(_observe, layout.path, observer, folder)
        for name, _ in in_processes(work, todo, workers, "with a simulator"):
            advance(lengths[name])
    path = folder / "all.hdf5"
    _link(layout, folder, path)
    return describe(path, [str(layout.path.resolve()), *(f"{name}.hdf5" for name in layout.demos)])


def _observe(source: Path, observer: Observer, folder: Path, name: str) -> None:
    import h5py

    with open_hdf5(source) as file:
        demo = file[f"data/{name}"]
        states, model = demo["states"][()], demo.attrs.get("model_file")
    observations = observer(model, states)
    with atomic_path(folder / f"{name}.hdf5") as temporary, h5py.File(temporary, "w") as file:
        for key, values in observations.items():
            where = f"the simulator's view of {source}"
            check_dtype(values.dtype, f"{name}/{key}", where)
            check_finite(values, f"{name}/{key}", where)
            if len(values) != len(states):
                raise InputError(f"{where}: data/{name}/{key} has {len(values)} rows, the states {len(states)}")
            file.create_dataset(f"obs/{key}", data=values)


def _link(layout: FileLayout, folder: Path, path: Path) -> None:
    """Links, so that nothing is copied; what is both in the source and observed is refused."""
    import h5py

    source = str(layout.path.resolve())
    with open_hdf5(layout.path) as original, atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(layout.env_args)
        for name in layout.demos:
            demo, obs = data.create_group(name), data.create_group(f"{name}/obs")
            for key in original[f"data/{name}"]:
                if key not in ("obs", "next_obs"):
                    demo[key] = h5py.ExternalLink(source, f"/data/{name}/{key}")
            for key in original.get(f"data/{name}/obs", ()):
                obs[key] = h5py.ExternalLink(source, f"/data/{name}/obs/{key}")
            with open_hdf5(folder / f"{name}.hdf5") as shown:
                for key in shown["obs"]:
                    if key in obs:
                        raise InputError(f"{layout.path} has observations {key} already: leave that one out")
                    obs[key] = h5py.ExternalLink(f"{name}.hdf5", f"/obs/{key}")
