"""Which files of a plain folder are which episode, of what length, with which keys; checked before anything is read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from action_diffusion.datasets.formats.csv_rows import grouped, parse, read_csv, read_header
from action_diffusion.datasets.formats.video import video_info
from action_diffusion.datasets.progress import progress
from action_diffusion.datasets.store import reading
from action_diffusion.errors import InputError


class Kind(NamedTuple):
    """Where a key is, and what: the shape of a row, or the height and width of a video."""

    path: Path
    row: tuple[int, ...]
    dtype: np.dtype
    video: tuple[int, int] | None = None


@dataclass
class Episode:
    """One CSV file and what lies beside it. columns: key → its columns in the CSV."""

    csv: Path
    length: int
    keys: dict[str, Kind]
    columns: dict[str, list[int]]

    def numbers(self, key: str) -> np.ndarray:
        """Rows [T, …] of a key in the CSV."""
        kind = self.keys[key]
        texts = _texts(self.csv)
        values = parse(texts[:, self.columns[key]], kind.dtype, f"{self.csv}: {key}")
        return values.reshape(len(values), *kind.row)


_BESIDE = (".mp4", ".npy")
_last: dict[Path, tuple[int, np.ndarray]] = {}


def _texts(path: Path) -> np.ndarray:
    """The CSV's texts; the last file read is kept, because its keys are read one after the other."""
    time = path.stat().st_mtime_ns
    if _last.get(path, (None,))[0] != time:
        _last.clear()
        _last[path] = (time, read_csv(path))
    return _last[path][1]


def description(path: Path) -> dict[str, Any] | None:
    """`dataset.json`, where there is one of ours."""
    file = path / "dataset.json"
    if not file.is_file():
        return None
    with reading(str(file)):
        notes = json.loads(file.read_text())
    if not isinstance(notes, dict) or not {"rate", "episodes", "csv"} <= set(notes):
        raise InputError(f"{file}: expected rate, episodes and csv: without it the CSVs are read as they are")
    return notes


def episodes_of(path: Path, notes: Mapping[str, Any] | None) -> list[Episode]:
    """Every episode. Raises `InputError` for lengths that differ within one, and keys that differ between them."""
    files = _csv_files(path, notes)
    known = dict(notes["csv"]) if notes else None
    episodes: list[Episode] = []
    with progress(f"reading what is in {path.name}", len(files)) as advance:
        for file in files:
            episodes.append(_episode(file, known))
            advance(1)
    _unify(episodes, known=notes is not None)
    if notes is not None:
        for episode, note in zip(episodes, notes["episodes"], strict=True):
            if episode.length != note["length"]:
                raise InputError(f"{episode.csv}: {episode.length} rows, dataset.json says {note['length']}")
    return episodes


def _csv_files(path: Path, notes: Mapping[str, Any] | None) -> list[Path]:
    if notes is not None:
        return [path / str(note["folder"]) / "rows.csv" for note in notes["episodes"]]
    found = list(path.glob("*.csv")) or list(path.glob("*/*.csv"))
    return sorted(found, key=lambda file: _natural(file.relative_to(path).as_posix()))


def _natural(name: str) -> list[tuple[int, str]]:
    """episode_10 comes after episode_9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _episode(csv: Path, known: Mapping[str, Any] | None) -> Episode:
    """known: key → its columns in the CSV and its type; None in somebody else's folder."""
    names = read_header(csv)
    columns = grouped(names) if known is None else _known(csv, names, known)
    texts = _texts(csv)
    if len(texts) == 0:
        raise InputError(f"{csv}: holds no rows")
    keys: dict[str, Kind] = {}
    for key, positions in columns.items():
        row = () if [names[position] for position in positions] == [key] else (len(positions),)
        dtype = np.dtype(known[key]["dtype"]) if known else _guess(texts[:, positions], f"{csv}: {key}")
        keys[key] = Kind(csv, row, dtype)
    for key, file in _beside(csv, ours=known is not None).items():
        if key in keys:
            raise InputError(f"{file}: {key} is in {csv.name} as well: rename one")
        keys[key], length = _array(file) if file.suffix == ".npy" else _video(file)
        if length != len(texts):
            what = "rows" if file.suffix == ".npy" else "frames"
            raise InputError(f"{file}: {length} {what}, but {csv.name} has {len(texts)} rows: not one recording")
    return Episode(csv, len(texts), keys, columns)


def _known(csv: Path, names: list[str], known: Mapping[str, Any]) -> dict[str, list[int]]:
    wanted = {key: [str(name) for name in note["columns"]] for key, note in known.items()}
    lacking = [name for parts in wanted.values() for name in parts if name not in names]
    if lacking:
        raise InputError(f"{csv} lacks column {lacking[0]}, which dataset.json describes")
    return {key: [names.index(name) for name in parts] for key, parts in wanted.items()}


def _beside(csv: Path, *, ours: bool) -> dict[str, Path]:
    """Key → its file. In a folder with one CSV all of them; else those that begin with its name."""
    files = sorted(file for file in csv.parent.iterdir() if file.suffix in _BESIDE)
    if ours:
        return {file.stem: file for file in files}
    if len(list(csv.parent.glob("*.csv"))) == 1:
        return {file.stem.removeprefix(f"{csv.stem}_").removeprefix(f"{csv.stem}."): file for file in files}
    found = {}
    for file in files:
        rest = file.stem.removeprefix(csv.stem)
        if file.stem.startswith(csv.stem) and (not rest or rest[0] in "._-"):
            found[rest[1:] or "video"] = file
    return found


def _guess(texts: np.ndarray, where: str) -> np.dtype:
    """int64 where every text is a whole number, else float64."""
    try:
        texts.astype(np.int64)
        return np.dtype(np.int64)
    except (ValueError, OverflowError):
        parse(texts, np.dtype(np.float64), where)
        return np.dtype(np.float64)


def _array(file: Path) -> tuple[Kind, int]:
    with reading(str(file)):
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    if array.ndim == 0:
        raise InputError(f"{file}: expected one row a step")
    return Kind(file, array.shape[1:], array.dtype), len(array)


def _video(file: Path) -> tuple[Kind, int]:
    info = video_info(file)
    return Kind(file, (*info.size, 3), np.dtype(np.uint8), info.size), info.frames


def _unify(episodes: list[Episode], *, known: bool) -> None:
    """Every episode has the first one's keys and shapes; whole numbers become float64 where another has fractions."""
    first = episodes[0]
    for episode in episodes[1:]:
        for key in {**first.keys, **episode.keys}:
            one, other = episode.keys.get(key), first.keys.get(key)
            if one is None or other is None or one.row != other.row or one.video != other.video:
                raise InputError(f"{episode.csv.parent}: {key} is {_words(one)}, in {first.csv.parent} {_words(other)}")
    for key in first.keys:
        dtypes = {episode.keys[key].dtype for episode in episodes}
        if len(dtypes) > 1 and not known:
            for episode in episodes:
                episode.keys[key] = episode.keys[key]._replace(dtype=np.result_type(*dtypes))


def _words(kind: Kind | None) -> str:
    return "missing" if kind is None else f"{list(kind.row)} in {kind.path.name}"


def unused(path: Path, episodes: list[Episode]) -> list[str]:
    """Videos and arrays that belong to no episode."""
    used = {kind.path for episode in episodes for kind in episode.keys.values()}
    found = (file for depth in ("*", "*/*") for suffix in _BESIDE for file in path.glob(depth + suffix))
    return sorted(file.relative_to(path).as_posix() for file in found if file not in used)
