"""The readable files of a bundle, `config.yaml` and `spec.json`, without torch: what is wrong is said at once."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from action_diffusion.errors import InputError, unknown
from action_diffusion.options import BundleConfig, check_policy
from action_diffusion.options.policy import with_sampler
from action_diffusion.policy.runtime import onnx_file
from action_diffusion.policy.spec import PolicySpec
from action_diffusion.registry import EXTENSIONS
from action_diffusion.schema import check, shown

FILES = ("model.safetensors", "config.yaml", "spec.json")
GOLDEN_TOLERANCE = 1e-3
"""Largest difference of a golden chunk, as a share of the action's range, that verification accepts."""
MOST_BYTES = 16 * 2**20
"""Of either file."""
MOST_VALUES = 1_000_000
"""In either, where what YAML refers to counts as often as it is referred to."""


def versions() -> dict[str, str]:
    """The versions that shape a policy's numbers, for `spec.json` and `results.json`."""
    names = ("action-diffusion", "torch", "torchvision", "diffusers", "numpy", "zarr", "gym-pusht", "pymunk")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def require(path: Path) -> None:
    """`InputError` unless `path` is a folder with all the files of a bundle."""
    if not Path(path).is_dir():
        raise InputError(f"no bundle at {path}: expected a folder with {', '.join(FILES)}")
    missing = [name for name in FILES if not (Path(path) / name).is_file()]
    if missing:
        nested = Path(path) / "bundle"
        hint = f"; did you mean {nested}?" if nested.is_dir() else ""
        raise InputError(f"{path} is not a complete bundle, it lacks {', '.join(missing)}{hint}")


def extension_file(bundle: Path, name: str) -> Path:
    """Where an extension that was fitted to a bundle lies."""
    return Path(bundle) / "extensions" / f"{name}.safetensors"


def acting(bundle: Path, asked: Iterable[str] | None) -> list[str]:
    """The extensions that act in a bundle's chunks: those asked for, or (None) those that its config.yaml names.

    Raises `InputError` for names that nobody has, and for those that are not fitted to it.
    """
    names = read_config(Path(bundle)).get("extensions") or [] if asked is None else list(asked)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{Path(bundle) / 'config.yaml'}: extensions={shown(names)}, expected a list of names")
    require_extensions(bundle, names)
    return names


def require_extensions(bundle: Path, names: Iterable[str]) -> None:
    """`InputError` for names of extensions that nobody has, and for those that are not fitted to a bundle."""
    for name in names:
        if name not in EXTENSIONS:
            raise unknown("extensions", name, EXTENSIONS)
        if onnx_file.is_onnx(bundle):
            raise InputError(
                f"extensions=[{name}]: {bundle} is an ONNX file, in which nothing acts: give it the bundle"
            )
        if not extension_file(bundle, name).is_file():
            fitted = sorted(path.stem for path in (Path(bundle) / "extensions").glob("*.safetensors"))
            raise InputError(
                f"{bundle}: extension {name!r} is not fitted (there: {', '.join(fitted) or 'none'}): "
                f"action-diffusion fit {name} bundle={bundle}"
            )


def check_sampler(bundle: Path, changes: Mapping[str, Any]) -> None:
    """`InputError` for options that a bundle's policy cannot be sampled with, see `options.policy.with_sampler`."""
    for name, value in changes.items():
        if value is not None and onnx_file.is_onnx(bundle):
            raise InputError(f"sampler.{name}: {bundle} is an ONNX file, whose steps are fixed: give it the bundle")
    if all(value is None for value in changes.values()):
        return
    policy = read_config(bundle).get("policy")
    try:
        check_policy(policy)
    except InputError as error:
        raise InputError(f"{bundle / 'config.yaml'}: {error}") from None
    assert isinstance(policy, dict)
    with_sampler(policy, changes)


