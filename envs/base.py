"""What a simulator offers to everything else: one episode at a time, and observations only when asked for.

Rendering is the expensive part of a step (robot scenes: 40 ms a frame), and a policy that executes whole
chunks looks at few frames. So `step` renders nothing, and `observe` builds the keys that it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Env(Protocol):
    """One simulator holding one episode, whose score is its maximum reward; success is a score of 1.

    Attributes:
        control_rate: actions per second (Hz).
        max_steps: steps after which `step` says that the episode is done.
        action_shape: shape of one action; its units are those of the environment's demonstrations.
    """

    control_rate: float
    max_steps: int
    action_shape: tuple[int, ...]

    def reset(self, seed: int) -> None:
        """Begin the episode that `seed` stands for; the same seed always gives the same start."""

    def step(self, action: np.ndarray) -> tuple[float, bool]:
        """Execute `action` [*action_shape] for one control period. Returns the reward in [0, 1] and done."""
        ...

    def observe(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """The observations named by `keys`, in that order; images are uint8 [H, W, 3].

        Raises `InputError` for a key that the environment does not have.
        """
        ...

    def render(self, size: int = 256) -> np.ndarray:
        """A picture for people, uint8 [size, size, 3]."""
        ...

    def close(self) -> None:
        """Release the simulator."""
