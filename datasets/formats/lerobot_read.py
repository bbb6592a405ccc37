"""LeRobotDataset v2.0, v2.1 and v3.0 as columns, after checking that rows, episodes and videos belong together.

A row's frame is found by counting, so every count is checked before anything is read: rows a file, rows an episode,
frames a video; and that each row is where its episode_index, frame_index and timestamp say.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from action_diffusion.datasets.formats.columns import Piece, PiecewiseColumn
from action_diffusion.datasets.formats.contract import MARK, Opened, restored
from action_diffusion.datasets.formats.lerobot_names import OWN, V30, keys_for, read_info
from action_diffusion.datasets.formats.parquet import images, numbers, open_parquet, read_rows
from action_diffusion.datasets.formats.video import Part, video_column, video_info
from action_diffusion.datasets.progress import progress
from action_diffusion.datasets.replay_buffer import ReplayBuffer
from action_diffusion.datasets.store import Column, reading
from action_diffusion.errors import InputError


class Files(NamedTuple):
    """paths: of the rows; ends: the row after each; episode_ends; episodes: what the meta data says of each."""

    paths: list[Path]
    ends: np.ndarray
    episode_ends: np.ndarray
    episodes: list[dict[str, Any]]


def opened(path: Path) -> Opened:
    """Raises `InputError` for a version that is not read, and for whatever does not fit together."""
    with reading(str(path)):
        return _opened(path)


def _opened(path: Path) -> Opened:
    info = read_info(path)
    files = (_files30 if str(info["codebase_version"]) == V30 else _files21)(path, info)
    tasks = _tasks(path)
    _check_rows(path, info, files)
    stored: dict[str, Column] = {}
    left_out = []
    for name, feature in info["features"].items():
        dtype, shape = str(feature["dtype"]), tuple(int(length) for length in feature["shape"])
        if name in OWN and not (name == "task_index" and len(tasks) > 1):
            continue
        if dtype == "video":
            stored[name] = _video(path, info, files, name)
        elif dtype == "string":
            left_out.append(f"{name} (words)")
        else:
            stored[name] = _rows(files, name, dtype, shape)
    if MARK in info:
        columns, attrs = restored(stored, info[MARK], str(path / "meta/info.json"))
    else:
        keys = keys_for(stored)
        columns = {keys[name]: column for name, column in stored.items()}
        attrs = {"source": path.name, "control_rate": float(info["fps"]), "tasks": tasks}
        attrs |= {"robot_type": info["robot_type"]} if info.get("robot_type") else {}
    buffer = ReplayBuffer(columns=columns, episode_ends=files.episode_ends, attrs=attrs, path=path)
    return Opened(buffer, tuple(left_out))


def _files21(path: Path, info: dict[str, Any]) -> Files:
    """A file an episode."""
    episodes = sorted(_lines(path / "meta/episodes.jsonl"), key=lambda episode: int(episode["episode_index"]))
    paths = [path / _named(info, "data_path", episode["episode_index"]) for episode in episodes]
    with progress(f"reading what is in {path.name}", len(paths)) as advance:
        for file, episode in zip(paths, episodes, strict=True):
            rows = _n_rows(file)
            if rows != episode["length"]:
                raise InputError(f"{file}: {rows} rows, but meta/episodes.jsonl says {episode['length']}")
            advance(1)
    ends = np.cumsum([int(episode["length"]) for episode in episodes], dtype=np.int64)
    return Files(paths, ends, ends, episodes)


def _named(info: dict[str, Any], pattern: str, episode: int, camera: str = "") -> str:
    """A path of v2.1's."""
    chunk = int(episode) // int(info.get("chunks_size", 1000))
    return str(info[pattern]).format(episode_chunk=chunk, episode_index=int(episode), video_key=camera)


def _files30(path: Path, info: dict[str, Any]) -> Files:
    """Many episodes a file; rows are counted through all files in the order of their names."""
    wanted = {"episode_index", "length", "dataset_from_index", "dataset_to_index"}
    episodes: list[dict[str, Any]] = []
    for file in sorted(path.glob("meta/episodes/*/*.parquet")):
        with open_parquet(file) as opened_file, reading(str(file)):
            names = [name for name in opened_file.schema_arrow.names if not name.startswith("stats/")]
            if not wanted <= set(names):
                raise InputError(f"{file} lacks {', '.join(sorted(wanted - set(names)))}")
            episodes += opened_file.read(columns=names).to_pylist()
    episodes.sort(key=lambda episode: int(episode["episode_index"]))
    paths = sorted(path.glob("data/*/*.parquet"))
    if not paths or not episodes:
        raise InputError(f"{path}: holds no {'rows (data/)' if episodes else 'episodes (meta/episodes/)'}")
    ends = np.cumsum([_n_rows(file) for file in paths], dtype=np.int64)
    row = 0
    for episode in episodes:
        first, end = int(episode["dataset_from_index"]), int(episode["dataset_to_index"])
        if first != row or end - first != episode["length"]:
            raise InputError(
                f"{path}: episode {episode['episode_index']} has rows {first} to {end} and length {episode['length']}; "
                f"it should begin at row {row}"
            )
        row = end
    if row != ends[-1]:
        raise InputError(f"{path}: data/ has {ends[-1]} rows, but the episodes have {row}")
    return Files(paths, ends, np.array([episode["dataset_to_index"] for episode in episodes], np.int64), episodes)


