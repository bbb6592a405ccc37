"""Which files of a plain folder are which episode, of what length, with which keys; checked before anything is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from action_diffusion.datasets.formats.folder.csv_rows import grouped, guessed, parse, read_csv, read_header
from action_diffusion.datasets.formats.paths import TEXT_BYTES, inside, matching, natural
from action_diffusion.datasets.formats.video import VideoInfo, video_info
from action_diffusion.datasets.storage.store import reading
from action_diffusion.errors import InputError, unknown
from action_diffusion.progress import progress


class FolderColumn(NamedTuple):
    """Where a key is, and what: the shape and type of a row; of a video also what its frames are."""

    path: Path
    row: tuple[int, ...]
    dtype: np.dtype
    video: VideoInfo | None = None


@dataclass
class FolderEpisode:
    """One CSV file and what lies beside it. columns: key → its columns in the CSV; words: columns that hold none."""

    csv: Path
    length: int
    keys: dict[str, FolderColumn]
    columns: dict[str, list[int]]
    words: list[str]

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
    if not (path / "dataset.json").exists():
        return None
    file = inside(path, "dataset.json", most=TEXT_BYTES)
    with reading(str(file)):
        notes = json.loads(file.read_bytes())
        if not isinstance(notes, dict) or not {"rate", "episodes", "csv"} <= set(notes):
            raise InputError(f"{file}: expected rate, episodes and csv: without it the CSVs are read as they are")
        if not 0 < float(notes["rate"]) < math.inf:
            raise InputError(f"{file}: rate is {notes['rate']!r}, expected rows a second above 0")
        for key, note in notes["csv"].items():
            if np.dtype(note["dtype"]).kind not in "biuf" or not note["columns"]:
                raise InputError(f"{file}: {key} must be numbers in one or more columns")
    return notes


def episodes_of(
    path: Path, notes: Mapping[str, Any] | None, vectors: Mapping[str, Sequence[str]]
) -> list[FolderEpisode]:
    """Every episode. vectors: key → the columns that make it, in somebody else's CSVs.

    Raises `InputError` for lengths that differ within an episode, and keys that differ between them.
    """
    files = _csv_files(path, notes)
    known = dict(notes["csv"]) if notes else None
    if known is not None and vectors:
        raise InputError(f"{path / 'dataset.json'} says which columns are {next(iter(vectors))}: leave the option out")
    episodes: list[FolderEpisode] = []
    with progress(f"reading what is in {path.name}", len(files)) as advance:
        for file in files:
            episodes.append(_episode(path, file, known, vectors))
            advance(1)
    _unify(episodes, known=notes is not None)
    if notes is not None:
        for episode, note in zip(episodes, notes["episodes"], strict=True):
            if episode.length != note["length"]:
                raise InputError(f"{episode.csv}: {episode.length} rows, dataset.json says {note['length']}")
    return episodes


def _csv_files(path: Path, notes: Mapping[str, Any] | None) -> list[Path]:
    if notes is not None:
        folders = [str(note["folder"]) for note in notes["episodes"]]
        if not folders or len(set(folders)) < len(folders):
            raise InputError(f"{path / 'dataset.json'}: expected a folder for each episode, none of them twice")
        return [inside(path, Path(folder) / "rows.csv", most=TEXT_BYTES) for folder in folders]
    files = list(matching(path, "*.csv")) or list(matching(path, "*/*.csv"))
    names = sorted((file.relative_to(path).as_posix() for file in files), key=natural)
    return [inside(path, name, most=TEXT_BYTES) for name in names]


def _episode(
    root: Path, csv: Path, known: Mapping[str, Any] | None, vectors: Mapping[str, Sequence[str]]
) -> FolderEpisode:
    """known: key → its columns in the CSV and its type; None in somebody else's folder."""
    names = read_header(csv)
    columns = _chosen(csv, names, vectors) if known is None else _known(csv, names, known)
    texts = _texts(csv)
    if len(texts) == 0:
        raise InputError(f"{csv}: holds no rows")
    keys: dict[str, FolderColumn] = {}
    words: list[str] = []
    for key, positions in columns.items():
        single = key not in vectors and [names[position] for position in positions] == [key]
        where = f"{csv}: {key}"
        dtype = np.dtype(known[key]["dtype"]) if known else guessed(texts[:, positions], where)
        if dtype is not None:
            keys[key] = FolderColumn(csv, () if single else (len(positions),), dtype)
        elif single:
            words.append(key)
        else:
            raise InputError(f"{where} holds words, expected numbers")
    for key, file in _beside(csv, ours=known is not None).items():
        if key in keys:
            raise InputError(f"{file}: {key} is in {csv.name} as well: rename one")
        file = inside(root, file.relative_to(root))
        keys[key], length = _array(file) if file.suffix == ".npy" else _video(file)
        if length != len(texts):
            what = "rows" if file.suffix == ".npy" else "frames"
            raise InputError(f"{file}: {length} {what}, but {csv.name} has {len(texts)} rows: not one recording")
    if not keys:
        raise InputError(f"{csv}: holds no numbers, or columns that are not between commas, semicolons or tabs")
    return FolderEpisode(csv, len(texts), keys, columns, words)


