"""`action-diffusion fit NAME`: what every extension takes, and what each takes beside."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from action_diffusion.options.train import Data
from action_diffusion.options.words import Column, Device, Finite, Plugins, Seed
from action_diffusion.schema import Above, Between, FilePath, Sized


@dataclass(kw_only=True)
class Fit:
    """bundle: to fit to, and to store what was found in. data: demonstrations; null: those of its training."""

    bundle: FilePath
    data: Data | None = None
    seed: Seed = 0
    device: Device = "auto"
    plugins: Plugins = None


Numbers = Annotated[list[Finite], Sized(1, 4096)]
PlaceColumns = Annotated[list[Column], Sized(2, 3)]


@dataclass(kw_only=True)
class Constraint(Fit):
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


FITS: dict[str, type[Fit]] = {"constraint": Constraint}
"""By the names of the extensions."""
