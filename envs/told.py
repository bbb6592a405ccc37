"""A simulator whose policy is told in words what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from action_diffusion.envs.base import Env
from action_diffusion.policy.text.words import Words


class ToldEnv:
    """`env`, which has further observations: the words, as vectors, that hold for all of an episode.

    They are `words.instruction`, or else what `env.instruction` says, a sentence, after `reset`.
    """

    def __init__(self, env: Env, words: Words) -> None:
        self._env, self._words = env, words
        self._vectors: dict[str, np.ndarray] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def reset(self, seed: int) -> None:
        """See `Env`. Raises `InputError` where nobody says what to do."""
        self._env.reset(seed)
        self._vectors = self._words.vectors(getattr(self._env, "instruction", None))

    def observe(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """See `Env`."""
        seen = self._env.observe([key for key in keys if key not in self._vectors])
        return {key: self._vectors[key] if key in self._vectors else seen[key] for key in keys}
