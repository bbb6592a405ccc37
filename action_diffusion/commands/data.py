"""`action-diffusion data …`: subcommands on demonstrations, with help of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from action_diffusion.commands import data_convert, data_look, data_report, subcommands
from action_diffusion.commands.subcommands import Subcommand
from action_diffusion.options.data import Absolute, Augment, Convert, DataReport, Doctor, Edit, Inspect, View
from action_diffusion.schema import check

DATA_HELP = """\
action-diffusion data SUBCOMMAND [name=value …]     demonstrations: look at them, mend them, bring them

  action-diffusion data inspect PATH      episodes, lengths, keys, shapes, rates, ranges, size on disk
  action-diffusion data view PATH         cameras, state and actions on one timeline
  action-diffusion data report PATH       all of that, first frames and what the doctor finds, on one page
  action-diffusion data doctor PATH       what is wrong, where, and what to do; --fix repairs a copy
  action-diffusion data edit PATH out=OTHER.zarr drop=3,7     drop, trim, split, merge, relabel
  action-diffusion data convert in=PATH out=PATH     LeRobot, UMI, robomimic, Zarr v2 and v3, folders: there and back
  action-diffusion data absolute in=DIR.zarr out=OTHER.zarr     a column of absolute actions, from relative ones
  action-diffusion data augment in=DIR.zarr out=OTHER.zarr      new episodes, put together from what was demonstrated

PATH is a replay buffer, or a LeRobot folder, HDF5, ROS 2 bags, CSV and MP4, which are converted into the cache once.
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

AUGMENT_HELP = """\
action-diffusion data augment in=DIR.zarr out=OTHER.zarr [name=value …]     new episodes, put together from old ones

  action-diffusion data augment in=demos.zarr out=more.zarr episodes=500
  action-diffusion data augment in=demos.zarr out=more.zarr goal=goal

From where a demonstration ends or begins, one diffusion model imagines what comes after, another one what came before.
New episodes are those with both; learnt dynamics say which actions they take, and refuse what cannot be. OTHER.zarr
holds the old episodes and the new ones, whose rows are true in the column `generated`; `provenance` says how it was
made. For states, not for cameras: other columns are left out, and named. More: docs/augment.md.

Options
  episodes=200      new ones
  horizon=32        steps that are imagined before and after a state, at most; an even number
  steps=1000        of training, for each model
  tolerance=0.25    how far a step may end beside where the dynamics say, in typical steps
  anchors=ends      states to begin at: ends, where a demonstration begins or ends; or all
  state=state       the column of states, [N, D], which should say all that matters
  action=action     that of actions, [N, A]
  goal=KEY          a column of goals, [N, D], which in a new episode is the state that it ends in
  seed=0
"""


def run(words: Sequence[str]) -> int:
    """`action-diffusion data` with the words after it; returns the exit code. Raises `InputError` for bad ones."""
    return subcommands.run("data", SUBCOMMANDS, DATA_HELP, words)


def _absolute(options: Mapping[str, Any]) -> Mapping[str, Any]:
    from action_diffusion.datasets.batches.sources import open_data
    from action_diffusion.envs.robosuite.absolute import add_absolute

    source = open_data(options["in"]).path
    assert source is not None  # what is opened lies somewhere
    return add_absolute(source, Path(options["out"]).expanduser())


def _augment(options: Mapping[str, Any]) -> Mapping[str, Any]:
    from action_diffusion.training.augmenting import augment

    return augment(check(dict(options), Augment))


SUBCOMMANDS = {
    "convert": Subcommand(data_convert.run, data_convert.HELP, Convert),
    "absolute": Subcommand(_absolute, ABSOLUTE_HELP, Absolute),
    "augment": Subcommand(_augment, AUGMENT_HELP, Augment),
    "inspect": Subcommand(data_look.inspect, data_look.INSPECT_HELP, Inspect, ("path",)),
    "report": Subcommand(data_report.run, data_report.HELP, DataReport, ("path",)),
    "view": Subcommand(data_look.view, data_look.VIEW_HELP, View, ("path",)),
    "doctor": Subcommand(data_look.doctor, data_look.DOCTOR_HELP, Doctor, ("path",), ("json", "fix"), ("fix",)),
    "edit": Subcommand(data_look.edit, data_look.EDIT_HELP, Edit, ("path",)),
}
