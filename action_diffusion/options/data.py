"""Options of the subcommands of `action-diffusion data`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from action_diffusion.options.words import AsTyped, Plugins
from action_diffusion.schema import Between, FilePath, Matching, OneOf

_STEPS_A_SECOND = Matching("steps a second, from 0.01 to 10000", lambda rate: 0.01 <= rate <= 1e4)


@dataclass(kw_only=True)
class Convert:
    """`action-diffusion data convert`."""

    in_: FilePath
    out: FilePath
    format: AsTyped | None = None
    rate: Annotated[float, _STEPS_A_SECOND] | None = None
    video: Annotated[str, OneOf("high", "lossless", kind="video")] = "high"
    action: AsTyped | None = None
    state: AsTyped | None = None
    observations: AsTyped | None = None
    workers: Annotated[int, Between(1, 1024)] | None = None
    plugins: Plugins = None


@dataclass(kw_only=True)
class Absolute:
    """`action-diffusion data absolute`."""

    in_: FilePath
    out: FilePath
    plugins: Plugins = None


@dataclass(kw_only=True)
class Inspect:
    """`action-diffusion data inspect`."""

    path: FilePath
    plot: FilePath | None = None
    episode: AsTyped | None = None
    plugins: Plugins = None


@dataclass(kw_only=True)
class DataReport:
    """`action-diffusion data report`."""

    path: FilePath
    out: FilePath | None = None
    plugins: Plugins = None


@dataclass(kw_only=True)
class View:
    """`action-diffusion data view`."""

    path: FilePath
    episodes: AsTyped | None = None
    output: FilePath | None = None
    plugins: Plugins = None


@dataclass(kw_only=True)
class Doctor:
    """`action-diffusion data doctor`. fix: the copy to write; "" for one beside the original. bundle: with a guard."""

    path: FilePath
    page: FilePath | None = None
    kinds: AsTyped | None = None
    details: bool = False
    json: FilePath | None = None
    fix: str | None = None
    bundle: FilePath | None = None
    plugins: Plugins = None


@dataclass(kw_only=True)
class Edit:
    """`action-diffusion data edit`."""

    path: FilePath
    out: FilePath
    drop: AsTyped | None = None
    trim: AsTyped | None = None
    split: AsTyped | None = None
    merge: AsTyped | None = None
    relabel: AsTyped | None = None
    rename: AsTyped | None = None
    rotations: AsTyped | None = None
    plugins: Plugins = None