def _check_rows(path: Path, info: dict[str, Any], files: Files) -> None:
    """Every row is where its own columns say."""
    if len(files.episode_ends) != info["total_episodes"] or files.ends[-1] != info["total_frames"]:
        raise InputError(
            f"{path}: {len(files.episode_ends)} episodes with {files.ends[-1]} rows, but meta/info.json says "
            f"{info['total_episodes']} with {info['total_frames']}"
        )
    lengths = np.diff(files.episode_ends, prepend=0)
    if (lengths < 1).any():
        raise InputError(f"{path}: episode {int(np.argmax(lengths < 1))} is empty")
    frame = np.arange(files.ends[-1]) - np.repeat(files.episode_ends - lengths, lengths)
    expected = {
        "episode_index": np.repeat([int(episode["episode_index"]) for episode in files.episodes], lengths),
        "frame_index": frame,
        "timestamp": frame / float(info["fps"]),
    }
    tolerance = {"timestamp": 0.5 / float(info["fps"])}
    for name, values in expected.items():
        column = _rows(files, name, "float64" if name == "timestamp" else "int64", (1,))
        for first in range(0, len(values), 1 << 16):
            found = column[first : first + (1 << 16)].ravel()
            bad = np.abs(found - values[first : first + len(found)]) > tolerance.get(name, 0)
            if bad.any():
                row = first + int(np.argmax(bad))
                raise InputError(f"{path}: row {row} has {name} {found[row - first]:g}, expected {values[row]:g}")


def _rows(files: Files, name: str, dtype: str, shape: tuple[int, ...]) -> PiecewiseColumn:
    """A feature in the parquet files."""
    if dtype == "image":
        size = (shape[0], shape[1]) if shape[-1] == 3 else (shape[-2], shape[-1])
        read = functools.partial(_read_images, files, name, size)
        return PiecewiseColumn((*size, 3), np.dtype(np.uint8), files.ends, read)
    try:
        kind = np.dtype(dtype)
    except TypeError:
        raise InputError(f"{files.paths[0]}: {name} is {dtype}, which is not read") from None
    row = () if name.startswith("next.") and shape == (1,) else shape
    return PiecewiseColumn(row, kind, files.ends, functools.partial(_read_numbers, files, name, kind, row))


def _read_numbers(files: Files, name: str, dtype: np.dtype, row: tuple[int, ...], piece: Piece) -> np.ndarray:
    where = f"{files.paths[piece.number]}: {name}"
    rows = read_rows(files.paths[piece.number], name, piece.first, piece.end, where)
    return numbers(rows, row, dtype, where)


def _read_images(files: Files, name: str, size: tuple[int, int], piece: Piece) -> np.ndarray:
    where = f"{files.paths[piece.number]}: {name}"
    return images(read_rows(files.paths[piece.number], name, piece.first, piece.end, where), size, where)


def _video(path: Path, info: dict[str, Any], files: Files, camera: str) -> PiecewiseColumn:
    """A camera's frames, episode by episode. Raises `InputError` unless episodes fill each video, frame by frame."""
    rate, lengths = float(info["fps"]), np.diff(files.episode_ends, prepend=0).tolist()
    parts: list[Part] = []
    for episode, length in zip(files.episodes, lengths, strict=True):
        if str(info["codebase_version"]) == V30:
            with reading(f"{path}: episode {episode['episode_index']}: {camera}"):
                chunk, file = episode[f"videos/{camera}/chunk_index"], episode[f"videos/{camera}/file_index"]
                first = round(float(episode[f"videos/{camera}/from_timestamp"]) * rate)
            name = str(info["video_path"]).format(video_key=camera, chunk_index=chunk, file_index=file)
        else:
            name, first = _named(info, "video_path", episode["episode_index"], camera), 0
        parts.append(Part(path / name, first, first + length))
    size = _check_videos(parts)
    return video_column(parts, size, files.episode_ends, rate=rate)


def _check_videos(parts: list[Part]) -> tuple[int, int]:
    """Height and width."""
    by_file: dict[Path, list[tuple[int, Part]]] = {}
    for index, part in enumerate(parts):
        by_file.setdefault(part.path, []).append((index, part))
    sizes = {}
    with progress("counting the frames", len(by_file)) as advance:
        for file, members in by_file.items():
            found, frame = video_info(file), 0
            for index, part in sorted(members, key=lambda member: member[1].first):
                if part.first != frame:
                    raise InputError(f"{file}: episode {index} begins at frame {part.first}, expected {frame}")
                frame = part.end
            if found.frames != frame:
                raise InputError(f"{file}: {found.frames} frames, but its episodes have {frame} rows")
            sizes[found.size] = file
            advance(1)
    if len(sizes) > 1:
        listed = ", ".join(f"{file.name} {list(size)}" for size, file in sizes.items())
        raise InputError(f"{parts[0].path.parent}: videos of different sizes: {listed}")
    return next(iter(sizes))


def _tasks(path: Path) -> list[str]:
    """In the order of their numbers."""
    if (path / "meta/tasks.jsonl").is_file():
        found = {int(line["task_index"]): str(line["task"]) for line in _lines(path / "meta/tasks.jsonl")}
    else:
        file = path / "meta/tasks.parquet"
        with open_parquet(file) as opened_file, reading(str(file)):
            table = opened_file.read().to_pydict()
            words = next(values for name, values in table.items() if name != "task_index")
            found = dict(zip(table["task_index"], map(str, words), strict=True))
    return [found[index] for index in sorted(found)]


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with reading(str(path)):
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _n_rows(path: Path) -> int:
    with open_parquet(path) as file:
        return int(file.metadata.num_rows)
