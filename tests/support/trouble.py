"""A chaotic environment and one that fails, without torch, which each process that imports them would import too."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from action_diffusion.errors import InputError


class ChaoticEnv:
    """A logistic map, which doubles the smallest difference at every step; episodes differ in length."""

    control_rate = 10.0
    max_steps = 40
    action_shape: tuple[int, ...] = (2,)

    def __init__(self) -> None:
        self.observed: list[int] = []
        self.closed = False

    def reset(self, seed: int) -> None:
        self.x = np.random.default_rng(seed).uniform(0.1, 0.9)
        self.length = 5 + seed * 7 % 30
        self.t = 0

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        self.x = 3.99 * self.x * (1 - self.x) * (1 - 1e-3 * float(np.tanh(action).mean()) ** 2)
        self.t += 1
        return self.x, self.t >= self.length

    def observe(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        self.observed.append(self.t)
        return {key: np.array([self.x, self.t], np.float32) for key in keys}

    def render(self, size: int = 256) -> np.ndarray:
        return np.full((size, size, 3), int(255 * self.x), np.uint8)

    def close(self) -> None:
        self.closed = True


class SlowEnv(ChaoticEnv):
    """Of `seconds` a step, and as many more at the beginning of the episode of `straggler` as it says."""

    def __init__(self, *, seconds: float = 0.01, straggler: int | None = None, late: float = 0.0) -> None:
        super().__init__()
        self.seconds, self.straggler, self.late = seconds, straggler, late

    def reset(self, seed: int) -> None:
        super().reset(seed)
        time.sleep(self.late if seed == self.straggler else 0.0)

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        time.sleep(self.seconds)
        return super().step(action)


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


class Deadly(NamedTuple):
    """An order that start 7 does not survive."""

    start: int
    seconds: float = 60.0

    def run(self, env: ChaoticEnv, /) -> int:
        if self.start == 7:
            os._exit(11)
        return self.start
