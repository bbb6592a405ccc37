"""`action-diffusion fit NAME`: what every extension takes, and what each takes beside."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from action_diffusion.options.train import Data
from action_diffusion.options.words import Device, Plugins, Seed
from action_diffusion.schema import Between, FilePath, Sized


@dataclass(kw_only=True)
class Fit:
    """bundle: to fit to, and to store what was found in. data: demonstrations; null: those of its training."""

    bundle: FilePath
    data: Data | None = None
    seed: Seed = 0
    device: Device = "auto"
    plugins: Plugins = None


@dataclass(kw_only=True)
class Guard(Fit):
    """How unusual an observation and a chunk are. quantile: of held-out demonstrations, above which one of them is
    unusual. episodes: share of held-out episodes that raise no alarm. sigmas: noise levels of the chunk's score, a row
    of a denoising step each."""

    quantile: Annotated[float, Between(0.5, 0.9999)] = 0.99
    episodes: Annotated[float, Between(0.5, 0.9999)] = 0.95
    sigmas: Annotated[list[Annotated[float, Between(0.01, 100)]], Sized(1, 16)] = field(default_factory=lambda: [0.1])


FITS: dict[str, type[Fit]] = {"guard": Guard}
"""By the names of the extensions."""
