"""Which rows of which parquet file are which episode of a LeRobotDataset, checked before any value is read.

Everything is found by counting: rows a file, rows an episode. Then every row must be where its own episode_index,
frame_index and timestamp say, as far as the files have them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from action_diffusion.datasets.formats.columns import PiecewiseColumn, spans
from action_diffusion.datasets.formats.lerobot.info import Info
from action_diffusion.datasets.formats.lerobot.names import V30
from action_diffusion.datasets.formats.parquet import ParquetTable, described, open_parquet
from action_diffusion.datasets.formats.paths import TEXT_BYTES, inside, matching, natural
from action_diffusion.datasets.formats.video import TOLERANCE
from action_diffusion.datasets.storage.store import reading
from action_diffusion.errors import InputError
from action_diffusion.progress import progress

LATE = 0.5
"""Of the time between two rows: a row that is further off by its timestamp is another one."""
_MOST_EPISODES = 1_000_000
_BLOCK = 1 << 16
_FARTHEST = 10  # times the rate of info.json: timestamps in another unit are not a rate


class Files(NamedTuple):
    """tables: of the rows; ends: the row after each; episode_ends; episodes: what the meta data says of each."""

    tables: list[ParquetTable]
    ends: np.ndarray
    episode_ends: np.ndarray
    episodes: list[dict[str, Any]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.episode_ends, prepend=0)


def files_of(info: Info) -> Files:
    """Raises `InputError` for files that are missing, and where rows and episodes do not add up."""
    found = _many_a_file(info) if info.version == V30 else _one_a_file(info)
    n_rows = int(found.ends[-1])
    if (len(found.episodes), n_rows) != info.totals:
        raise InputError(
            f"{info.root}: {len(found.episodes)} episodes with {n_rows} rows, but meta/info.json says "
            f"{info.totals[0]!r} with {info.totals[1]!r}"
        )
    if (found.lengths < 1).any():
        raise InputError(f"{info.root}: episode {int(np.argmax(found.lengths < 1))} has no steps: leave it out")
    used = {table.path for table in found.tables}
    unused = [file for file in matching(info.root, "data/*/*.parquet") if file not in used]
    info.said += [f"{file.relative_to(info.root)} belongs to no episode, and was left out" for file in sorted(unused)]
    return found


def _one_a_file(info: Info) -> Files:
    file = inside(info.root, "meta/episodes.jsonl", most=TEXT_BYTES)
    episodes = _in_order(lines(file), file)
    tables = []
    with progress(f"reading what is in {info.root.name}", len(episodes)) as advance:
        for episode in episodes:
            number = episode["episode_index"]
            table = described(info.file("data_path", episode_chunk=number // info.chunk, episode_index=number))
            if table.rows != episode["length"]:
                raise InputError(f"{table.path}: {table.rows} rows, but meta/episodes.jsonl says {episode['length']!r}")
            tables.append(table)
            advance(1)
    ends = np.cumsum([table.rows for table in tables], dtype=np.int64)
    return Files(tables, ends, ends, episodes)


def _in_order(episodes: list[dict[str, Any]], where: Path) -> list[dict[str, Any]]:
    """By episode_index. Raises `InputError` for two of one, or one that is no whole number."""
    if not episodes:
        raise InputError(f"{where}: holds no episodes")
    seen = set()
    for episode in episodes:
        number = episode.get("episode_index") if isinstance(episode, dict) else None
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise InputError(f"{where}: an episode has episode_index {number!r}, expected a whole number from 0")
        if number in seen:
            raise InputError(f"{where}: episode_index {number} is there twice, so that another episode is missing")
        seen.add(number)
    return sorted(episodes, key=lambda episode: int(episode["episode_index"]))


def _many_a_file(info: Info) -> Files:
    """Rows are counted through all files in their order."""
    found: list[dict[str, Any]] = []
    for file in by_number(info.root, "meta/episodes"):
        with open_parquet(file) as opened, reading(str(file)):
            names = [name for name in opened.schema_arrow.names if not name.startswith("stats/")]
            if "episode_index" not in names:
                raise InputError(f"{file} lacks episode_index")
            if opened.metadata.num_rows > _MOST_EPISODES:
                raise InputError(f"{file} has {opened.metadata.num_rows} rows, at most {_MOST_EPISODES} are read")
            found += opened.read(columns=names).to_pylist()
    episodes = _in_order(found, info.root / "meta/episodes")
    paths = _data_files(info, episodes)
    tables = [described(path) for path in paths]
    ends = np.cumsum([table.rows for table in tables], dtype=np.int64)
    row, episode_ends = 0, []
    for episode in episodes:
        first = episode.get("dataset_from_index", row)
        end = episode.get("dataset_to_index", first + episode["length"] if "length" in episode else None)
        if end is None:
            raise InputError(f"{info.root}: meta/episodes lacks dataset_to_index, and length")
        length = episode.get("length", end - first)
        if first != row or end - first != length:
            raise InputError(
                f"{info.root}: episode {episode['episode_index']} has rows {first} to {end} and length {length}; "
                f"it should begin at row {row}"
            )
        row = end
        episode_ends.append(row)
    if row != ends[-1]:
        raise InputError(f"{info.root}: data/ has {ends[-1]} rows, but the episodes have {row}")
    return Files(tables, ends, np.array(episode_ends, np.int64), episodes)


def _data_files(info: Info, episodes: list[dict[str, Any]]) -> list[Path]:
    """As the episodes say; where they do not, all in the order of their numbers."""
    found = routes(episodes, "data")
    if found is None:
        info.said.append("meta/episodes does not say which file an episode is in: they were counted through")
        paths = by_number(info.root, "data")
        if not paths:
            raise InputError(f"{info.root}: holds no rows (data/)")
        return paths
    return [info.file("data_path", chunk_index=chunk, file_index=file) for chunk, file in dict.fromkeys(found)]


def routes(episodes: list[dict[str, Any]], what: str) -> list[tuple[int, int]] | None:
    """(chunk_index, file_index) of each episode; None where some of them lack it."""
    found = [(episode.get(f"{what}/chunk_index"), episode.get(f"{what}/file_index")) for episode in episodes]
    whole = [(chunk, file) for chunk, file in found if isinstance(chunk, int) and isinstance(file, int)]
    return whole if len(whole) == len(episodes) else None


def by_number(root: Path, folder: str, ending: str = "parquet") -> list[Path]:
    """Files two levels down; file-10 comes after file-9."""
    found = matching(root / folder, f"*/*.{ending}")
    names = sorted((file.relative_to(root).as_posix() for file in found), key=natural)
    return [inside(root, name) for name in names]


def lines(file: Path) -> list[Any]:
    """The values of a file of JSON lines."""
    with reading(str(file)):
        return [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.strip()]


Column = Callable[[str], PiecewiseColumn]


def check_rows(info: Info, files: Files, column: Column) -> None:
    """Every row is where its own columns say. column: gives one of the files' columns [N].

    The timestamps count where somebody else's info.json has another rate: `info.rate` becomes theirs, which is said.
    """
    held = files.tables[0].types
    numbers = np.array([episode["episode_index"] for episode in files.episodes])
    for name in ("episode_index", "frame_index"):
        if name not in held:
            info.said.append(f"the files have no {name}: rows were counted")
            continue
        for first, episode, frame in _rows(files):
            expected = numbers[episode] if name == "episode_index" else frame
            found = column(name)[first : first + len(frame)].ravel()
            bad = ~(found == expected)
            if bad.any():
                row = int(np.argmax(bad))
                raise InputError(
                    f"{info.root}: row {first + row} has {name} {found[row]:g}, expected {expected[row]:g}"
                )
    if "timestamp" not in held:
        info.said.append("the files have no timestamp: rows are as far apart as fps says")
        return
    _check_times(info, files, column("timestamp"))


def _rows(files: Files) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Blocks of rows: the first one's number, and of each row its episode and its number in there."""
    starts = files.episode_ends - files.lengths
    for first, end in spans(0, int(files.ends[-1]), _BLOCK):
        rows = np.arange(first, end)
        episode = np.searchsorted(files.episode_ends, rows, side="right")
        yield first, episode, rows - starts[episode]


