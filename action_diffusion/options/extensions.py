"""`action-diffusion fit NAME`: what every extension takes, and what each takes beside."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from action_diffusion.options.train import Data
from action_diffusion.options.words import MOST_STEPS, Device, Plugins, Seed, Share
from action_diffusion.schema import Above, Between, FilePath, Sized


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
    unusual. episodes: share of held-out episodes that raise no alarm. chunk: say of each chunk as well, which takes an
    evaluation of the denoiser. sigmas: noise levels of that, a row each."""

    quantile: Annotated[float, Between(0.5, 0.9999)] = 0.99
    episodes: Annotated[float, Between(0.5, 0.9999)] = 0.95
    chunk: bool = False
    sigmas: Annotated[list[Annotated[float, Between(0.01, 100)]], Sized(1, 16)] = field(default_factory=lambda: [0.1])


@dataclass(kw_only=True)
class Tokens(Fit):
    """A token head chooses the way, and the denoiser does it: for tasks of several ways, in few denoising steps."""

    frequencies: Annotated[int, Between(1, MOST_STEPS)] = 4
    levels: Annotated[int, Between(1, 1000)] = 16
    hidden: Annotated[int, Between(8, 4096)] = 128
    steps: Annotated[int, Between(1, 1_000_000)] = 2000
    lr: Annotated[float, Above(0, 1)] = 2e-3
    until: Share = 0.4
    confidence: Share = 0.5


FITS: dict[str, type[Fit]] = {"guard": Guard, "tokens": Tokens}
"""By the names of the extensions."""
