"""`meta/info.json` of a LeRobotDataset, checked at the door: what is read afterwards has the types that it must have.

Where it contradicts the files beside it the files count, and `Info.said` says so.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from action_diffusion.datasets.formats.contract import MARK
from action_diffusion.datasets.formats.lerobot.names import EPISODES_A_CHUNK, INFO, TEMPLATES, V21, V30
from action_diffusion.datasets.formats.paths import TEXT_BYTES, fields, filled, inside
from action_diffusion.datasets.storage.dimensions import are_names
from action_diffusion.datasets.storage.store import reading
from action_diffusion.errors import InputError

_VERSION = re.compile(r"v?(?P<major>\d{1,3})(?:\.(?P<minor>\d{1,3}))?(?:\.\d+)*")
_READ = {2: V21, 3: V30}
_FIELDS = {
    (V21, "data_path"): {"episode_chunk", "episode_index"},
    (V21, "video_path"): {"episode_chunk", "episode_index", "video_key"},
    (V30, "data_path"): {"chunk_index", "file_index"},
    (V30, "video_path"): {"chunk_index", "file_index", "video_key"},
}
_HIGHEST_RATE = 1e4
_LONGEST = 200


class FeatureInfo(NamedTuple):
    """shape: of a row, as it is declared. names: of the values of a vector, where each has one."""

    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...] = ()


@dataclass
class Info:
    """version: v2.1 (a file an episode) or v3.0 (many episodes a file), whose layout the files have. rate: Hz.

    said: what is otherwise than info.json says, in words.
    """

    root: Path
    version: str
    rate: float
    features: dict[str, FeatureInfo]
    templates: dict[str, str]
    chunk: int
    totals: tuple[Any, Any]
    robot: Any
    notes: Any
    said: list[str] = field(default_factory=list)

    def file(self, template: str, **values: str | int) -> Path:
        """A plain file of the data set. Raises `InputError` where there is none, or it leads out of the folder."""
        return inside(self.root, filled(self.templates[template], values))


def read_info(path: Path) -> Info:
    """Raises `InputError` for a version that is not read, and for what lacks what is needed or is of another type."""
    file = inside(path, INFO, most=TEXT_BYTES)
    with reading(str(file)):
        info = json.loads(file.read_bytes())
    needed = ("codebase_version", "fps", "features", "total_episodes", "total_frames")
    lacking = [name for name in needed if not isinstance(info, dict) or name not in info]
    if lacking:
        raise InputError(f"{file} lacks {', '.join(lacking)}")
    said: list[str] = []
    version = _layout(path, _version(file, info["codebase_version"], said), said)
    templates = {name: _template(info.get(name), version, name, said) for name in ("data_path", "video_path")}
    chunk = info.get("chunks_size", EPISODES_A_CHUNK)
    if not _is_whole(chunk) or chunk < 1:
        raise InputError(f"{file}: chunks_size is {_short(chunk)}, expected a whole number above 0")
    totals = info["total_episodes"], info["total_frames"]
    rate, features = _rate(file, info["fps"]), _features(file, info["features"])
    robot = info.get("robot_type")
    return Info(path, version, rate, features, templates, chunk, totals, robot, info.get(MARK), said)


def _version(file: Path, found: object, said: list[str]) -> str:
    match = _VERSION.fullmatch(str(found))
    version = _READ.get(int(match["major"])) if match else None
    if match is None or version is None:
        raise InputError(f"{file}: LeRobotDataset {_short(found)}: v2.0, v2.1 and v3.0 are read")
    if int(match["minor"] or 0) > int(version[-1]):
        said.append(f"LeRobotDataset {found} is later than {version}, and was read like it")
    return version


def _layout(path: Path, version: str, said: list[str]) -> str:
    """The version that the files are laid out as, whatever info.json says."""
    places = {V21: (path / "meta/episodes.jsonl").exists(), V30: (path / "meta/episodes").is_dir()}
    other = V30 if version == V21 else V21
    if places[other] and not places[version]:
        said.append(f"info.json says {version}, the files are {other}'s")
        return other
    return version


def _template(found: object, version: str, name: str, said: list[str]) -> str:
    """info.json's, or the version's own where that is another version's or none."""
    usual, wanted = TEMPLATES[version][name], fields(found)
    if found is None or found == usual:
        return usual
    if wanted is None:
        raise InputError(f"{INFO}: {name} is {_short(found)}, expected one such as {usual}")
    if not wanted <= _FIELDS[version, name]:
        said.append(f"{name} in info.json is not of {version}: {usual} was read")
        return usual
    return str(found)


def _rate(file: Path, found: object) -> float:
    try:
        rate = math.nan if isinstance(found, bool) else float(found)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        rate = math.nan
    if not 0 < rate <= _HIGHEST_RATE:
        raise InputError(f"{file}: fps is {_short(found)}, expected frames a second above 0, at most {_HIGHEST_RATE:g}")
    return rate


def _features(file: Path, found: object) -> dict[str, FeatureInfo]:
    if not isinstance(found, Mapping) or not found:
        raise InputError(f"{file}: expected features, each with dtype and shape")
    features = {}
    for name, feature in found.items():
        if not 0 < len(name) <= _LONGEST or not name.isprintable():
            raise InputError(f"{file}: {_short(name)} is no name of a feature")
        shape = feature.get("shape") if isinstance(feature, dict) else None
        if not isinstance(shape, list) or not all(_is_whole(length) and length >= 0 for length in shape):
            raise InputError(f"{file}: feature {_short(name)} must have a dtype and a shape of whole numbers")
        if not isinstance(feature.get("dtype"), str):
            raise InputError(f"{file}: feature {_short(name)} must have a dtype, such as float32")
        features[name] = FeatureInfo(feature["dtype"], tuple(shape), _names(feature.get("names"), shape))
    return features


def _names(found: object, shape: list[int]) -> tuple[str, ...]:
    """From ["x", "y"], or {"motors": ["x", "y"]}; () for anything else."""
    names = next(iter(found.values())) if isinstance(found, dict) and len(found) == 1 else found
    return tuple(names) if len(shape) == 1 and isinstance(names, list) and are_names(names, shape[0]) else ()


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a number of more than 40 digits"
    return text if len(text) <= 60 else f"{text[:60]}…"
