"""Cheap mistakes, found before torch is imported: what is not there, and what cannot fit.

Each command has a function of its name here, which takes its configuration and raises `InputError`, or returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from action_diffusion.deploy.serve.access import read_token
from action_diffusion.errors import InputError, unknown
from action_diffusion.options import Collect, Deploy, Serve
from action_diffusion.policy.reading import read_config, read_spec, require, trained_on


def train(config: Mapping[str, Any]) -> None:
    """The data and its columns, the crop of its images, weights to start from."""
    if config["init"] is not None:
        read_spec(Path(config["init"]).expanduser())
    encoder = config["policy"]["encoder"]
    weights = encoder.get("weights")
    if weights is not None and not Path(weights).expanduser().is_file():
        raise InputError(f"policy.encoder.weights={weights}: no such file")
    from action_diffusion.datasets.batches.sources import NAMES

    if config["data"] not in NAMES:
        _check_data(config["data"], config["task"], encoder)


def evaluate(config: Mapping[str, Any]) -> None:
    """The bundles, and what there is to hold them against."""
    given = config["bundle"]
    bundles = [Path(path) for path in (given if isinstance(given, list) else [given])]
    compare = [] if config["compare"] is None else [Path(config["compare"])]
    for path in (*bundles, *compare):
        require(path)
        read_spec(path)
        read_config(path)
    simulated = [path for path in (*bundles, *compare) if read_spec(path).env is not None]
    others = [path for path in (*bundles, *compare) if path not in simulated]
    if simulated and others:
        raise InputError(f"{simulated[0]} is for a task with a simulator, {others[0]} is not: they do not compare")
    _check_exists("data", config["data"])
    for path in others:
        trained_on(read_config(path), path)


def deploy(config: Deploy) -> None:
    """The bundle, and files that are named."""
    if config.bundle:
        read_spec(Path(config.bundle))
        read_config(Path(config.bundle))
    _check_exists("hardware", config.hardware)


def serve(config: Serve) -> None:
    """The token and the bundle."""
    read_token(config.token_file)
    read_spec(Path(config.bundle))
    read_config(Path(config.bundle))


def collect(config: Collect) -> None:
    """The bundle that episodes begin with, and files that are named."""
    if config.visited_by is not None:
        require(Path(config.visited_by).expanduser())
    _check_exists("hardware", config.hardware)


def _check_exists(name: str, path: str | None) -> None:
    if path is not None and not Path(path).expanduser().exists():
        raise InputError(f"{name}={path}: no such file or folder")


def _check_data(data: str, task: Mapping[str, Any], encoder: Mapping[str, Any]) -> None:
    """Of a replay buffer: columns that are named, and that crops are no larger than images."""
    from action_diffusion.datasets.batches.sources import resolve
    from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer

    path = resolve(data)
    if not path.exists():
        raise InputError(f"{data}: no such file or folder")
    if not (path.suffix == ".zip" or any((path / name).exists() for name in ("zarr.json", ".zgroup"))):
        return  # no replay buffer; whoever reads it says what it is
    buffer = ReplayBuffer.open(path)
    named = task.get("observations") or {}
    drawn = (task.get("env") or {}).get("name") == "pusht"  # images that its simulator draws from states
    for key, options in named.items():
        source = (options or {}).get("source") or key
        if source not in buffer.keys and not (drawn and (options or {}).get("kind") == "image"):
            raise unknown(f"key of the buffer for observation {key!r}", source, buffer.keys, buffer.name)
    sources = [(key, (options or {}).get("source") or key) for key, options in named.items()]
    for key, source in sources or [(key, key) for key in buffer.keys]:
        shape = tuple(buffer[source].shape[1:]) if source in buffer.keys else ()
        if len(shape) == 3 and shape[-1] == 3:
            _check_crop(key, encoder.get("resize") or shape[:2], encoder.get("crop"))


def _check_crop(key: str, size: Sequence[int], crop: Sequence[int] | None) -> None:
    if crop is not None and (crop[0] > size[0] or crop[1] > size[1]):
        raise InputError(f"encoder.crop={list(crop)} is larger than the frames of {key!r}, {list(size)}")
