"""What a robomimic or robosuite HDF5 file holds, read and checked before anything is converted.

    data.attrs["env_args"]                  the simulator, JSON         robosuite's: env, env_info, repository_version;
                                                                        real robots': missing, or empty
    data/demo_0.attrs["num_samples"]        T                           robosuite's: not there
    data/demo_0/actions, obs/<key>, …       columns                     see `demo`
    mask/<name>                             ─▶ attrs["subsets"][name]   names of demos

The demos may have any name with a number (demo_0, episode_0, traj_0), in data/ or at the root. Sources: robomimic's,
robosuite's, MimicGen's, LIBERO's, Isaac Lab's and ManiSkill's documentation of their datasets.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.hdf5.reading import (
    NAME_BYTES,
    Budget,
    check_sound,
    members,
    open_hdf5,
    reading_hdf5,
    walk,
)
from action_diffusion.datasets.robomimic.attributes import TASK_INDEX
from action_diffusion.datasets.robomimic.demo import (
    Attributes,
    StoredColumn,
    columns_of,
    is_observation,
    is_text,
    survey,
    task_of,
    tasks_of,
)
from action_diffusion.errors import InputError
from action_diffusion.progress import progress

ROBOSUITE_TYPE = 1
"""robomimic's number for robosuite among its kinds of simulators."""
_LAYOUTS = "robomimic's files (data/demo_0/actions and data/demo_0/obs/) and robosuite's demonstrations are read"
_NAME = re.compile(r"([A-Za-z_-]*?)_?([0-9]+)")


@dataclass(frozen=True)
class FileLayout:
    """A file whose demos all have the same columns. demos: names in the order of their numbers; ends: int64 [E].

    group: what holds the demos, "data/" or "". left_out: path → why it is no column. tasks: each once, in words;
    task_index: of each demo.
    """

    path: Path
    kind: str
    group: str
    demos: list[str]
    ends: np.ndarray
    columns: dict[str, StoredColumn]
    subsets: dict[str, list[str]]
    env_args: dict[str, Any]
    hdf5_attributes: str
    left_out: dict[str, str]
    tasks: list[str]
    task_index: list[int]

    @property
    def has_observations(self) -> bool:
        return any(is_observation(stored.path) for stored in self.columns.values())

    @property
    def control_rate(self) -> float | None:
        """Steps a second (Hz), where the simulator's arguments say it."""
        said = self.env_args.get("env_kwargs", {}).get("control_freq")
        known = isinstance(said, int | float) and not isinstance(said, bool) and 0 < said < math.inf
        return float(said) if known else None


def describe(path: Path, linked: Collection[str] = ()) -> FileLayout:
    """Everything about the file but its rows, of which only the shapes are looked at.

    linked: files beside it, of our own making, that its links may lead to. Raises `InputError` for another layout, an
    unreadable `env_args`, what `hdf5` and `demo` refuse, and masks that name other demos.
    """
    check_sound(path)
    with open_hdf5(path) as file, reading_hdf5(str(path)):
        budget = Budget(sum((path.parent / name).stat().st_size for name in (path.name, *linked)))
        root = dict(members(file, str(path), linked))
        group = "data/" if "data" in root else ""
        data = root["data"] if group else file
        kept = Attributes(path)
        names = _demos(data, path, group, linked, kept.left_out)
        attrs = kept.add("/", file, budget)
        if group:
            attrs = kept.add("data", data, budget)
        kind, env_args = _env_args(attrs, path)
        demos = []
        with progress(f"reading what is in {path.name}", len(names)) as advance:
            for name in names:
                own = kept.add(f"{group}{name}", data[name], budget)
                demo = survey(data[name], f"{path}: {group}{name}", budget, linked)
                demo.n_samples, demo.task = _n_samples(own), demo.task or task_of(own, attrs)
                demos.append(demo)
                advance(1)
        columns = columns_of(demos, names[0])
        words, task_index = tasks_of(demos)
        if len(words) > 1 and TASK_INDEX in columns.stored:
            words, kept.left_out["the tasks in words"] = (
                [],
                f"{columns.stored[TASK_INDEX].path} is the column {TASK_INDEX}",
            )
        return FileLayout(
            path=path,
            kind=kind,
            group=group,
            demos=names,
            ends=np.cumsum(columns.lengths, dtype=np.int64),
            columns=columns.stored,
            subsets=_subsets(root["mask"], names, f"{path}: mask", linked) if "mask" in root else {},
            env_args=env_args,
            hdf5_attributes=kept.text(),
            left_out=kept.left_out | columns.left_out,
            tasks=words,
            task_index=task_index,
        )


