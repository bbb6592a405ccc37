"""Several observations of a simulator as one vector, for policies that were trained on them so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from action_diffusion.envs.base import Env


class JoinedObservations:
    """`env`, which has further observations: the name in `joined` → some of its own, one after the other.

    They are float32 [n].
    """

    def __init__(self, env: Env, joined: Mapping[str, Sequence[str]]):
        self._env, self._joined = env, joined

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def observe(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """See `Env`."""
        own = dict.fromkeys(part for key in keys for part in self._joined.get(key, [key]))
        seen = self._env.observe(list(own))
        return {key: self._vector(key, seen) if key in self._joined else seen[key] for key in keys}

    def _vector(self, key: str, seen: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([np.ravel(seen[part]) for part in self._joined[key]]).astype(np.float32)
