"""`action-diffusion data …`: subcommands on demonstrations, with name=value options and help of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from action_diffusion import data_convert
from action_diffusion.errors import InputError, unknown

DATA_HELP = """\
action-diffusion data SUBCOMMAND [name=value …]     demonstrations: from and to other formats

  action-diffusion data convert in=FILE.hdf5 out=DIR.zarr     robomimic's and robosuite's files, and back
  action-diffusion data absolute in=DIR.zarr out=OTHER.zarr     a column of absolute actions, from relative ones

`--help` after a subcommand explains it.
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
    """options: what each must look like, in words; `run` takes the given ones as text."""

    run: Callable[[Mapping[str, str]], Mapping[str, Any]]
    help: str
    options: tuple[str, ...]
    required: tuple[str, ...]


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
    for name, value in subcommand.run(_options(words[0], words[1:])).items():
        print(f"{name}: {value}")
    return 0


def _options(name: str, words: Sequence[str]) -> dict[str, str]:
    subcommand, options = SUBCOMMANDS[name], dict[str, str]()
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key or key.startswith("-"):
            raise InputError(f"{word!r} is not of the form name=value; see: action-diffusion data {name} --help")
        if key not in subcommand.options:
            raise unknown("option", key, subcommand.options)
        if key in options:
            raise InputError(f"{key}= is given twice")
        if not value:
            raise InputError(f"{key}= is empty; see: action-diffusion data {name} --help")
        options[key] = value
    for key in subcommand.required:
        if key not in options:
            raise InputError(f"{key} is required: action-diffusion data {name} {key}=…")
    return options


def _absolute(options: Mapping[str, str]) -> Mapping[str, Any]:
    from action_diffusion.datasets.absolute import add_absolute

    return add_absolute(Path(options["in"]).expanduser(), Path(options["out"]).expanduser())


SUBCOMMANDS = {
    "convert": Subcommand(data_convert.run, data_convert.HELP, data_convert.OPTIONS, ("in", "out")),
    "absolute": Subcommand(_absolute, ABSOLUTE_HELP, ("in", "out"), ("in", "out")),
}
