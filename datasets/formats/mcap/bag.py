"""One bag: its topics, the times of their messages, and messages decoded in the order of their times.

A bag is an MCAP file, or a folder that ROS 2 wrote (metadata.yaml beside parts of it). Before a message is read, every
chunk of a file is unpacked once within what it claims, so that a damaged or hostile file is refused at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from action_diffusion.datasets.formats.paths import matching
from action_diffusion.errors import InputError
from action_diffusion.memory import free_memory

MOST_CHUNK = 1 << 30
"""Bytes of a chunk, unpacked."""
MAGIC = b"\x89MCAP0\r\n"
PICTURES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
CHUNK = 6
"""Opcode of a chunk's record."""
_SLACK = 1 << 20


class Topic(NamedTuple):
    """type: of its messages, "sensor_msgs/msg/Image"; messages: how many there are; rate: Hz, of the whole bag."""

    name: str
    type: str
    messages: int
    rate: float


class BagMessage(NamedTuple):
    """stamp: of its header, ns, None without one. logged: when it was recorded, ns. file and order: which one it is."""

    topic: str
    stamp: int | None
    logged: int
    value: Any
    file: Path
    order: int


class Bag:
    """files: the parts of the bag, in order. Raises `InputError` for those that are damaged, or of another kind."""

    def __init__(self, name: str, files: Sequence[Path]) -> None:
        self.name, self.files = name, list(files)
        found: dict[str, list[Any]] = {}
        for file in self.files:
            with _reading(file) as (reader, stream):
                summary = reader.get_summary()
                if summary is None or (summary.statistics is None and not summary.chunk_indexes):
                    raise InputError(f"{file} has no index, its recording was cut off: mcap recover {file.name} -o OUT")
                _check_chunks(file, stream, summary.chunk_indexes)
                for number, channel in summary.channels.items():
                    schema, statistics = summary.schemas.get(channel.schema_id), summary.statistics
                    count = statistics.channel_message_counts.get(number, 0) if statistics else 0
                    seconds = (statistics.message_end_time - statistics.message_start_time) / 1e9 if statistics else 0
                    known = found.setdefault(channel.topic, ["", 0, 0.0, ""])
                    known[0] = schema.name if schema is not None else ""
                    known[1], known[2], known[3] = known[1] + count, known[2] + seconds, channel.message_encoding
        self.topics = {
            topic: Topic(topic, kind, count, count / seconds if seconds > 0 else 0.0)
            for topic, (kind, count, seconds, _) in sorted(found.items())
        }
        self._encodings = {topic: encoding for topic, (*_, encoding) in found.items()}

    def check(self, names: Iterable[str]) -> None:
        """`InputError` for topics that it lacks, that are empty, or whose messages are not ROS 2's."""
        for name in names:
            if name not in self.topics or self.topics[name].messages == 0:
                raise InputError(f"{self.name} has no messages of {name}; it has {self.listed()}")
            if self._encodings[name] != "cdr":
                raise InputError(f"{self.name}: {name} is of {self._encodings[name]!r}: ROS 2's (cdr) are read")

    def listed(self) -> str:
        """Its topics in words."""
        told = [f"{topic.name} ({topic.type}, {topic.rate:.3g} Hz)" for topic in self.topics.values() if topic.messages]
        return ", ".join(told[:20]) + (", …" if len(told) > 20 else "") or "no topics"

    def messages(
        self,
        names: Sequence[str],
        *,
        files: Sequence[Path] | None = None,
        between: tuple[int, int] | None = None,
        stamps_only: Sequence[str] = (),
    ) -> Iterator[BagMessage]:
        """Messages of some topics, decoded, as they were recorded.

        between: log times, ns, both included. stamps_only: topics of pictures, of which only the header is read.
        """
        from mcap_ros2.decoder import DecoderFactory

        limits: dict[str, int] = {}
        if between is not None:
            limits = {"starting_at": between[0], "ending_at": between[1]}
        for file in self.files if files is None else files:
            orders = dict.fromkeys(names, 0)
            factory, known = DecoderFactory(), dict[int, Any]()
            with _reading(file) as (reader, _):
                for schema, channel, message in reader.iter_messages(topics=list(names), **limits):
                    topic, value, at = channel.topic, None, 0
                    if topic in stamps_only and schema is not None and schema.name in PICTURES:
                        at = _header_stamp(message.data)
                    else:
                        if channel.id not in known:
                            known[channel.id] = factory.decoder_for(channel.message_encoding, schema)
                        value = known[channel.id](message.data)
                        stamp = getattr(getattr(value, "header", None), "stamp", None)
                        at = 0 if stamp is None else stamp.sec * 10**9 + stamp.nanosec
                    yield BagMessage(topic, at or None, message.log_time, value, file, orders[topic])
                    orders[topic] += 1


def _header_stamp(content: bytes) -> int:
    """ns, of a message that begins with a std_msgs/Header, in CDR: encapsulation [4], seconds, nanoseconds."""
    order: Literal["little", "big"] = "little" if content[1] & 1 else "big"
    return int.from_bytes(content[4:8], order, signed=True) * 10**9 + int.from_bytes(content[8:12], order)


