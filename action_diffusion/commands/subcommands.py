"""Commands that have subcommands: `action-diffusion data …`, `action-diffusion bundle …`.

Words are `name=value`, as those of all commands; some subcommands take a PATH, and flags such as `--json FILE`, beside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from action_diffusion.errors import InputError, unknown
from action_diffusion.schema import hints


class Subcommand(NamedTuple):
    """What `run` takes, plain data by name, and returns: numbers to print, or the exit code.

    `positional` are words without a name, all of them required; flags are written `--name VALUE`, where the value of
    those in `bare` may be left out (then ""). options are the others of `takes`, and written name=value.
    """

    run: Callable[[Mapping[str, Any]], Mapping[str, Any] | int]
    help: str
    takes: type
    positional: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()

    @property
    def options(self) -> list[str]:
        return [key for key in hints(self.takes) if key not in (*self.positional, *self.flags, "plugins")]


def run(command: str, subcommands: Mapping[str, Subcommand], text: str, words: Sequence[str]) -> int:
    """A command with the words after it; returns the exit code. Raises `InputError` for bad ones. text: its help."""
    from action_diffusion.commands.help import fitted

    if not words or words[0] in ("-h", "--help", "help"):
        print(fitted(text))
        return 0
    if words[0] not in subcommands:
        raise unknown(f"subcommand of {command}", words[0], subcommands)
    subcommand = subcommands[words[0]]
    if {"-h", "--help"} & set(words):
        print(fitted(subcommand.help))
        return 0
    result = subcommand.run(_options(f"{command} {words[0]}", subcommand, words[1:]))
    if isinstance(result, int):
        return result
    for name, value in result.items():
        print(f"{name}: {value}")
    return 0


def _options(name: str, subcommand: Subcommand, words: Sequence[str]) -> dict[str, Any]:
    """What was given to a subcommand ("data edit"). Only words without a name and flags are read here."""
    from action_diffusion.options.configuration import plain

    named, rest = list[str](), list(words)
    options = (*subcommand.options, "plugins")
    beside: dict[str, str] = {}
    while rest:
        word = rest.pop(0)
        key, equals, value = word.partition("=")
        missing = [key for key in subcommand.positional if key not in beside]
        if word.startswith("--") and subcommand.flags:
            shown, key = key, key[2:]
            if key not in subcommand.flags:
                raise unknown("flag", shown, (f"--{known}" for known in subcommand.flags))
            if not equals and rest and not rest[0].startswith("-") and not (key in subcommand.bare and missing):
                value = rest.pop(0)
        elif missing and key not in options and not word.startswith("-"):
            shown, key, value = missing[0].upper(), missing[0], word
        elif equals and key[:1] not in ("", "-") and key.partition(".")[0] not in options:
            raise unknown("option", key, options)
        else:
            named.append(word)
            continue
        if key in beside:
            raise InputError(f"{shown} is given twice")
        if not value and key not in subcommand.bare:
            raise InputError(f"{shown} is empty; see: action-diffusion {name} --help")
        beside[key] = value
    for key in subcommand.positional:
        if key not in beside:
            raise InputError(f"{key.upper()} is required: action-diffusion {name} {key.upper()}")
    return plain(name, named, beside)
