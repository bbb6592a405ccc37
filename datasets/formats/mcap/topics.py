"""What of a bag becomes which column, as a small YAML file says.

rate: 20                                   rows a second
columns:
  state: {topic: /joint_states, field: position}
  eef: {topic: /tool, field: [pose.position, pose.orientation]}      several, one after the other
  front: {topic: /front/image_raw}         an Image or CompressedImage
  action: {topic: /command, field: data}
episodes: {topic: /recording, field: data} rows while this is true; without it a bag is an episode
time: header                               when a message is of: its header's stamp, or log: when it was recorded
max_age: 0.5                               s: what is older than this is not held, but refused
task: put the cup on the plate
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml

from action_diffusion.errors import InputError
from action_diffusion.schema import Above, Matching, OneOf, Sized, check

NAME = "topics.yaml"
"""Of the file inside a folder of bags, where no other is given."""
MOST_BYTES = 1 << 20

Field = Annotated[str, Matching("names with dots, such as pose.position", bool)]


@dataclass(frozen=True)
class TopicSignal:
    """A topic, and what of its messages: fields, one after the other; none for a picture."""

    topic: str
    field: Field | Annotated[list[Field], Sized(1, 100)] | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        return () if self.field is None else (self.field,) if isinstance(self.field, str) else tuple(self.field)


@dataclass(frozen=True)
class Topics:
    """See the module."""

    rate: Annotated[float, Above(0, 10_000)]
    columns: Annotated[dict[str, TopicSignal], Sized(1, 256)]
    episodes: TopicSignal | None = None
    time: Annotated[str, OneOf("header", "log")] = "header"
    max_age: Annotated[float, Above(0, 3600)] = 0.5
    task: str | None = None

    @property
    def names(self) -> list[str]:
        """All topics that are read."""
        signals = [*self.columns.values(), *([self.episodes] if self.episodes is not None else [])]
        return list(dict.fromkeys(signal.topic for signal in signals))


def read_topics(file: Path) -> Topics:
    """Raises `InputError` for a file that is not there, is no YAML, or says something else."""
    try:
        if file.stat().st_size > MOST_BYTES:
            raise InputError(f"{file} has more than {MOST_BYTES >> 20} MiB: it is no list of topics")
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        raise InputError(f"topics={file} cannot be read: {reason}") from None
    if not isinstance(found, dict):
        raise InputError(f"topics={file}: expected rate: and columns:, found {type(found).__name__}")
    try:
        topics: Topics = check(found, Topics)
    except InputError as error:
        raise InputError(f"topics={file}: {error}") from None
    for key in topics.columns:
        if not key.replace(".", "").isidentifier():
            raise InputError(f"topics={file}: columns: {key!r}: a name of letters, digits, _ and .")
    if topics.episodes is not None and len(topics.episodes.fields) != 1:
        raise InputError(f"topics={file}: episodes needs one field, such as field: data")
    return topics