def bags(path: Path) -> list[Bag]:
    """The bags at `path`: a file, a folder of ROS 2, or a folder of such. Raises `InputError` where there is none."""
    if path.is_file():
        return [Bag(path.name, [path])]
    if path.is_symlink() or any(inner.is_symlink() for inner in path.rglob("*")):
        raise InputError(f"{path} holds links; links are not followed: put the files themselves there")
    folders = sorted({file.parent for file in matching(path, "**/*.mcap")})
    found = []
    for folder in folders:
        files = sorted(matching(folder, "*.mcap"), key=_numbered)
        whole = (folder / "metadata.yaml").is_file()
        found += [Bag(folder.name, files)] if whole else [Bag(file.name, [file]) for file in files]
    if not found:
        raise InputError(f"{path} holds no .mcap file; a .db3 becomes one by: ros2 bag convert")
    return found


def is_mcap(path: Path) -> bool:
    """Whether `path` is an MCAP file, or a folder with some."""
    if path.is_file():
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    return path.is_dir() and any(matching(path, "*.mcap", "*/*.mcap"))


def _numbered(file: Path) -> tuple[int, str]:
    digits = file.stem.rpartition("_")[2]
    return (int(digits) if digits.isdigit() and len(digits) < 10 else -1, file.name)


@contextmanager
def _reading(file: Path) -> Iterator[tuple[Any, Any]]:
    """A reader and the stream below it; whatever goes wrong inside is an `InputError` that names the file."""
    try:
        from mcap.reader import make_reader
    except ImportError:
        raise InputError(f"{file} is MCAP: pip install 'action-diffusion[mcap]'") from None
    try:
        with file.open("rb") as stream:
            yield make_reader(stream, validate_crcs=True), stream
    except (InputError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{file} cannot be read, it is damaged or unsupported: {reason}") from error


def _check_chunks(file: Path, stream: Any, indexes: Sequence[Any]) -> None:
    """Unpack each chunk once, within what it claims."""
    most = min(MOST_CHUNK, free_memory() // 4)
    for index in indexes:
        if index.uncompressed_size > most or index.chunk_length > most + _SLACK:
            raise InputError(f"{file}: a chunk claims {index.uncompressed_size >> 20:,} MiB, at most {most >> 20:,}")
        stream.seek(index.chunk_start_offset)
        record = stream.read(index.chunk_length)
        if len(record) < 49 or record[0] != CHUNK:
            raise InputError(f"{file} is damaged: no chunk where its index says")
        size = int.from_bytes(record[25:33], "little")
        begin = 41 + int.from_bytes(record[37:41], "little") + 8
        kind = record[41 : begin - 8].decode("utf-8", "replace")
        unpacked = _unpacked_size(kind, memoryview(record)[begin:], size)
        if size != index.uncompressed_size or unpacked != size:
            raise InputError(f"{file} is damaged: a chunk of {index.uncompressed_size} bytes unpacks to {unpacked}")


def _unpacked_size(kind: str, packed: memoryview, limit: int) -> int:
    """Bytes, of which no more than `limit` + 1 are made."""
    if kind == "zstd":
        import zstandard

        with zstandard.ZstdDecompressor().stream_reader(bytes(packed)) as reader:
            return _count(reader.read, limit)
    if kind == "lz4":
        import lz4.frame

        unpacker, size, rest = lz4.frame.LZ4FrameDecompressor(), 0, bytes(packed)
        while not unpacker.eof and size <= limit:
            part = unpacker.decompress(rest, max_length=_SLACK)
            size, rest = size + len(part), b""
            if not part and unpacker.needs_input:
                break
        return size
    return len(packed)


def _count(read: Any, limit: int) -> int:
    size = 0
    while size <= limit and (part := read(_SLACK)):
        size += len(part)
    return size


def numbers(value: Any) -> np.ndarray:
    """All numbers of a message, a list or a number, in the order of its definition: float64 [n]."""
    if isinstance(value, bool | int | float | np.number):
        return np.array([value], np.float64)
    if isinstance(value, str | bytes):
        raise TypeError("it is text")
    if hasattr(value, "__slots__") or hasattr(value, "__dict__"):
        names = [name for name in getattr(value, "__slots__", None) or vars(value) if not name.startswith("_")]
        value = [getattr(value, name) for name in names]
    elif isinstance(value, np.ndarray) or hasattr(value, "typecode"):
        return np.asarray(value, np.float64).ravel()
    return np.concatenate([np.zeros(0), *(numbers(part) for part in value)])


def field(message: Any, name: str) -> Any:
    """What `a.b.2.c` names in a message. Raises `KeyError` with the names that there are instead."""
    for part in name.split("."):
        if part.isdigit() and not isinstance(message, str) and hasattr(message, "__getitem__"):
            message = message[int(part)]
        elif not part.startswith("_") and hasattr(message, part):
            message = getattr(message, part)
        else:
            there = [one for one in getattr(message, "__slots__", None) or vars(message) if not one.startswith("_")]
            raise KeyError(f"{part!r} of {', '.join(there)}")
    return message
