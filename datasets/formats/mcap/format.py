"""ROS 2's bags as replay buffers: topics become columns, at one rate.

    /joint_states  100 Hz  ·  ·  ·  ·  ·  ·  ·  ·  ·  ·        what was said last, at or before a row's time
    /front/image    30 Hz  o        o        o        o
    rows            20 Hz  |           |           |           as topics.yaml says

A row holds of each topic the last message at or before its time, as a robot's loop would have had it. Rows begin
where every topic has spoken, and end where the first falls silent. Numbers are read once; pictures lie in the bag
until they are asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from action_diffusion.datasets.formats.columns import PiecewiseColumn, RowRange
from action_diffusion.datasets.formats.contract import Format, Opened, Settings
from action_diffusion.datasets.formats.journal import Journal
from action_diffusion.datasets.formats.mcap.bag import Bag, bags, field, numbers
from action_diffusion.datasets.formats.mcap.topics import NAME, Topics, TopicSignal, read_topics
from action_diffusion.datasets.hdf5.encoded_images import decoded_image
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.store import Column
from action_diffusion.errors import InputError
from action_diffusion.progress import progress

IMAGES = {
    "rgb8": (np.uint8, 3, (0, 1, 2)),
    "bgr8": (np.uint8, 3, (2, 1, 0)),
    "rgba8": (np.uint8, 4, (0, 1, 2)),
    "bgra8": (np.uint8, 4, (2, 1, 0)),
    "mono8": (np.uint8, 1, (0,)),
    "8UC1": (np.uint8, 1, (0,)),
    "8UC3": (np.uint8, 3, (2, 1, 0)),
    "mono16": (np.uint16, 1, (0,)),
    "16UC1": (np.uint16, 1, (0,)),
}
"""sensor_msgs/Image's encodings: type, channels there, and which of them are kept, in order."""
MOST_SIDE = 16384


class Heard(NamedTuple):
    """What a topic said: times, int64 ns, increasing [M]; of its fields values [M, D]; where each message is."""

    times: np.ndarray
    values: dict[tuple[str, ...], np.ndarray]
    places: list[tuple[Path, int, int]]


class BagEpisode(NamedTuple):
    """One episode: its bag, and of each topic which message each row holds, int64 [T]."""

    bag: Bag
    heard: Mapping[str, Heard]
    held: Mapping[str, np.ndarray]

    @property
    def length(self) -> int:
        return len(next(iter(self.held.values())))


def opened(path: Path, topics: Path | None = None) -> Opened:
    """topics: the file that says which are what; None: topics.yaml inside the folder.

    Raises `InputError` without one, naming the topics that there are, and where a topic is silent for too long.
    """
    found = bags(path)
    file = topics if topics is not None else path / NAME
    if topics is None and (path.is_file() or not file.is_file()):
        raise InputError(
            f"{path}: which topics are what? topics=FILE.yaml says it (docs/mcap.md); it has {found[0].listed()}"
        )
    asked = read_topics(file)
    runs: list[BagEpisode] = []
    with progress(f"reading {path.name}", len(found)) as advance:
        for bag in found:
            bag.check(asked.names)
            runs += _runs(bag, _heard(bag, asked), asked)
            advance(1)
    if not runs:
        raise InputError(f"{path}: no episode has a row: {asked.episodes} is never true")  # a bag gives one at least
    ends = np.cumsum([run.length for run in runs])
    columns: dict[str, Column] = {key: _column(runs, signal, ends, key) for key, signal in asked.columns.items()}
    attrs: dict[str, Any] = {"source": path.name, "control_rate": float(asked.rate)}
    if asked.task is not None:
        attrs["task"] = asked.task
    left_out = sorted({topic for bag in found for topic in bag.topics} - set(asked.names))
    return Opened(ReplayBuffer(columns=columns, episode_ends=ends, attrs=attrs, path=path), tuple(left_out))


