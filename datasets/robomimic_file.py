"""What a robomimic or robosuite HDF5 file holds, read and checked before anything is converted.

    data.attrs["env_args"]                  the simulator, JSON         robosuite's: env, env_info, repository_version
    data/demo_0.attrs["num_samples"]        T                           robosuite's: not there
    data/demo_0/actions          [T, A]     ─▶ column action
    data/demo_0/rewards, dones   [T]        ─▶ columns reward, done
    data/demo_0/states           [T, S]     ─▶ column states            the simulator's, not the policy's
    data/demo_0/obs/<key>        [T, …]     ─▶ column <key>
    data/demo_0/next_obs/<key>   [T, …]        left out: obs one step on
    data/demo_0/<other>          [T, …]     ─▶ column <other>           with . for /
    mask/<name>                             ─▶ attrs["subsets"][name]   names of demos

Sources: robomimic's and robosuite's documentation of their datasets.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from action_diffusion.datasets.checks import check_dtype
from action_diffusion.datasets.demos import DEMO, pack
from action_diffusion.datasets.progress import progress
from action_diffusion.datasets.store import reading
from action_diffusion.errors import InputError

NAMES = {"actions": "action", "rewards": "reward", "dones": "done"}
ROBOSUITE_TYPE = 1
"""robomimic's number for robosuite among its kinds of simulators."""
_LAYOUTS = "robomimic's files (data/demo_0/actions, data.attrs['env_args']) and robosuite's demonstrations are read"


class Stored(NamedTuple):
    """What a column is in the file: the path inside a demo, the shape of a row, the type (native byte order)."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def n_bytes(self) -> int:
        """Of a row."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """A file whose demos all have the same columns. demos: names in the order of their numbers; ends: int64 [E]."""

    path: Path
    kind: str
    demos: list[str]
    ends: np.ndarray
    columns: dict[str, Stored]
    subsets: dict[str, list[str]]
    env_args: dict[str, Any]
    hdf5_attributes: str

    @property
    def has_observations(self) -> bool:
        return any(stored.path.startswith("obs/") for stored in self.columns.values())


@contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """The file, an `h5py.File` for reading. Raises `InputError` where it is missing, truncated or no HDF5."""
    try:
        import h5py
    except ImportError:
        raise InputError(f"{path}: HDF5 files need h5py: pip install 'action-diffusion[robomimic]'") from None
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with reading(str(path)):
        file = h5py.File(path, "r")
    with file:
        yield file


def describe(path: Path) -> Layout:
    """Everything about the file but its rows, of which only the shapes are looked at.

    Raises `InputError` for another layout, no or unreadable `env_args`, lengths that differ within a demo or from
    its `num_samples`, demos that do not hold the same, values that are no numbers, and masks that name other demos.
    """
    with open_hdf5(path) as file, reading(str(path)):
        demos = _demos(file, path)
        env_args = _env_args(file["data"].attrs, path)
        columns: dict[str, Stored] = {}
        lengths = []
        with progress(f"reading what is in {path.name}", len(demos)) as advance:
            for name in demos:
                found, length = _demo(file[f"data/{name}"], f"{path}: data/{name}")
                _check_same(found, columns or found, f"{path}: data/{name}", demos[0])
                columns = columns or found
                lengths.append(length)
                advance(1)
        places = [("/", file), ("data", file["data"]), *((f"data/{name}", file["data"][name]) for name in demos)]
        return Layout(
            path=path,
            kind="robomimic" if "env_args" in file["data"].attrs else "robosuite",
            demos=demos,
            ends=np.cumsum(lengths, dtype=np.int64),
            columns=columns,
            subsets=_subsets(file, demos, path),
            env_args=env_args,
            hdf5_attributes=pack(((place, dict(item.attrs)) for place, item in places), str(path)),
        )


def _demos(file: Any, path: Path) -> list[str]:
    data = file.get("data")
    names = list(data) if hasattr(data, "keys") else []
    odd = [name for name in names if not re.fullmatch(r"demo_\d+", name)]
    if not names or odd:
        problem = f"data/{odd[0]} is no demo_<number>" if odd else "holds no data/demo_<number>"
        raise InputError(f"{path}: unknown layout ({problem}): {_LAYOUTS}")
    return sorted(names, key=lambda name: int(name[5:]))


def _env_args(attrs: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """robomimic's `env_args`, or the same made of what robosuite writes."""
    if "env_args" not in attrs and not {"env", "env_info"} <= set(attrs):
        raise InputError(f"{path}: data has no attribute env_args, which says what simulator it is from: {_LAYOUTS}")
    name = "env_args" if "env_args" in attrs else "env_info"
    try:
        found = json.loads(attrs[name])
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: data's attribute {name} is no JSON: {error}") from None
    if name == "env_info":
        version = attrs.get("repository_version")
        found = {"env_name": attrs["env"], "env_version": version, "type": ROBOSUITE_TYPE, "env_kwargs": found}
    lacking = [key for key in ("env_name", "env_kwargs") if not isinstance(found, dict) or key not in found]
    if lacking or not isinstance(found["env_kwargs"], dict):
        raise InputError(f"{path}: data's attribute {name} must be an object with {', '.join(lacking) or 'env_kwargs'}")
    return dict(found)