def read_config(path: Path) -> dict[str, Any]:
    """The resolved configuration of a bundle, or of an ONNX file, as plain data."""
    if onnx_file.is_onnx(path):
        return dict(onnx_file.read(path).config)
    require(path)
    return read_yaml(path / "config.yaml")


def read_yaml(file: Path) -> dict[str, Any]:
    """A mapping of plain data. Raises `InputError` for anything else, and for `_target_` anywhere in it."""
    config = _read(file, "YAML", yaml.safe_load)
    if not isinstance(config, dict):
        raise InputError(f"{file}: expected a mapping, found {type(config).__name__}")
    refuse_targets(config, str(file))
    return config


def read_spec(path: Path) -> PolicySpec:
    """The specification of a bundle, or of an ONNX file."""
    if onnx_file.is_onnx(path):
        return onnx_file.read(path).spec
    require(path)
    file = path / "spec.json"
    return PolicySpec.from_json(read_json(file), str(file))


def read_json(file: Path) -> dict[str, Any]:
    """An object of plain data. Raises `InputError` for anything else."""
    data = _read(file, "JSON", json.loads)
    if not isinstance(data, dict):
        raise InputError(f"{file}: expected an object, found {type(data).__name__}")
    return data


def trained_on(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The parts of a bundle's configuration that say what it was trained on. Raises `InputError` for other types."""
    try:
        check({name: config[name] for name in config if name in BundleConfig.__annotations__}, BundleConfig)
    except InputError as error:
        raise InputError(f"{path / 'config.yaml'}: {error}") from None
    return config


def data_for(config: Mapping[str, Any], path: Path, asked: Any) -> Any:
    """The data that is asked for, or what the bundle at `path` was trained on. config: of `trained_on`.

    Raises `InputError` where neither is there, as of a policy that came from another project.
    """
    if asked is None and config["data"] is None:
        raise InputError(f"{path} does not say which data it was trained on: data=PATH")
    return config["data"] if asked is None else asked


def refuse_targets(config: Any, where: str) -> None:
    """`InputError` for a `_target_` anywhere inside: code is never named by configuration."""
    if isinstance(config, dict):
        for key, value in config.items():
            if key == "_target_":
                raise InputError(
                    f"{where}: _target_ ({shown(value)}) is not allowed; components are built by their names"
                )
            refuse_targets(value, where)
    elif isinstance(config, list | tuple):
        for value in config:
            refuse_targets(value, where)


def _read(file: Path, kind: str, parse: Callable[[str], Any]) -> Any:
    if file.stat().st_size > MOST_BYTES:
        raise InputError(f"{file} has {file.stat().st_size / 2**20:,.0f} MiB, at most {MOST_BYTES >> 20} can be")
    try:
        text = file.read_text(encoding="utf-8")
    except ValueError as error:
        raise InputError(f"{file}: not valid {kind}: {shown(error)}") from None
    return parsed(text, str(file), kind, parse)


def parsed(text: str, where: str, kind: str, parse: Callable[[str], Any]) -> Any:
    """What `parse` makes of a text. Raises `InputError` for what it cannot read, for more than `MOST_BYTES` and for
    more than `MOST_VALUES`."""
    if len(text) > MOST_BYTES:
        raise InputError(f"{where} has {len(text) / 2**20:,.0f} MiB, at most {MOST_BYTES >> 20} can be")
    try:
        data = parse(text)
        _count(data, where, 0)
    except InputError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # also of numbers of too many digits, and of dates
        raise InputError(f"{where}: not valid {kind}: {shown(error)}") from None
    except RecursionError:
        raise InputError(f"{where}: not valid {kind}: too many lists in one another") from None
    return data


def _count(data: Any, where: str, before: int) -> int:
    """How many values there are, which may be the same ones many times over."""
    count = before + 1
    if count > MOST_VALUES:
        raise InputError(f"{where} holds more than {MOST_VALUES:,} values")
    inside = data.values() if isinstance(data, dict) else data if isinstance(data, list | tuple | set) else ()
    for value in inside:
        count = _count(value, where, count)
    return count
