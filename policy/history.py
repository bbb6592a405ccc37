"""The last To observations, as a policy sees them."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping

import numpy as np

from action_diffusion.errors import InputError


class History:
    """Keeps observations of the last To control steps.

    Args:
        n_obs_steps: To (>= 1).
        keys: of what is observed, which are kept; None: all.

    Raises:
        InputError: for a To below 1, and for observations that change shape or keys.
    """

    def __init__(self, n_obs_steps: int, keys: Collection[str] | None = None) -> None:
        if n_obs_steps < 1:
            raise InputError(f"n_obs_steps is {n_obs_steps}; it must be at least 1")
        self._observations: deque[dict[str, np.ndarray]] = deque(maxlen=n_obs_steps)
        self.n_obs_steps = n_obs_steps
        self._keys = keys

    def reset(self) -> None:
        """Forget everything: a new episode begins."""
        self._observations.clear()

    def observe(self, observation: Mapping[str, np.ndarray]) -> None:
        """Add the newest observation: arrays of any shape by key, the same keys and shapes throughout."""
        # Copied, because simulators and cameras reuse their buffers.
        kept = observation if self._keys is None else self._keys
        observation = {key: np.array(value) for key, value in observation.items() if key in kept}
        if self._observations:
            _check_same(observation, self._observations[-1])
        self._observations.append(observation)

    def stacked(self) -> dict[str, np.ndarray]:
        """The last To observations by key, [To, …]; a younger episode repeats its first one in front."""
        if not self._observations:
            raise RuntimeError("a history before the first observe()")
        missing = self.n_obs_steps - len(self._observations)
        steps = [self._observations[0]] * missing + list(self._observations)
        return {key: np.stack([step[key] for step in steps]) for key in steps[0]}


def _check_same(new: Mapping[str, np.ndarray], old: Mapping[str, np.ndarray]) -> None:
    if new.keys() != old.keys():
        raise InputError(f"the observation has the keys {sorted(new)}, the one before had {sorted(old)}")
    for key, value in new.items():
        if value.shape != old[key].shape:
            was = list(old[key].shape)
            raise InputError(f"observation {key!r} has shape {list(value.shape)}, the one before had {was}")
