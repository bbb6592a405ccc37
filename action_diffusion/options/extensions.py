"""`action-diffusion fit NAME`: what every extension takes, and what each takes beside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from action_diffusion.options.train import Data
from action_diffusion.options.words import Device, Plugins, Seed
from action_diffusion.schema import Above, FilePath


@dataclass(kw_only=True)
class Fit:
    """bundle: to fit to, and to store what was found in. data: demonstrations; null: those of its training."""

    bundle: FilePath
    data: Data | None = None
    seed: Seed = 0
    device: Device = "auto"
    plugins: Plugins = None


@dataclass(kw_only=True)
class Cache(Fit):
    """Asks the network less often: goes on with its last output where that is predicted to be harmless. At most a share
    alpha of chunks ends further than tolerance from what they would be, in the data's units, at any executed step."""

    tolerance: Annotated[float, Above(0, 1e9)]
    alpha: Annotated[float, Above(0, 0.5)] = 0.1


FITS: dict[str, type[Fit]] = {"cache": Cache}
"""By the names of the extensions."""
