"""One check for all that comes in as plain data: options, `config.yaml`, `spec.json`. No torch, no file is read.

    Annotated[int, Between(1, 64)]       a whole number from 1 to 64
    Annotated[float, Above(0)]           a finite number above 0
    Annotated[str, OneOf("mse", "l1")]   one of these words
    list[T], tuple[T, T], dict[str, T], T | None, dataclasses: the same, all the way down

`check` refuses, in one line that names the place, and gives dataclasses where mappings were.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from keyword import iskeyword
from pathlib import Path
from typing import Annotated, Any, Protocol, Union, get_args, get_origin, get_type_hints

from action_diffusion.errors import InputError, unknown

NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", dict: "a section"}
SHOWN = 60
"""Characters of a value that a message repeats."""


class Rule(Protocol):
    """What a value of the right type must keep to besides."""

    def check(self, value: Any, where: str) -> None:
        """Raises `InputError` unless `value`, found at `where`, keeps to it."""


@dataclass(frozen=True)
class Between:
    """low ≤ value ≤ high; below: value < below."""

    low: float
    high: float = math.inf
    below: float = math.inf

    def check(self, value: Any, where: str) -> None:
        if value < self.low:
            least = f"must be at least {self.low}" if self.low else "must not be negative"
            raise InputError(f"{where}={shown(value)} {least}")
        if value > self.high:
            raise InputError(f"{where}={shown(value)} must be at most {self.high:,}")
        if value >= self.below:
            raise InputError(f"{where}={shown(value)} must be below {self.below}")


@dataclass(frozen=True)
class Above:
    """low < value ≤ high."""

    low: float
    high: float = math.inf

    def check(self, value: Any, where: str) -> None:
        if not value > self.low:
            raise InputError(f"{where}={shown(value)} must be above {self.low}")
        if value > self.high:
            raise InputError(f"{where}={shown(value)} must be at most {self.high:,}")


class OneOf:
    """One of these words. kind: of what, where close ones are to be suggested."""

    def __init__(self, *choices: str, kind: str = ""):
        self.choices, self.kind = choices, kind

    def check(self, value: Any, where: str) -> None:
        if value not in self.choices and self.kind:
            raise unknown(self.kind, shown(value), self.choices)
        if value not in self.choices:
            raise InputError(f"{where}={shown(value)}: choose from {', '.join(self.choices)}")


@dataclass(frozen=True)
class Sized:
    """So many items at least and at most."""

    low: int
    high: int

    def check(self, value: Any, where: str) -> None:
        if not self.low <= len(value) <= self.high:
            count = f"{self.low}" if self.low == self.high else f"{self.low} to {self.high:,}"
            raise InputError(f"{where} has {len(value):,} values, expected {count}")


@dataclass(frozen=True)
class Matching:
    """What `fits` says yes to; `words` describe it."""

    words: str
    fits: Callable[[Any], bool]

    def check(self, value: Any, where: str) -> None:
        if not self.fits(value):
            raise InputError(f"{where}={shown(value)} must be {self.words}")


class ByName:
    """A section {name, …}: the name says which of the dataclasses `choices` the rest is.

    plugins: names that may be besides, of parts that check their options themselves. default: the name where none is.
    """

    def __init__(self, choices: Mapping[str, type], plugins: Container[str] = (), default: str | None = None):
        self.choices, self.plugins, self.default = choices, plugins, default

    @property
    def words(self) -> str:
        """What such a section looks like: each choice with the options that it needs."""
        options = (
            ", ".join([f"name: {name}", *(f"{field.name}: …" for field in fields(cls) if _is_needed(field))])
            for name, cls in self.choices.items()
        )
        return "a section, " + " or ".join(f"{{{shown}}}" for shown in options)

    def check(self, value: Any, where: str) -> None:
        rest = dict(value)
        name = rest.pop("name", self.default)
        if not isinstance(name, str) or name not in self.choices:
            if isinstance(name, str) and name in self.plugins:
                return
            listed = [*self.choices, *(self.plugins if isinstance(self.plugins, Iterable) else ())]
            raise unknown(f"{where}.name", shown(name), dict.fromkeys(listed))
        check(rest, self.choices[name], where)


def _is_path(value: str) -> bool:
    try:
        Path(value).expanduser()
    except RuntimeError:  # "~nobody/…"
        return False
    return bool(value)


FilePath = Annotated[str, Matching("a path", _is_path)]
Section = dict[str, Any]


def check(value: Any, hint: Any, where: str = "", example: Any = None) -> Any:
    """`value` as `hint` says it is: tuples for lists, dataclasses for mappings. Raises `InputError` naming `where`.

    example: of a right value, for the message. Numbers are finite, text has no control characters.
    """
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        base, *rules = get_args(hint)
        _require(value, base, hint, where, example)
        for rule in rules:
            rule.check(value, where)
        return check(value, base, where)
    if origin in (Union, types.UnionType):
        fitting = [part for part in get_args(hint) if _is_kind(value, part)]
        _require(value, hint, hint, where, example)
        return check(value, fitting[0], where)
    _require(value, hint, hint, where, example)
    if is_dataclass(hint):
        return _dataclass(value, hint, where)
    if origin is dict:
        _, item = get_args(hint)
        return {key: check(inside, item, _join(where, key)) for key, inside in value.items()}
    if origin is list:
        return [check(inside, get_args(hint)[0], f"{where}[{i}]") for i, inside in enumerate(value)]
    if origin is tuple:
        return _tuple(value, get_args(hint), where)
    if hint is float:
        return float(value)
    return value


def hint_at(root: Any, path: str) -> Any:
    """The type of an option by its path ("train.lr") in the dataclass `root`; None where it says nothing of it."""
    hint = root
    for name in path.split("."):
        hint = next((part for part in alternatives(hint) if is_dataclass(part) or get_origin(part) is dict), None)
        if hint is None:
            return None
        hint = get_args(hint)[1] if get_origin(hint) is dict else hints(hint).get(name)
    return hint


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The parts of a union; of another type, the type alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def without_rules(hint: Any) -> Any:
    """`Annotated[list[str], Sized(1, 4)]` as list[str]."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


