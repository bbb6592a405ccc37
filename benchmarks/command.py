"""What the command lines of all benchmarks share: name=value words, and one line with exit code 2 for bad ones."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence

from action_diffusion.errors import InputError, unknown

Main = Callable[[Sequence[str]], int]


def command(main: Main) -> Main:
    """A `main` whose `InputError` is one line and exit code 2, and whose Ctrl-C is exit code 130."""

    @functools.wraps(main)
    def guarded(words: Sequence[str]) -> int:
        try:
            return main(words)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return guarded


def options(words: Sequence[str], defaults: Mapping[str, str]) -> dict[str, str]:
    """`defaults`, with what `words` of the form name=value say instead. Raises `InputError`."""
    given = dict(defaults)
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"{word!r} is not of the form name=value; options: {', '.join(defaults)}")
        if name not in defaults:
            raise unknown("option", name, defaults)
        given[name] = value
    return given


def whole(name: str, word: str, least: int = 1) -> int:
    """The whole number `word` of the option `name`. Raises `InputError` for another, and for one below `least`."""
    if not word.strip().isdecimal() or int(word) < least:
        raise InputError(f"{name}={word} must be a whole number of at least {least}")
    return int(word)


def positive(name: str, word: str) -> float:
    """The finite number `word` above 0 of the option `name`. Raises `InputError`."""
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"{name}={word} must be a number above 0")
    return value