def _check_times(info: Info, files: Files, times: PiecewiseColumn) -> None:
    bad, worst = _off(files, times, info.rate)
    measured = _measured(files, times)
    if bad is not None and info.notes is None and measured and 1 / _FARTHEST < measured / info.rate < _FARTHEST:
        other, worst = _off(files, times, measured)
        if other is None:
            info.said.append(f"the rows' timestamps are {measured:g} Hz, which counts; info.json says {info.rate:g}")
            info.rate, bad = measured, None
    if bad is not None:
        raise InputError(f"{info.root}: {bad}")
    if worst > TOLERANCE:
        milliseconds = 1000 * worst / info.rate
        info.said.append(f"timestamps are up to {milliseconds:.1f} ms off {info.rate:g} Hz, at which rows are counted")


def _off(files: Files, times: PiecewiseColumn, rate: float) -> tuple[str | None, float]:
    """The first row that is more than `LATE` off its time, in words, and how far the farthest of the others is."""
    worst = 0.0
    for first, _, frame in _rows(files):
        found = times[first : first + len(frame)].ravel().astype(np.float64)
        off = np.abs(found * rate - frame)
        bad = ~(off <= LATE)
        if bad.any():
            row = int(np.argmax(bad))
            return f"row {first + row} has timestamp {found[row]:g}, expected {frame[row] / rate:g}", worst
        worst = max(worst, float(off.max()))
    return None, worst


def _measured(files: Files, times: PiecewiseColumn) -> float | None:
    """The rate that the first episode's timestamps have; a whole one where it is nearly that."""
    length = int(files.lengths[0])
    last = float(times[length - 1 : length].ravel()[0])
    if length < 2 or not 0 < last < np.inf:
        return None
    rate = (length - 1) / last
    return float(round(rate)) if abs(rate - round(rate)) < 1e-3 * rate else rate