def _heard(bag: Bag, asked: Topics) -> dict[str, Heard]:
    """Everything that the topics said: numbers as such, of pictures where they are."""
    wanted: dict[str, list[tuple[str, ...]]] = {name: [] for name in asked.names}
    for signal in [*asked.columns.values(), *([asked.episodes] if asked.episodes is not None else [])]:
        wanted[signal.topic].append(signal.fields)
    times: dict[str, list[int]] = {name: [] for name in wanted}
    places: dict[str, list[tuple[Path, int, int]]] = {name: [] for name in wanted}
    values: dict[tuple[str, tuple[str, ...]], list[np.ndarray]] = {
        (name, fields): [] for name, kinds in wanted.items() for fields in kinds if fields
    }
    pictures = [name for name, kinds in wanted.items() if not any(kinds)]
    for message in bag.messages(list(wanted), stamps_only=pictures):
        at = message.logged if asked.time == "log" or message.stamp is None else message.stamp
        times[message.topic].append(at)
        places[message.topic].append((message.file, message.logged, message.order))
        for fields in wanted[message.topic]:
            if fields:
                values[message.topic, fields].append(_numbers(bag, message.topic, message.value, fields))
    heard = {}
    for name, kinds in wanted.items():
        order = np.argsort(np.array(times[name], np.int64), kind="stable")
        rows = {fields: _stacked(bag, name, values[name, fields])[order] for fields in kinds if fields}
        heard[name] = Heard(np.array(times[name], np.int64)[order], rows, [places[name][index] for index in order])
    return heard


def _numbers(bag: Bag, topic: str, message: Any, fields: Sequence[str]) -> np.ndarray:
    try:
        return np.concatenate([numbers(field(message, name)) for name in fields])
    except (KeyError, TypeError, IndexError) as error:
        reason = error.args[0] if error.args else error
        raise InputError(f"{bag.name}: {topic}: field {', '.join(fields)}: no numbers: {reason}") from None


def _stacked(bag: Bag, topic: str, rows: list[np.ndarray]) -> np.ndarray:
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise InputError(
            f"{bag.name}: messages of {topic} have {lengths[0]} to {lengths[-1]} numbers: one length is needed"
        )
    return np.stack(rows)


def _runs(bag: Bag, heard: Mapping[str, Heard], asked: Topics) -> Iterator[BagEpisode]:
    """The bag's episodes. Raises `InputError` where a topic says nothing for longer than `max_age`."""
    signals = {signal.topic for signal in asked.columns.values()}
    first = max(int(heard[name].times[0]) for name in signals)
    last = min(int(heard[name].times[-1]) for name in signals)
    if last < first:
        late = max(signals, key=lambda name: heard[name].times[0])
        raise InputError(f"{bag.name}: {late} begins after another topic has ended: there is no time in common")
    period = 1e9 / asked.rate
    rows = first + np.round(np.arange(int((last - first) / period + 1e-6) + 1) * period).astype(np.int64)
    for begin, end in _spans(heard, asked, rows):
        times = rows[begin:end]
        held = {}
        for name in signals:
            index = np.searchsorted(heard[name].times, times, side="right") - 1
            age = times - heard[name].times[index]
            worst = int(np.argmax(age))
            if age[worst] > asked.max_age * 1e9:
                raise InputError(
                    f"{bag.name}: {name} says nothing for {age[worst] / 1e9:.3g} s at "
                    f"{(times[worst] - first) / 1e9:.3f} s, more than max_age={asked.max_age:g}"
                )
            held[name] = index
        yield BagEpisode(bag, heard, held)


def _spans(heard: Mapping[str, Heard], asked: Topics, rows: np.ndarray) -> list[tuple[int, int]]:
    """(first, end) of the rows of each episode."""
    if asked.episodes is None:
        return [(0, len(rows))]
    marks = heard[asked.episodes.topic]
    index = np.searchsorted(marks.times, rows, side="right") - 1
    on = (index >= 0) & (marks.values[asked.episodes.fields][np.maximum(index, 0), 0] > 0.5)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], on, [False]]).astype(np.int8)))
    return [(int(begin), int(end)) for begin, end in zip(edges[::2], edges[1::2], strict=True)]