def _demo(demo: Any, where: str) -> tuple[dict[str, Stored], int]:
    """Columns and length of one demo."""
    datasets = {name: item for name, item in _datasets(demo) if not name.startswith("next_obs/")}
    if "actions" not in datasets:
        raise InputError(f"{where} has no actions: {_LAYOUTS}")
    lengths = {name: item.shape[0] if item.ndim else 0 for name, item in datasets.items()}
    if "num_samples" in demo.attrs:
        lengths["num_samples"] = int(demo.attrs["num_samples"])
    length = lengths["actions"]
    others = [f"{name} {rows}" for name, rows in lengths.items() if rows != length]
    if others:
        raise InputError(f"{where} has unequal lengths: actions {length}, but {', '.join(others)}")
    if length == 0:
        raise InputError(f"{where} is empty")
    columns: dict[str, Stored] = {}
    for name, item in datasets.items():
        column = NAMES.get(name, name.removeprefix("obs/")).replace("/", ".")
        if column in columns or column == DEMO:
            taken = columns[column].path if column in columns else "the number of the demo"
            raise InputError(f"{where}/{name} would become column {column}, which is {taken}: rename it")
        dtype = item.dtype.newbyteorder("=")
        check_dtype(dtype, name, where)
        if 0 in item.shape:
            raise InputError(f"{where}/{name} has no values: its shape is {list(item.shape)}")
        columns[column] = Stored(name, item.shape[1:], dtype)
    return columns, length


def _datasets(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every array under a group by its path, also behind links to other files."""
    for name in group:
        item = group[name]
        if hasattr(item, "keys"):
            yield from _datasets(item, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", item


def _check_same(found: Mapping[str, Stored], expected: Mapping[str, Stored], where: str, first: str) -> None:
    for column in {**expected, **found}:
        one, other = found.get(column), expected.get(column)
        if one is None:
            raise InputError(f"{where} lacks {expected[column].path}, which {first} has")
        if other is None:
            raise InputError(f"{where} has {one.path}, which {first} lacks")
        if one != other:
            raise InputError(
                f"{where}/{one.path} has rows {list(one.shape)} of {one.dtype}, in {first} they are "
                f"{list(other.shape)} of {other.dtype}"
            )


def _subsets(file: Any, demos: list[str], path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, item in _datasets(file["mask"]) if "mask" in file else ():
        members = [member.decode() if isinstance(member, bytes) else str(member) for member in item[()].tolist()]
        strangers = sorted(set(members) - set(demos))
        if strangers:
            raise InputError(f"{path}: mask/{name} names {strangers[0]}, which is not in data/ ({len(demos)} demos)")
        found[name] = members
    return found
