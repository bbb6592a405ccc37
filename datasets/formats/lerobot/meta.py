"""The `meta/` of a LeRobotDataset: tasks, episodes with their statistics, and `info.json` at the end."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from action_diffusion.datasets.formats.lerobot.names import EPISODES_A_CHUNK, INFO, TEMPLATES, V21, V30
from action_diffusion.datasets.formats.lerobot.stats import merged
from action_diffusion.datasets.formats.parquet import pyarrow
from action_diffusion.files import atomic_path

Row = dict[str, Any]
"""Of an episode: episode_index, length, from, to, from_timestamp, to_timestamp, tasks, stats, file (v3.0)."""


def write_meta21(root: Path, info: Row, rows: list[Row], tasks: list[str]) -> None:
    """v2.1: a line each in tasks.jsonl, episodes.jsonl and episodes_stats.jsonl."""
    cameras = [name for name, feature in info["features"].items() if feature["dtype"] == "video"]
    episodes = [{name: row[name] for name in ("episode_index", "tasks", "length")} for row in rows]
    stats = [{name: row[name] for name in ("episode_index", "stats")} for row in rows]
    _write_lines(root / "meta/tasks.jsonl", [{"task_index": n, "task": task} for n, task in enumerate(tasks)])
    _write_lines(root / "meta/episodes.jsonl", episodes)
    _write_lines(root / "meta/episodes_stats.jsonl", stats)
    more = {
        "total_tasks": len(tasks),
        "total_videos": len(cameras) * len(rows),
        "total_chunks": -(-len(rows) // EPISODES_A_CHUNK),
        "data_path": TEMPLATES[V21]["data_path"],
        "video_path": TEMPLATES[V21]["video_path"] if cameras else None,
    }
    _write_json(root / INFO, info | more)


def write_meta30(root: Path, info: Row, rows: list[Row], tasks: list[str]) -> None:
    """v3.0: tasks and episodes in parquet, and the statistics of all episodes together in stats.json."""
    cameras = [name for name, feature in info["features"].items() if feature["dtype"] == "video"]
    library = pyarrow()
    _write_tasks(root / "meta/tasks.parquet", tasks)
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = library.Table.from_pylist([_episode(row, cameras) for row in rows])
    library.parquet.write_table(table, path, compression="snappy")
    names = rows[0]["stats"]
    _write_json(root / "meta/stats.json", {name: merged(row["stats"][name] for row in rows) for name in names})
    more = {
        "total_tasks": len(tasks),
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "data_path": TEMPLATES[V30]["data_path"],
        "video_path": TEMPLATES[V30]["video_path"] if cameras else None,
    }
    _write_json(root / INFO, info | more)


def _episode(row: Row, cameras: Iterable[str]) -> Row:
    chunk, file = divmod(row["file"], EPISODES_A_CHUNK)
    found = {
        "episode_index": row["episode_index"],
        "tasks": row["tasks"],
        "length": row["length"],
        "data/chunk_index": chunk,
        "data/file_index": file,
        "dataset_from_index": row["from"],
        "dataset_to_index": row["to"],
    }
    for camera in cameras:
        found[f"videos/{camera}/chunk_index"] = chunk
        found[f"videos/{camera}/file_index"] = file
        found[f"videos/{camera}/from_timestamp"] = row["from_timestamp"]
        found[f"videos/{camera}/to_timestamp"] = row["to_timestamp"]
    stats = {f"stats/{name}/{kind}": value for name, kinds in row["stats"].items() for kind, value in kinds.items()}
    return {**found, **stats, "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}


def _write_tasks(path: Path, tasks: list[str]) -> None:
    """A pandas table whose index is the task in words, as LeRobot looks it up."""
    library = pyarrow()
    index = "__index_level_0__"
    column = {"metadata": None, "name": "task_index", "field_name": "task_index"}
    words = {"metadata": None, "name": None, "field_name": index}
    pandas = {
        "index_columns": [index],
        "column_indexes": [],
        "columns": [
            column | {"pandas_type": "int64", "numpy_type": "int64"},
            words | {"pandas_type": "unicode", "numpy_type": "object"},
        ],
        "pandas_version": "2.0.0",
    }
    table = library.table({"task_index": library.array(range(len(tasks)), library.int64()), index: tasks})
    path.parent.mkdir(parents=True, exist_ok=True)
    library.parquet.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), path)


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n")
