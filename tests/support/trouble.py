"""A simulator that fails, in a module of its own, so that other processes can import it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
from rollouts import ChaoticEnv

from action_diffusion.errors import InputError


class Trouble(ChaoticEnv):
    """Does `what` at step 6 of the episodes of `seed`, as often as `times` says; `folder` counts."""

    def __init__(self, *, what: str, seed: int, times: int, folder: Path) -> None:
        super().__init__()
        self.what, self.bad_seed, self.times, self.folder = what, seed, times, folder

    def reset(self, seed: int) -> None:
        super().reset(seed)
        self.seed = seed

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        if self.seed == self.bad_seed and self.t == 6 and len(list(self.folder.iterdir())) < self.times:
            (self.folder / str(time.monotonic_ns())).touch()
            if self.what == "crash":
                os._exit(11)
            if self.what == "hang":
                time.sleep(60)
            if self.what == "raise":
                raise FloatingPointError("the contact solver gave up")
            raise InputError("an action of Chaos is two numbers")
        return super().step(action)
