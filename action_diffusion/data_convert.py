"""`action-diffusion data convert`: which formats, and what is told about the result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from action_diffusion.errors import InputError

OPTIONS = ("in", "out", "observations", "workers")

HELP = """\
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


def run(options: Mapping[str, str]) -> Mapping[str, Any]:
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


def _workers(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or int(text) == 0:
        raise InputError(f"workers={text}: expected a whole number above 0")
    return int(text)
