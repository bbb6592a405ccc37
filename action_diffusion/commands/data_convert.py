"""`action-diffusion data convert`: which formats, and what is told about the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from action_diffusion.errors import InputError

_VECTORS = ("action", "state")

HELP = """\
action-diffusion data convert in=PATH out=PATH [name=value …]     from one format to another

  action-diffusion data convert in=pusht.zarr.zip out=pusht format=lerobot     for LeRobot
  action-diffusion data convert in=pusht out=pusht.zarr                        from it, back
  action-diffusion data convert in=dataset.zarr.zip out=umi.zarr               UMI's file: images in JPEG XL
  action-diffusion data convert in=low_dim_v141.hdf5 out=lift.zarr             a robomimic file
  action-diffusion data convert in=demo.hdf5 out=lift.zarr                     robosuite's own: states are rendered
  action-diffusion data convert in=demo.hdf5 out=lift.zarr observations=object,robot0_eef_pos,agentview_image
  action-diffusion data convert in=lift.zarr out=lift.hdf5                     back, for robomimic
  action-diffusion data convert in=runs out=runs.zarr state=x,y,z action=target_x,target_y,target_z     CSV files
  action-diffusion data convert in=bags out=bags.zarr topics=topics.yaml       ROS 2 bags (MCAP): docs/mcap.md
  action-diffusion data convert in=aloha out=aloha.zarr                        a folder of ALOHA's episode_N.hdf5

What `in` holds is told from its content. Every value is compared with the source before the result takes its name, and
each key's SHA-256 is printed; images in video are measured (PSNR, 40 dB at least). A conversion that was cut off goes
on when it is started again.

Options
  format=NAME           what to write: zarr (v3), zarr2 (v2), umi, robomimic, lerobot (v3.0), lerobot21 (v2.1), folder
                        (CSV and MP4). Default: by the ending of `out`: .zarr, .zarr.zip, .hdf5, .h5
  rate=HZ               steps a second, where the source does not say (control_rate, or its time stamps; default 10);
                        where it does, fewer rows: 10 of 30 Hz keeps every third row, and where they do not divide the
                        nearest. The values stay as they are: actions that are differences are not added up
  video=high|lossless   of lerobot, lerobot21 and folder: H.264 4:4:4 (default), or of the colours as they are
  action=COLUMN,…       of CSV files: which columns are the action, such as target_x,target_y,target_z
  state=COLUMN,…        the same for the state
  topics=FILE.yaml      which topics of a ROS 2 bag are what, and at which rate. Default: topics.yaml in the folder
  observations=KEY,…    what the simulator renders of each recorded state of an HDF5 file. Default: nothing where the
                        file has observations; else object, robot0_eef_pos, robot0_eef_quat, robot0_gripper_qpos and
                        the same of further arms
  workers=N             processes that read an HDF5 file; default: one a core, fewer for small files
"""

_RATE = 10.0


def run(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Convert, and return the numbers to report."""
    source, output = Path(options["in"]).expanduser(), Path(options["out"]).expanduser()
    rate, workers = options.get("rate"), options.get("workers")
    from action_diffusion.datasets.formats.registry import asked_for, detected

    to = asked_for(output, options.get("format"))
    if "observations" in options and to != "zarr":
        raise InputError("observations= is for converting HDF5 to a replay buffer")
    held = detected(source)
    if held == to == "robomimic":
        raise InputError(f"in={source} out={output}: both are HDF5, one of them must be another format")
    vectors = {key: [name.strip() for name in options[key].split(",")] for key in _VECTORS if key in options}
    if vectors and held != "folder":
        raise InputError(f"{next(iter(vectors))}= names columns of CSV files, and {source} is no folder of these")
    if "topics" in options and held != "mcap":
        raise InputError(f"topics= is for ROS 2 bags, and {source} is none")
    if held == "robomimic":
        from action_diffusion.datasets.formats.robomimic import is_ours

        if not is_ours(source):
            if rate is not None:
                raise InputError(f"rate={rate:g}: HDF5 keeps its rate: convert {source} to .zarr, and that with rate=")
            return _from_hdf5(source, output, to, options.get("observations"), workers)
    if "observations" in options:
        raise InputError("observations= is for converting HDF5 to a replay buffer")
    topics = Path(options["topics"]).expanduser() if "topics" in options else None
    return _convert(source, held, output, to, rate, vectors, topics, lossless=options.get("video") == "lossless")


def _convert(
    source: Path,
    held: str,
    output: Path,
    to: str,
    rate: float | None,
    vectors: Mapping[str, Sequence[str]],
    topics: Path | None,
    *,
    lossless: bool,
) -> Mapping[str, Any]:
    """By the formats in datasets/formats."""
    from action_diffusion.datasets.formats.contract import Settings
    from action_diffusion.datasets.formats.conversion import convert
    from action_diffusion.datasets.formats.registry import named
    from action_diffusion.datasets.formats.resample import at_rate
    from action_diffusion.datasets.robomimic.export import export
    from action_diffusion.datasets.storage.times import timed

    if vectors:
        from action_diffusion.datasets.formats.folder.format import opened as open_folder

        opened = at_rate(open_folder(source, vectors), rate)
    elif topics is not None:
        from action_diffusion.datasets.formats.mcap.format import opened as open_bags

        opened = at_rate(open_bags(source, topics), rate)
    else:
        opened = at_rate(named(held).open(source), rate)
    attrs = opened.buffer.attrs
    if to == "robomimic" and "env_args" in attrs and held == "zarr":
        if rate is not None:
            raise InputError(f"rate={rate:g}: robomimic's file keeps the rate of {source}: convert that to .zarr first")
        return export(source, output)
    known, told = attrs.get("control_rate"), timed(opened.buffer)
    known = told[1] if known is None and told is not None else known
    settings = Settings(float(known or _RATE), "lossless" if lossless else "high")
    summary = convert(opened, output, named(to), settings)
    if known is None and to in ("lerobot", "lerobot21", "folder"):
        summary["rate"] = f"{_RATE:g} Hz, assumed, because the source does not say: rate=HZ sets it"
    if to == "robomimic":
        summary["env_args"] = "none, so that robomimic can train on the file, and not roll out"
    return summary


def _from_hdf5(source: Path, output: Path, to: str, observations: str | None, workers: int | None) -> Mapping[str, Any]:
    """robomimic's and robosuite's own files, to a replay buffer."""
    if to != "zarr":
        raise InputError(f"out={output}: HDF5 becomes a replay buffer first: out=NAME.zarr, and that becomes {to}")
    from action_diffusion.datasets.robomimic.conversion import convert, default_workers
    from action_diffusion.datasets.robomimic.file import ROBOSUITE_TYPE, describe
    from action_diffusion.envs.robosuite.states import SimulatorObserver, state_keys, with_render_settings

    layout, observer = describe(source), None
    simulated = "env_name" in layout.env_args and layout.env_args.get("type") == ROBOSUITE_TYPE
    if observations is not None or (simulated and not layout.has_observations):
        if not simulated:
            raise InputError(f"observations= has robosuite render its states, and {source} does not name it")
        layout = with_render_settings(layout)
        keys = observations.split(",") if observations is not None else state_keys(layout.env_args)
        observer = SimulatorObserver(layout.env_args, tuple(keys))
    workers = workers or default_workers(layout, observing=observer is not None)
    return convert(layout, output, observer=observer, workers=workers)
