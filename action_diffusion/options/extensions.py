"""`action-diffusion fit NAME`: what every extension takes, and what each takes beside."""

from __future__ import annotations

from dataclasses import dataclass

from action_diffusion.options.train import Data
from action_diffusion.options.words import Device, Plugins, Seed
from action_diffusion.schema import FilePath


@dataclass(kw_only=True)
class Fit:
    """bundle: to fit to, and to store what was found in. data: demonstrations; null: those of its training."""

    bundle: FilePath
    data: Data | None = None
    seed: Seed = 0
    device: Device = "auto"
    plugins: Plugins = None


FITS: dict[str, type[Fit]] = {}
"""By the names of the extensions."""