def _column(runs: Sequence[BagEpisode], signal: TopicSignal, ends: np.ndarray, key: str) -> Column:
    if signal.fields:
        parts = [run.heard[signal.topic].values[signal.fields][run.held[signal.topic]] for run in runs]
        widths = sorted({part.shape[1] for part in parts})
        if len(widths) > 1:
            raise InputError(f"{key}: {signal.topic} has {widths[0]} numbers in one bag, {widths[-1]} in another")
        return np.concatenate(parts).astype(np.float32)
    first = _pictures(runs, signal.topic, RowRange(0, 0, 1))
    read = functools.partial(_pictures, runs, signal.topic)
    return PiecewiseColumn(first.shape[1:], first.dtype, ends, read)


def _pictures(runs: Sequence[BagEpisode], topic: str, piece: RowRange) -> np.ndarray:
    """Some rows' pictures [n, H, W, C]; those that follow one another in the bag are read in one go."""
    run = runs[piece.number]
    wanted = run.held[topic][piece.first : piece.end]
    places = run.heard[topic].places
    needed = {places[index][::2]: int(index) for index in wanted}
    logged = [places[index][1] for index in wanted]
    files = list(dict.fromkeys(places[index][0] for index in wanted))
    found: dict[int, np.ndarray] = {}
    for message in _between(run.bag, topic, files, (min(logged), max(logged)), places):
        index = needed.get(message[0])
        if index is not None and index not in found:
            found[index] = picture(message[1], f"{run.bag.name}: {topic}")
    pictures = [found[int(index)] for index in wanted]
    for one in pictures:
        if one.shape != pictures[0].shape or one.dtype != pictures[0].dtype:
            raise InputError(f"{run.bag.name}: {topic}: a picture {list(one.shape)} among {list(pictures[0].shape)}")
    return np.stack(pictures)


def _between(
    bag: Bag, topic: str, files: Sequence[Path], times: tuple[int, int], places: Sequence[tuple[Path, int, int]]
) -> Iterator[tuple[tuple[Path, int], Any]]:
    """((file, order), message) of a topic. A reader that begins in between counts from the first that it gives."""
    for file in files:
        before = sum(place[0] == file and place[1] < times[0] for place in places)
        for message in bag.messages([topic], files=[file], between=times):
            yield (file, before + message.order), message.value


def picture(message: Any, where: str) -> np.ndarray:
    """A sensor_msgs Image or CompressedImage as [H, W, C]. Raises `InputError` for another message or encoding."""
    if hasattr(message, "format") and hasattr(message, "data"):
        return decoded_image(bytes(message.data), where)
    if not all(hasattr(message, name) for name in ("encoding", "height", "width", "step", "data")):
        raise InputError(f"{where} is no picture: name a field of its messages (field: NAME)")
    if message.encoding not in IMAGES:
        raise InputError(f"{where}: encoding {message.encoding!r}: {', '.join(IMAGES)} are read")
    dtype, channels, kept = IMAGES[message.encoding]
    height, width, row = int(message.height), int(message.width), np.dtype(dtype).itemsize * channels
    if not 0 < height <= MOST_SIDE or not 0 < width <= MOST_SIDE or message.step < width * row:
        raise InputError(f"{where}: a picture of {width} x {height} with {message.step} bytes a row")
    content = np.frombuffer(bytes(message.data), np.uint8)
    if len(content) < height * message.step:
        raise InputError(
            f"{where}: a picture of {width} x {height} has {len(content)} bytes, not {height * message.step}"
        )
    order: Literal["<", ">"] = ">" if message.is_bigendian else "<"
    rows = np.ascontiguousarray(content[: height * message.step].reshape(height, -1)[:, : width * row])
    pixels = rows.view(np.dtype(dtype).newbyteorder(order)).reshape(height, width, channels)
    return np.ascontiguousarray(pixels[..., list(kept)].astype(dtype))


def _write(buffer: ReplayBuffer, path: Path, journal: Journal, settings: Settings) -> None:
    raise InputError("format=mcap: bags are only read")


MCAP = Format("mcap", opened, _write)
