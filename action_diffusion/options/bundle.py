"""Options of the subcommands of `action-diffusion bundle`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from action_diffusion.options.words import AsTyped, Plugins
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
    plugins: Plugins = None


@dataclass(kw_only=True)
class BundleExport:
    """`action-diffusion bundle export`."""

    in_: FilePath
    out: FilePath
    format: AsTyped
    opset: Annotated[int, Between(*OPSETS)] | None = None
    plugins: Plugins = None
