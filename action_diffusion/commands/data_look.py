"""`action-diffusion data inspect|view|doctor|edit`: looking at demonstrations, and mending copies of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from action_diffusion.errors import InputError

INSPECT_HELP = """\
action-diffusion data inspect PATH [name=value …]     what a buffer holds

  action-diffusion data inspect demos.zarr
  action-diffusion data inspect pusht_human plot=pusht.png     a data set by its name works too

Episodes and their lengths, rate, size on disk; of every key shape, type, range, and how far it moves in a step.

Options
  plot=FILE.png     an episode's numbers over time and frames of its cameras, lengths of episodes, how values are spread
  episode=3         the one that is drawn, counted from 0. Default: 0
"""

VIEW_HELP = """\
action-diffusion data view PATH [name=value …]     cameras, state and actions on one timeline (rerun)

  action-diffusion data view demos.zarr                             opens the viewer
  action-diffusion data view demos.zarr episodes=3,7-9              some of them
  action-diffusion data view demos.zarr output=demos.rrd            a file for later: rerun demos.rrd

Needs the extra: pip install 'action-diffusion[view]'

Options
  episodes=3,7-9    counted from 0. Default: the first 10
  output=FILE.rrd   write a file; nothing is opened
"""

MOST_UNUSUAL = 20
"""Episodes that are listed."""

DOCTOR_HELP = """\
action-diffusion data doctor PATH [--json FILE] [--fix [OUT]] [name=value …]     what is wrong, where, and what to do

  action-diffusion data doctor demos.zarr
  action-diffusion data doctor demos.zarr --json findings.json page=findings.html
  action-diffusion data doctor demos.zarr --fix mended.zarr

A line for each kind and key: how many findings, in which episodes, and the worst of them; details=true has a row for
each: episode, first and last row (of the buffer, from 0, both included), how bad. Below, what to do. Exit code: 0 where
nothing is found, 1 with findings, 2 where the buffer cannot be read. More: docs/doctor.md.

  nan        values that are NaN or infinite
  dropped    a step or a frame is missing
  frozen     rows that repeat while others move
  jump       a step that is far too large
  outlier    a row off its neighbours
  rotation   numbers that jump where nothing turns
  timing     gaps and jitter of the time stamps
  skew       a camera that is early or late beside the states
  constant   a dimension that does not move
  saturated  a dimension that stays at its limit
  duplicate  an episode that is there twice
  idle       nothing happens at an episode's beginning or end
  leak       a column that tells the action of its own row

Options
  --json FILE       the findings as JSON: [{"kind", "key", "episode", "first", "last", "severity", "how_bad", "advice"}]
  --fix OUT         a repaired copy; without OUT beside the original, as NAME.fixed.zarr. The original is not touched
  page=FILE.html    the findings with a picture of each
  kinds=nan,jump    look for some only
  details=true      a row for each finding
  bundle=DIR        with a guard (action-diffusion fit guard): the episodes that are the least like the others
"""

EDIT_HELP = """\
action-diffusion data edit PATH out=OTHER.zarr [name=value …]     drop, trim, split, merge, relabel: a copy

  action-diffusion data edit demos.zarr out=good.zarr drop=3,7-9
  action-diffusion data edit demos.zarr out=good.zarr trim=120-131,400-412 split=650
  action-diffusion data edit demos.zarr out=all.zarr merge=monday.zarr,tuesday.zarr
  action-diffusion data edit demos.zarr out=labelled.zarr relabel=3-5:valid

Episodes and rows are those of PATH, counted from 0, ranges with both ends; rows are the buffer's, as `doctor` has them.
Several options in one command are applied to the same numbers. What was done, to which file (SHA-256) and when is kept
in the attribute `provenance` of the copy, after what PATH had there.

Options
  drop=EPISODES         leave these out
  trim=ROWS             leave these rows out: each range at the beginning or the end of an episode
  split=ROWS            a new episode begins at each of these rows
  merge=PATH,…          the episodes of these buffers behind those of PATH; they need the same keys
  relabel=EPISODES:NAME     these are in the subset NAME and in no other: dataset.subset=NAME trains on it
  rename=KEY:NAME,…     give columns other names
  rotations=KEY:KIND,…  which columns are rotations: eef_quat:quaternion_xyzw, action:rotation_vector@3 from value 3 on
  out=PATH              a folder, or a zip where it ends in .zip; must not exist
