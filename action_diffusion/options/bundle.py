"""Options of the subcommands of `action-diffusion bundle`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from action_diffusion.options.policy import AnySampler
from action_diffusion.options.task import Environment, Rate
from action_diffusion.options.words import AsTyped, Plugins, Word
from action_diffusion.schema import Between, FilePath

OPSETS, OPSET = (18, 23), 18
"""Of ONNX: what is read and written, and what is written unless another is asked for, which the most programs read."""


@dataclass(kw_only=True)
class BundleInspect:
    """`action-diffusion bundle inspect`."""

    path: FilePath
    plugins: Plugins = None


@dataclass(kw_only=True)
class BundleImport:
    """`action-diffusion bundle import`."""

    in_: FilePath
    out: FilePath
    rate: Rate | None = None
    keys: dict[str, Word] | None = None
    env: Environment | None = None
    sampler: AnySampler = field(default_factory=AnySampler)
    plugins: Plugins = None


@dataclass(kw_only=True)
class BundlePush:
    """`action-diffusion bundle push`. private: of a repository that is made now."""

    path: FilePath
    to: FilePath
    private: bool = True
    message: AsTyped = "A bundle of action-diffusion"
    plugins: Plugins = None


@dataclass(kw_only=True)
class BundlePull:
    """`action-diffusion bundle pull`."""

    path: FilePath
    out: FilePath
    plugins: Plugins = None


@dataclass(kw_only=True)
class BundleExport:
    """`action-diffusion bundle export`."""

    in_: FilePath
    out: FilePath
    format: AsTyped
    sampler: AnySampler = field(default_factory=AnySampler)
    opset: Annotated[int, Between(*OPSETS)] | None = None
    plugins: Plugins = None
