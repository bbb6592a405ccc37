"""`action-diffusion fit NAME`: what every extension takes, and what each takes beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from action_diffusion.errors import InputError
from action_diffusion.options.train import Data
from action_diffusion.options.words import MOST_STEPS, Column, Device, Finite, Plugins, Seed, Share, Word
from action_diffusion.schema import Above, Between, FilePath, OneOf, Sized, shown

Numbers = Annotated[list[Finite], Sized(1, 4096)]
PlaceColumns = Annotated[list[Column], Sized(2, 3)]


@dataclass(kw_only=True)
class Fit:
    """bundle: to fit to, and to store what was found in. data: demonstrations; null: those of its training."""

    bundle: FilePath
    data: Data | None = None
    seed: Seed = 0
    device: Device = "auto"
    plugins: Plugins = None


@dataclass(kw_only=True)
class CacheOptions(Fit):
    """Asks the network less often: goes on with its last output where that is predicted to be harmless. At most a share
    alpha of chunks ends further than tolerance from what they would be, in the data's units, at any executed step."""

    tolerance: Annotated[float, Above(0, 1e9)]
    alpha: Annotated[float, Above(0, 0.5)] = 0.1


@dataclass(kw_only=True)
class ConstraintOptions(Fit):
    """Keeps chunks out of discs ([x,y,radius]) and boxes ([x0,y0,x1,y1]), between low and high (a number each action
    value), below speed (unit/s): of the action's columns that are a place. position: the observation that says where
    the arm is, which may be up to lead (s) behind its commands. margin: how far it strays from their path."""

    discs: Annotated[list[Numbers], Sized(0, 100)] = field(default_factory=list)
    boxes: Annotated[list[Numbers], Sized(0, 100)] = field(default_factory=list)
    low: Numbers | None = None
    high: Numbers | None = None
    speed: Annotated[float, Above(0, 1e9)] | None = None
    lead: Annotated[float, Between(0, 10)] = 0.0
    margin: Annotated[float, Between(0, 1e9)] = 0.0
    columns: PlaceColumns = field(default_factory=lambda: [0, 1])
    position: str | None = None
    position_columns: PlaceColumns = field(default_factory=lambda: [0, 1])


@dataclass(kw_only=True)
class GuardOptions(Fit):
    """How unusual an observation and a chunk are. quantile: of held-out demonstrations, above which one of them is
    unusual. episodes: share of held-out episodes that raise no alarm. chunk: say of each chunk as well, which takes an
    evaluation of the denoiser. sigmas: noise levels of that, a row each."""

    quantile: Annotated[float, Between(0.5, 0.9999)] = 0.99
    episodes: Annotated[float, Between(0.5, 0.9999)] = 0.95
    chunk: bool = False
    sigmas: Annotated[list[Annotated[float, Between(0.01, 100)]], Sized(1, 16)] = field(default_factory=lambda: [0.1])


Preference = Annotated[dict[str, Annotated[float, Between(0, 1e9)]], Sized(1, 64)]
"""Of each named intent how much it is preferred, in any unit; one that is not named is never chosen."""


@dataclass(kw_only=True)
class Intending:
    """`intents.*` of extensions=[intents]: the one of every episode; or how likely each is."""

    name: Word | None = None
    preference: Preference | None = None


def check_intending(intents: Intending, extensions: Sequence[str]) -> None:
    """`InputError` where an intent is asked for, and no extension knows any."""
    for name, value in vars(intents).items():
        if value is not None and "intents" not in extensions:
            raise InputError(f"intents.{name}={shown(value)} needs extensions=[intents]: docs/extensions/intents.md")


@dataclass(kw_only=True)
class IntentsOptions(Fit):
    """Ways to do the task, by names: a learnt token each, kept for an episode. labels: the column that says which each
    episode is (task: its words); null: count clusters of what episodes, or chunks, do. columns: of the action, which
    are clustered; aligned: two of a plane, in which paths are turned to begin and end alike. names: null: the labels'
    values, or a, b, …, the most frequent first. preference: {NAME:number}; null: as often as demonstrated."""

    labels: str | None = None
    count: Annotated[int, Between(2, 64)] = 2
    by: Annotated[str, OneOf("episode", "chunk")] = "episode"
    columns: Annotated[list[Column], Sized(1, 4096)] | None = None
    aligned: bool = False
    names: Annotated[list[Word], Sized(2, 64)] | None = None
    preference: Preference | None = None
    size: Annotated[int, Between(1, 1024)] = 16
    hidden: Annotated[int, Between(8, 4096)] = 128
    steps: Annotated[int, Between(1, 1_000_000)] = 2000
    lr: Annotated[float, Above(0, 1)] = 2e-3


@dataclass(kw_only=True)
class TokensOptions(Fit):
    """A token head chooses the way, and the denoiser does it: for tasks of several ways, in few denoising steps."""

    frequencies: Annotated[int, Between(1, MOST_STEPS)] = 4
    levels: Annotated[int, Between(1, 1000)] = 16
    hidden: Annotated[int, Between(8, 4096)] = 128
    steps: Annotated[int, Between(1, 1_000_000)] = 2000
    lr: Annotated[float, Above(0, 1)] = 2e-3
    until: Share = 0.4
    confidence: Share = 0.5


FITS: dict[str, type[Fit]] = {
    "cache": CacheOptions,
    "constraint": ConstraintOptions,
    "guard": GuardOptions,
    "intents": IntentsOptions,
    "tokens": TokensOptions,
}
"""By the names of the extensions."""