"""

_CHANGES = ("drop", "trim", "split", "merge", "relabel", "rename", "rotations")


def inspect(options: Mapping[str, Any]) -> int:
    from action_diffusion.datasets.batches.sources import open_data
    from action_diffusion.datasets.edit.editing import numbers
    from action_diffusion.datasets.edit.inspection import inspect, show
    from action_diffusion.datasets.edit.plotting import plot

    buffer = open_data(options["path"])
    if "episode" in options and "plot" not in options:
        raise InputError("episode= says which one is drawn: give plot=FILE.png as well")
    episode = numbers(options.get("episode", "0"), "episode", buffer.n_episodes)
    if len(episode) > 1:
        raise InputError(f"episode={options['episode']}: expected one number")
    found = inspect(buffer)
    show(found)
    if "plot" in options:
        plot(buffer, found, episode[0], Path(options["plot"]).expanduser())
        print(f"picture: {options['plot']}")
    return 0


def view(options: Mapping[str, Any]) -> Mapping[str, Any]:
    from action_diffusion.datasets.batches.sources import open_data
    from action_diffusion.datasets.edit.editing import numbers
    from action_diffusion.datasets.edit.viewing import view

    buffer = open_data(options["path"])
    episodes = range(min(10, buffer.n_episodes))
    chosen = numbers(options["episodes"], "episodes", buffer.n_episodes) if "episodes" in options else list(episodes)
    output = Path(options["output"]).expanduser() if "output" in options else None
    view(buffer, chosen, output)
    shown: dict[str, Any] = {"episodes": len(chosen), "of": buffer.n_episodes}
    return shown if output is None else {"output": str(output), **shown}


def doctor(options: Mapping[str, Any]) -> int:
    from action_diffusion.datasets.batches.sources import open_data, resolve
    from action_diffusion.datasets.doctor.examine import examine
    from action_diffusion.datasets.doctor.finding import KINDS, as_json, show
    from action_diffusion.errors import unknown
    from action_diffusion.files import atomic_path
    from action_diffusion.policy.reading import require, require_extensions

    kinds = tuple(options["kinds"].split(",")) if "kinds" in options else tuple(KINDS)
    for kind in kinds:
        if kind not in KINDS:
            raise unknown("kind", kind, KINDS, where="kinds=")
    repaired = _repaired_path(resolve(options["path"]), options["fix"]) if "fix" in options else None
    if "bundle" in options:  # before what takes long
        require(Path(options["bundle"]))
        require_extensions(Path(options["bundle"]), ["guard"])
    buffer = open_data(options["path"])
    findings = examine(buffer, kinds)
    show(findings, details=options.get("details", False))
    if "json" in options:
        with atomic_path(Path(options["json"]).expanduser()) as temporary:
            temporary.write_text(json.dumps(as_json(findings), indent=1))
    if "page" in options:
        from action_diffusion.datasets.doctor.page import write_page

        write_page(buffer, findings, Path(options["page"]).expanduser())
    if "bundle" in options:
        from action_diffusion.training.ranking import unusual

        for one in unusual(buffer, Path(options["bundle"]))[:MOST_UNUSUAL]:
            print(f"episode {one.episode}: level {one.level:.2f}, the most at row {one.row}")
    if repaired is not None:
        from action_diffusion.datasets.doctor.repair import repair

        for line in repair(buffer, findings, repaired):
            print(line)
    return 1 if findings else 0


def _repaired_path(source: Path, text: str) -> Path:
    name = source.name.removesuffix(".zip").removesuffix(".zarr")
    output = Path(text).expanduser() if text else source.with_name(f"{name}.fixed.zarr")
    if output.exists():
        raise InputError(f"{output} exists: choose another path with --fix OUT, or remove it")
    return output


def edit(options: Mapping[str, Any]) -> Mapping[str, Any]:
    from action_diffusion.datasets.batches.sources import resolve
    from action_diffusion.datasets.edit.editing import edit

    wanted = {name: options[name] for name in _CHANGES if name in options}
    if not wanted:
        raise InputError(f"nothing to do: give one of {', '.join(_CHANGES)}")
    return edit(resolve(options["path"]), Path(options["out"]).expanduser(), wanted)