@cache
def hints(cls: Any) -> dict[str, Any]:
    """Types of a dataclass's fields by the names that options have, with their rules; `from_` is for "from"."""
    return {name.rstrip("_"): hint for name, hint in get_type_hints(cls, include_extras=True).items()}


def shown(value: Any) -> str:
    """A value as messages repeat it: short, on one line."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**SHOWN:
        return "(a number of too many digits)"
    text = " ".join(("null" if value is None else str(value)).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def described(hint: Any) -> str:
    """A type in words: "a whole number", "a path or null"."""
    if get_origin(hint) is Annotated:
        words = [rule.words for rule in get_args(hint)[1:] if isinstance(rule, Matching | ByName)]
        return words[0] if words else described(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(described(part) for part in get_args(hint) if part is not type(None))
    if hint is type(None):
        return "null"
    if get_origin(hint) in (list, tuple):
        return "a list"
    return "a section" if is_dataclass(hint) or get_origin(hint) is dict else NAMES.get(hint, str(hint))


def _require(value: Any, base: Any, hint: Any, where: str, example: Any) -> None:
    if not _is_kind(value, base):
        such = "" if example is None or isinstance(example, bool) else f", such as {shown(example)}"
        raise InputError(f"{where}={shown(value)}: expected {described(hint)}{such}")


def _is_kind(value: Any, hint: Any) -> bool:
    """Whether the outermost type is right."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _is_kind(value, get_args(hint)[0])
    if origin in (Union, types.UnionType):
        return any(_is_kind(value, part) for part in get_args(hint))
    if hint is Any:
        return True
    if is_dataclass(hint) or origin is dict or hint is dict:
        return isinstance(value, Mapping) and all(_is_kind(key, str) for key in value)
    if origin in (list, tuple):
        return isinstance(value, list | tuple)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str) and not any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in value)
    return isinstance(value, hint)


def _dataclass(value: Mapping[str, Any], cls: Any, where: str) -> Any:
    known = hints(cls)
    for key in value:
        if key not in known:
            raise unknown("option", key, known, where)
    for key in needed(cls):
        if key not in value:
            raise InputError(f"{_join(where, key)} is missing")
    found = {key: check(inside, known[key], _join(where, key)) for key, inside in value.items()}
    return cls(**{f"{key}_" if iskeyword(key) else key: inside for key, inside in found.items()})


def needed(cls: Any) -> list[str]:
    """Options of a dataclass that have no default."""
    return [field.name.rstrip("_") for field in fields(cls) if _is_needed(field)]


def _is_needed(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _tuple(value: Any, parts: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if len(parts) == 2 and parts[1] is Ellipsis:
        parts = (parts[0],) * len(value)
    if len(value) != len(parts):
        raise InputError(f"{where}={shown(list(value))}: expected {len(parts)} values")
    return tuple(
        check(inside, part, f"{where}[{i}]") for i, (inside, part) in enumerate(zip(value, parts, strict=True))
    )


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else str(key)
