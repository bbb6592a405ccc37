"""`action-diffusion data …`: subcommands on demonstrations, with options and help of their own.

Words are `name=value`; some subcommands take a PATH, and flags such as `--json FILE`, beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from action_diffusion.commands import data_convert, data_look, data_report
from action_diffusion.errors import InputError, unknown
from action_diffusion.registry import use_plugins

DATA_HELP = """\
action-diffusion data SUBCOMMAND [name=value …]     demonstrations: look at them, mend them, bring them

  action-diffusion data inspect PATH      episodes, lengths, keys, shapes, rates, ranges, size on disk
  action-diffusion data view PATH         cameras, state and actions on one timeline
  action-diffusion data report PATH       all of that, first frames and what the doctor finds, on one page
  action-diffusion data doctor PATH       what is wrong, where, and what to do; --fix repairs a copy
  action-diffusion data edit PATH out=OTHER.zarr drop=3,7     drop, trim, split, merge, relabel
  action-diffusion data convert in=PATH out=PATH     LeRobot, UMI, robomimic, Zarr v2 and v3, folders: there and back
  action-diffusion data absolute in=DIR.zarr out=OTHER.zarr     a column of absolute actions, from relative ones

PATH is a replay buffer, or a LeRobot folder, HDF5 or a folder of CSV and MP4, which is converted into the cache once.
`--help` after a subcommand explains it. plugins=FILE.py adds formats of your own to each: docs/extending.md.
"""

ABSOLUTE_HELP = """\
action-diffusion data absolute in=DIR.zarr out=OTHER.zarr     absolute actions, from relative ones of OSC_POSE

  action-diffusion data absolute in=lift.zarr out=lift_abs.zarr
  action-diffusion train task=lift_state data=lift_abs.zarr task.env.absolute=true \\
                         task.action.source=absolute_action

The recorded states are put into the simulator, whose controllers say what pose each action asked for: position, 6D
rotation (Zhou et al. 2019) and gripper. The new actions are then executed from each episode's first state, and how far
the hands stray from the recording is printed.
"""


class Subcommand(NamedTuple):
    """What `run` takes, as text by name, and returns: numbers to print, or the exit code.

    options are written name=value, `required` among them must be given; `positional` are the words without a name, all
    of them required; flags are written `--name VALUE`, where the value of those in `bare` may be left out (then "").
    """

    run: Callable[[Mapping[str, str]], Mapping[str, Any] | int]
    help: str
    options: tuple[str, ...]
    required: tuple[str, ...]
    positional: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()


def run(words: Sequence[str]) -> int:
    """`action-diffusion data` with the words after it; returns the exit code. Raises `InputError` for bad ones."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(DATA_HELP)
        return 0
    if words[0] not in SUBCOMMANDS:
        raise unknown("subcommand of data", words[0], SUBCOMMANDS)
    subcommand = SUBCOMMANDS[words[0]]
    if {"-h", "--help"} & set(words):
        print(subcommand.help)
        return 0
    plugins = [word.partition("=")[2] for word in words[1:] if word.startswith("plugins=")]
    use_plugins([file for given in plugins for file in given.strip("[]").split(",")])
    result = subcommand.run(_options(words[0], [word for word in words[1:] if not word.startswith("plugins=")]))
    if isinstance(result, int):
        return result
    for name, value in result.items():
        print(f"{name}: {value}")
    return 0


def _options(name: str, words: Sequence[str]) -> dict[str, str]:
    subcommand, options, rest = SUBCOMMANDS[name], dict[str, str](), list(words)
    while rest:
        key, value, shown = _next(name, rest, options)
        if key in options:
            raise InputError(f"{shown} is given twice")
        if not value and key not in subcommand.bare:
            raise InputError(f"{shown} is empty; see: action-diffusion data {name} --help")
        options[key] = value
    for key in subcommand.positional:
        if key not in options:
            raise InputError(f"{key.upper()} is required: action-diffusion data {name} {key.upper()}")
    for key in subcommand.required:
        if key not in options:
            raise InputError(f"{key} is required: action-diffusion data {name} {key}=…")
    return options


def _next(name: str, rest: list[str], options: Mapping[str, str]) -> tuple[str, str, str]:
    """Takes the next option off `rest`: its name, its value, and what messages call it."""
    subcommand, word = SUBCOMMANDS[name], rest.pop(0)
    key, equals, value = word.partition("=")
    missing = [key for key in subcommand.positional if key not in options]
    if word.startswith("--") and subcommand.flags:
        flag = key[2:]
        if flag not in subcommand.flags:
            raise unknown("flag", key, (f"--{known}" for known in subcommand.flags))
        is_value = bool(rest) and not rest[0].startswith("-") and not (flag in subcommand.bare and missing)
        return flag, rest.pop(0) if is_value and not equals else value, key
    if missing and key not in subcommand.options and not word.startswith("-"):
        return missing[0], word, missing[0].upper()
    if not equals or not key or key.startswith("-"):
        raise InputError(f"{word!r} is not of the form name=value; see: action-diffusion data {name} --help")
    if key not in subcommand.options:
        raise unknown("option", key, subcommand.options)
    return key, value, f"{key}="


def _absolute(options: Mapping[str, str]) -> Mapping[str, Any]:
    from action_diffusion.datasets.batches.sources import open_data
    from action_diffusion.envs.robosuite.absolute import add_absolute

    source = open_data(options["in"]).path
    assert source is not None  # what is opened lies somewhere
    return add_absolute(source, Path(options["out"]).expanduser())


SUBCOMMANDS = {
    "convert": Subcommand(data_convert.run, data_convert.HELP, data_convert.OPTIONS, ("in", "out")),
    "absolute": Subcommand(_absolute, ABSOLUTE_HELP, ("in", "out"), ("in", "out")),
    "inspect": Subcommand(data_look.inspect, data_look.INSPECT_HELP, ("plot", "episode"), (), ("path",)),
    "report": Subcommand(data_report.run, data_report.HELP, ("out",), (), ("path",)),
    "view": Subcommand(data_look.view, data_look.VIEW_HELP, ("episodes", "output"), (), ("path",)),
    "doctor": Subcommand(
        data_look.doctor, data_look.DOCTOR_HELP, ("page", "kinds", "details"), (), ("path",), ("json", "fix"), ("fix",)
    ),
    "edit": Subcommand(data_look.edit, data_look.EDIT_HELP, data_look.EDIT_OPTIONS, ("out",), ("path",)),
}
