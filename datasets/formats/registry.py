"""The formats by name, which of them a path holds, and which one a name asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from action_diffusion.datasets.formats.contract import Format
from action_diffusion.datasets.formats.mcap.bag import is_mcap
from action_diffusion.datasets.formats.paths import matching
from action_diffusion.errors import InputError, unknown
from action_diffusion.registry import FORMATS

_READ_ONLY = ("aloha", "mcap")
NAMES = tuple(name for name in FORMATS.own if name not in _READ_ONLY)
"""Those that are written."""
_SUFFIXES = {".zarr": "zarr", ".zip": "zarr", ".hdf5": "robomimic", ".h5": "robomimic"}
_HDF5 = b"\x89HDF\r\n\x1a\n"


def named(name: str) -> Format:
    """The format with this name, whose library is imported now."""
    found: Format = FORMATS.load(name)
    return found


def detected(path: Path) -> str:
    """The name of the format that `path` holds, told from its content.

    Raises `InputError` where there is nothing, or nothing known.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if (name := plugin_format(path)) is not None:
        return name
    for name, holds in _CONTENT.items():
        if holds(path):
            return name
    if path.suffix.lower() == ".csv":
        raise InputError(f"{path} is one file of a folder of CSV files: give the folder, {path.parent}")
    raise InputError(
        f"{path}: no known format: neither a Zarr replay buffer, nor HDF5, nor a LeRobotDataset (meta/info.json), "
        "nor a folder with CSV files or HDF5 episodes; a CSV an episode is read by: action-diffusion data convert "
        "in=FOLDER out=NAME.zarr state=COLUMN,… action=COLUMN,…"
    )


def plugin_format(path: Path) -> str | None:
    """The name of the plugin's format that `path` is of, if any."""
    return next((name for name in FORMATS if name not in FORMATS.own and named(name).holds(path)), None)


def asked_for(output: Path, name: str | None) -> str:
    """The format of the output: as named, or by the ending of its path."""
    if name is not None:
        if name not in FORMATS or name in _READ_ONLY:
            raise unknown("format", name, [name for name in FORMATS if name not in _READ_ONLY])
        return name
    if output.suffix not in _SUFFIXES:
        raise InputError(f"out={output}: which format? Add format=, one of {', '.join(NAMES)}")
    return _SUFFIXES[output.suffix]


def is_zarr(path: Path) -> bool:
    """Whether a replay buffer, or at least Zarr, lies at `path`."""
    if path.is_file():
        return _begins(path, b"PK")
    if any((path / name).is_file() for name in ("zarr.json", ".zgroup")):
        return True
    markers = [f"{depth}meta/episode_ends/{name}" for depth in ("", "*/", "*/*/") for name in (".zarray", "zarr.json")]
    return path.suffix == ".zarr" or any(next(path.glob(marker), None) for marker in markers)


def _is_lerobot(path: Path) -> bool:
    return (path / "meta" / "info.json").is_file()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and any(matching(path, "*.csv", "*/*.csv"))


def _begins(path: Path, signature: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(signature)) == signature


def _is_aloha(path: Path) -> bool:
    from action_diffusion.datasets.formats.aloha import is_aloha

    is_hdf5 = path.is_file() and _begins(path, _HDF5)
    return (is_hdf5 or (path.is_dir() and path.suffix != ".zarr")) and is_aloha(path)


_CONTENT: dict[str, Callable[[Path], bool]] = {
    "lerobot": _is_lerobot,
    "aloha": _is_aloha,
    "mcap": is_mcap,
    "robomimic": lambda path: path.is_file() and _begins(path, _HDF5),
    "folder": _is_folder,
    "zarr": is_zarr,
}