def _chosen(csv: Path, names: list[str], vectors: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """Key → its columns: the vectors that were asked for, of columns or of numbered vectors, and all that is left."""
    groups, found = grouped(names), dict[str, list[int]]()
    for key, parts in vectors.items():
        for part in parts:
            if part not in names and part not in groups:
                raise unknown("column", part, {*names, *groups}, where=str(csv))
        found[key] = [
            position for part in parts for position in ([names.index(part)] if part in names else groups[part])
        ]
    taken = [position for positions in found.values() for position in positions]
    twice = next((names[position] for position in taken if taken.count(position) > 1), None)
    if twice is not None:
        raise InputError(f"column {twice} is asked for twice: each column is in one vector")
    for key, positions in groups.items():
        left = [position for position in positions if position not in taken]
        rest = {key: left} if left == positions else {names[position]: [position] for position in left}
        if set(rest) & set(found):
            raise InputError(f"{csv}: {next(iter(rest))} is a column already: {key}= must name it, or rename it")
        found |= rest
    return found


def _known(csv: Path, names: list[str], known: Mapping[str, Any]) -> dict[str, list[int]]:
    wanted = {key: [str(name) for name in note["columns"]] for key, note in known.items()}
    lacking = [name for parts in wanted.values() for name in parts if name not in names]
    if lacking:
        raise InputError(f"{csv} lacks column {lacking[0]}, which dataset.json describes")
    return {key: [names.index(name) for name in parts] for key, parts in wanted.items()}


def _beside(csv: Path, *, ours: bool) -> dict[str, Path]:
    """Key → its file. In a folder with one CSV all of them; else those that begin with its name."""
    files = sorted(file for file in matching(csv.parent, "*") if file.suffix in _BESIDE)
    if ours:
        return {file.stem: file for file in files}
    if len(list(matching(csv.parent, "*.csv"))) == 1:
        return {file.stem.removeprefix(f"{csv.stem}_").removeprefix(f"{csv.stem}."): file for file in files}
    beside = {}
    for file in files:
        rest = file.stem.removeprefix(csv.stem)
        if file.stem.startswith(csv.stem) and (not rest or rest[0] in "._-"):
            beside[rest[1:] or "video"] = file
    return beside


def _array(file: Path) -> tuple[FolderColumn, int]:
    with reading(str(file)):
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    if array.ndim == 0 or array.dtype.kind not in "biuf":
        raise InputError(f"{file}: {array.dtype} {list(array.shape)}, expected one row of numbers a step")
    return FolderColumn(file, array.shape[1:], array.dtype), len(array)


def _video(file: Path) -> tuple[FolderColumn, int]:
    info = video_info(file)
    return FolderColumn(file, info.kind.shape, info.kind.dtype, info), info.frames


def _unify(episodes: list[FolderEpisode], *, known: bool) -> None:
    """Every episode has the first one's keys and shapes; whole numbers become float64 where another has fractions."""
    first = episodes[0]
    for episode in episodes[1:]:
        for key in {**first.keys, **episode.keys}:
            one, other = episode.keys.get(key), first.keys.get(key)
            if one is None or other is None or one.row != other.row or _moves(one) != _moves(other):
                raise InputError(f"{episode.csv.parent}: {key} is {_words(one)}, in {first.csv.parent} {_words(other)}")
    for key in first.keys:
        dtypes = {episode.keys[key].dtype for episode in episodes}
        if len(dtypes) > 1 and not known:
            for episode in episodes:
                episode.keys[key] = episode.keys[key]._replace(dtype=np.result_type(*dtypes))


def _moves(kind: FolderColumn) -> object:
    return kind.video and kind.video.kind


def _words(kind: FolderColumn | None) -> str:
    return "missing" if kind is None else f"{list(kind.row)} in {kind.path.name}"


def unused(path: Path, episodes: list[FolderEpisode]) -> list[str]:
    """Columns of words, and videos and arrays that belong to no episode."""
    words = dict.fromkeys(f"{name} (words)" for episode in episodes for name in episode.words)
    used = {kind.path for episode in episodes for kind in episode.keys.values()}
    files = matching(path, *(depth + suffix for depth in ("*", "*/*") for suffix in _BESIDE))
    return [*words, *sorted(file.relative_to(path).as_posix() for file in files if file not in used)]
