"""A robot whose policy is told in words what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from action_diffusion.deploy.robot.robots import Observation, Robot


class ToldRobot:
    """`robot`, which has further observations: `vectors`, observation → float32 [E], the same at every instant."""

    def __init__(self, robot: Robot, vectors: Mapping[str, np.ndarray]) -> None:
        self._robot, self._vectors = robot, vectors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._robot, name)

    def observe(self, keys: Sequence[str], t: float) -> Observation:
        """See `Robot`."""
        seen = self._robot.observe([key for key in keys if key not in self._vectors], t)
        return seen._replace(
            values={key: self._vectors[key] if key in self._vectors else seen.values[key] for key in keys}
        )