def _demos(data: Any, path: Path, group: str, linked: Collection[str], left_out: dict[str, str]) -> list[str]:
    """Names of the demos, in the order of their numbers."""
    items = dict(members(data, f"{path}: {group}".rstrip(": /"), linked)) if hasattr(data, "keys") else {}
    groups = {name: item for name, item in items.items() if hasattr(item, "keys")}
    found = {name: match for name in groups if (match := _NAME.fullmatch(name))}
    odd = [name for name in groups if name not in found and {"actions", "action"} & set(groups[name])]
    prefixes = sorted({match[1] for match in found.values()})
    if odd or len(prefixes) != 1:
        problem = f"{group}{odd[0]} is no demo_<number>" if odd else "holds no data/demo_<number>"
        if not odd and prefixes:
            problem = f"holds both {prefixes[0]}_<number> and {prefixes[1]}_<number>"
        raise InputError(f"{path}: unknown layout ({problem}): {_LAYOUTS}")
    left_out.update({f"{group}{name}": "no demo" for name in items if name not in found and name != "mask"})
    return sorted(found, key=lambda name: (int(found[name][2]), name))


def _env_args(attrs: Mapping[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """The layout's name, and robomimic's `env_args`, or the same made of what robosuite writes; nothing where none."""
    robosuite = "env_args" not in attrs and {"env", "env_info"} <= set(attrs)
    name = "env_info" if robosuite else "env_args"
    text = attrs.get(name, "")
    try:
        found = json.loads(text) if not isinstance(text, str) or text.strip() else None
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: data's attribute {name} is no JSON: {error}") from None
    found = {} if found is None else found
    if robosuite:
        version = attrs.get("repository_version")
        found = {"env_name": attrs["env"], "env_version": version, "type": ROBOSUITE_TYPE, "env_kwargs": found}
    wrong = [key for key, kind in (("env_name", str), ("env_kwargs", dict)) if not _is(found, key, kind)]
    if wrong:
        raise InputError(f"{path}: data's attribute {name} must be an object with {', '.join(wrong)}")
    return "robosuite" if robosuite else "robomimic", dict(found)


def _is(found: Any, key: str, kind: type) -> bool:
    return isinstance(found, dict) and isinstance(found.get(key, kind()), kind)


def _n_samples(attrs: Mapping[str, Any]) -> int | None:
    return int(attrs["num_samples"]) if "num_samples" in attrs else None


def _subsets(mask: Any, demos: list[str], where: str, linked: Collection[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    known = set(demos)
    for name, item in walk(mask, where, linked) if hasattr(mask, "keys") else ():
        if item.ndim != 1 or not is_text(item) or item.dtype.itemsize > NAME_BYTES:
            raise InputError(f"{where}/{name} must hold names of demos, one a row")
        found[name] = []
        for row in range(len(item)):
            member = item[row].decode()
            if member not in known:
                raise InputError(f"{where}/{name} names {member:.60}, which is not in data/ ({len(demos)} demos)")
            found[name].append(member)
            if len(found[name]) > len(demos):
                raise InputError(f"{where}/{name} names more demos than there are ({len(demos)})")
    return found
