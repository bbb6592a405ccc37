"""`action-diffusion fit`: an extension is fitted to a bundle, on demonstrations, and stored in it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.batches.loader import BatchSource
from action_diffusion.datasets.batches.sources import names
from action_diffusion.datasets.batches.windows import make_windows, split_episodes
from action_diffusion.errors import InputError
from action_diffusion.options.extensions import Fit
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.extensions.extension import write
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.reading import data_for, read_config, trained_on
from action_diffusion.registry import EXTENSIONS
from action_diffusion.training import episodes
from action_diffusion.training.data import prepare
from action_diffusion.training.run import open_data

OWN_SHARE = 0.2
"""Of the episodes, to calibrate on where training held out none."""


def fit(name: str, config: Fit) -> dict[str, Any]:
    """Fit the extension `name`; returns what there is to say of it, by name. Raises `InputError`."""
    path = Path(config.bundle)
    policy = bundles.load(path, str(config.device), precision="fp32")  # as `evaluate` does
    train, held_out, words = demonstrations(policy, path, config)
    own = {field.name for field in fields(Fit)} - {"seed"}
    options = {key: value for key, value in vars(config).items() if key not in own}
    found = EXTENSIONS.load(name).fit(policy, train, held_out, options)
    file = write(path, name, found)
    said = {key: value for key, value in found.options.items() if isinstance(value, int | float | str)}
    return {"demonstrations": words, **said, "stored in": file}


def demonstrations(policy: DiffusionPolicy, path: Path, config: Fit) -> tuple[BatchSource, BatchSource, str]:
    """Windows that were trained on, windows to calibrate on, and which these are in words.

    The latter are of episodes that training held out, or new ones of `data`; a share of all episodes, apart from the
    others, where there is neither.
    """
    trained = trained_on(read_config(path), path)
    data = names(data_for(trained, path, config.data))
    buffer = open_data({**trained, "data": data})
    known = episodes.read(path)
    kinds = None if known is None else episodes.recognise(buffer, policy.spec, known)
    every = np.arange(buffer.n_episodes)
    mine = every if kinds is None else np.flatnonzero(kinds == episodes.TRAINED)
    others = every[:0] if kinds is None else np.flatnonzero(kinds != episodes.TRAINED)
    words = f"{len(mine)} episodes trained on, calibrated on {len(others)} others"
    if not len(mine):
        mine = others
    if not len(others):
        if len(mine) < 2:
            raise InputError(f"{buffer.name}: one episode is too few to fit on some and calibrate on others")
        first, second = split_episodes(len(mine), OWN_SHARE, config.seed)
        mine, others = mine[first], mine[second]
        words = f"calibrated on {len(others)} of the episodes that were trained on: training held out none"
    source = prepare(
        buffer,
        policy.spec,
        device=policy.device,
        val_fraction=0.0,
        seed=config.seed,
        memory_gb=trained["dataset"]["memory_gb"],
        images=trained["dataset"].get("images", "auto"),
    ).train
    spec = policy.spec
    sizes = {"horizon": spec.horizon, "n_obs_steps": spec.n_obs_steps, "n_action_steps": spec.n_action_steps}
    chosen = [source.with_windows(make_windows(buffer.episode_ends, episodes=part, **sizes)) for part in (mine, others)]
    return chosen[0], chosen[1], words
