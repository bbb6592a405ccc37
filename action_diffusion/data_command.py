"""`action-diffusion data …`: subcommands on demonstrations, with name=value options and help of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from action_diffusion.errors import InputError, unknown

DATA_HELP = """\
action-diffusion data SUBCOMMAND [name=value …]     demonstrations: from and to other formats

  action-diffusion data convert in=FILE.hdf5 out=DIR.zarr     robomimic's and robosuite's files, and back
  action-diffusion data absolute in=DIR.zarr out=OTHER.zarr     a column of absolute actions, from relative ones

`--help` after a subcommand explains it.
"""

CONVERT_HELP = """\
action-diffusion data convert in=PATH out=PATH [name=value …]     HDF5 to a replay buffer, and back

  action-diffusion data convert in=low_dim_v141.hdf5 out=lift.zarr       a robomimic file
  action-diffusion data convert in=demo.hdf5 out=lift.zarr               robosuite's own: states are rendered
  action-diffusion data convert in=demo.hdf5 out=lift.zarr observations=object,robot0_eef_pos,agentview_image
  action-diffusion data convert in=lift.zarr out=lift.hdf5               back, for robomimic

Whichever ends in .hdf5 or .h5 is the HDF5 file. Every value is compared with the source before the result takes its
name. A conversion that was cut off goes on when it is started again.

Options
  observations=KEY,…    what the simulator renders of each recorded state. Default: nothing where the file has
                        observations; else object, robot0_eef_pos, robot0_eef_quat, robot0_gripper_qpos and the
                        same of further arms
  workers=N             processes; default: one a core, fewer for small files
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


def _convert(options: Mapping[str, str]) -> Mapping[str, Any]:
    source, output = Path(options["in"]).expanduser(), Path(options["out"]).expanduser()
    workers = _workers(options.get("workers"))
    from_hdf5, to_hdf5 = (path.suffix in (".hdf5", ".h5") for path in (source, output))
    if from_hdf5 == to_hdf5:
        raise InputError(f"in={source} out={output}: one of them, not both, must end in .hdf5 or .h5")
    if to_hdf5:
        if "observations" in options:
            raise InputError("observations= is for converting to a replay buffer")
        from action_diffusion.datasets.robomimic_export import export

        return export(source, output)
    from action_diffusion.datasets.robomimic import convert, default_workers
    from action_diffusion.datasets.robomimic_file import describe
    from action_diffusion.datasets.robosuite_states import SimulatorObserver, state_keys, with_render_settings

    layout, observer = describe(source), None
    if "observations" in options or not layout.has_observations:
        layout = with_render_settings(layout)
        keys = options["observations"].split(",") if "observations" in options else state_keys(layout.env_args)
        observer = SimulatorObserver(layout.env_args, tuple(keys))
    workers = workers or default_workers(layout, observing=observer is not None)
    return convert(layout, output, observer=observer, workers=workers)


def _absolute(options: Mapping[str, str]) -> Mapping[str, Any]:
    from action_diffusion.datasets.absolute import add_absolute

    return add_absolute(Path(options["in"]).expanduser(), Path(options["out"]).expanduser())


def _workers(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or int(text) == 0:
        raise InputError(f"workers={text}: expected a whole number above 0")
    return int(text)


SUBCOMMANDS = {
    "convert": Subcommand(_convert, CONVERT_HELP, ("in", "out", "observations", "workers"), ("in", "out")),
    "absolute": Subcommand(_absolute, ABSOLUTE_HELP, ("in", "out"), ("in", "out")),
}
