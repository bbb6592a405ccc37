"""Options of the subcommands of `action-diffusion data`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from action_diffusion.options.words import AsTyped, Plugins, Seed
from action_diffusion.schema import Above, Between, FilePath, Matching, OneOf

Even = Matching("an even number, from 2 to 1024", lambda n: 2 <= n <= 1024 and n % 2 == 0)
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
    topics: FilePath | None = None
    workers: Annotated[int, Between(1, 1024)] | None = None
    plugins: Plugins = None


@dataclass(kw_only=True)
class Absolute:
    """`action-diffusion data absolute`."""

    in_: FilePath
    out: FilePath
    plugins: Plugins = None


@dataclass(kw_only=True)
class Augment:
    """`action-diffusion data augment`."""

    in_: FilePath
    out: FilePath
    episodes: Annotated[int, Between(1, 1_000_000)] = 200
    horizon: Annotated[int, Even] = 32
    steps: Annotated[int, Between(1, 10_000_000)] = 1000
    tolerance: Annotated[float, Above(0, 1000)] = 0.25
    anchors: Annotated[str, OneOf("ends", "all")] = "ends"
    state: str = "state"
    action: str = "action"
    goal: str | None = None
    seed: Seed = 0
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
