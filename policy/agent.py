"""The only thing that keeps state between control steps: the observation history and the current chunk.

Simulated evaluation and a real arm drive a policy through the same `Agent`: what was measured is what runs.

The timeline for To = 2 observation steps, Ta = 4 executed steps and a horizon of H = 8:

    control step        t-1  t    t+1  t+2  t+3  t+4  t+5  t+6
    history [To]        o    o                                      observe() up to "now" = t, then history()
    chunk [H]           0    1    2    3    4    5    6    7        accept(): step To-1 of it is "now"
    executed [Ta]            1    2    3    4                       act(), once a control step
    next history                            o    o                  only these two need to be observed

A chunk predicts To-1 steps that are already past; steps [To-1 : To-1+Ta] are executed, the rest is dropped.
Only the last To observations before the next chunk are ever looked at (`will_be_seen`), so a simulator needs
to render no others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np

from action_diffusion.errors import InputError


class Agent:
    """Turns observations into history, and chunks into actions, one control step at a time.

        agent.observe(observation)
        if agent.needs_chunk:
            agent.accept(policy.predict(agent.history())["action_pred"])
        execute(agent.act())

    Between `act` and the next `observe`, `will_be_seen` says whether that observation matters; where it does
    not, `observe` may be left out.

    Args:
        n_obs_steps: To, the observation steps that the policy sees (>= 1).
        n_action_steps: Ta, the steps of a chunk that are executed (>= 1).

    Raises:
        InputError: for numbers below 1, for observations that change shape or keys, and for chunks that are
            too short, have other than two axes, or hold NaN or infinity.
        RuntimeError: for calls out of order.
    """

    def __init__(self, *, n_obs_steps: int, n_action_steps: int) -> None:
        for name, value in (("n_obs_steps", n_obs_steps), ("n_action_steps", n_action_steps)):
            if value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        self.n_obs_steps = n_obs_steps
        self.n_action_steps = n_action_steps
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new episode begins."""
        self._observations: deque[dict[str, np.ndarray]] = deque(maxlen=self.n_obs_steps)
        self._actions: deque[np.ndarray] = deque()

    def observe(self, observation: Mapping[str, np.ndarray]) -> None:
        """Add the newest observation: arrays of any shape by key, the same keys and shapes throughout."""
        # Copied, because simulators and cameras reuse their buffers.
        observation = {key: np.array(value) for key, value in observation.items()}
        if self._observations:
            _check_same(observation, self._observations[-1])
        self._observations.append(observation)

    def history(self) -> dict[str, np.ndarray]:
        """The last To observations by key, [To, ...]; a younger episode repeats its first one in front."""
        if not self._observations:
            raise RuntimeError("history() before the first observe()")
        missing = self.n_obs_steps - len(self._observations)
        steps = [self._observations[0]] * missing + list(self._observations)
        return {key: np.stack([step[key] for step in steps]) for key in steps[0]}

    @property
    def needs_chunk(self) -> bool:
        """Whether every step of the current chunk that should be executed has been."""
        return not self._actions

    @property
    def will_be_seen(self) -> bool:
        """Whether the observation due next is in the history of the next chunk.

        Asked before the first `observe`, or after `act`.
        """
        return len(self._actions) < self.n_obs_steps

    def accept(self, chunk: np.ndarray) -> None:
        """Take a predicted chunk [H, A] in the data's units; it replaces what is left of the one before."""
        chunk = np.asarray(chunk)
        first, end = self.n_obs_steps - 1, self.n_obs_steps - 1 + self.n_action_steps
        if chunk.ndim != 2 or len(chunk) < end:
            raise InputError(
                f"the chunk has shape {list(chunk.shape)}; {self.n_obs_steps} observation steps and "
                f"{self.n_action_steps} action steps need [H >= {end}, A]"
            )
        bad = ~np.isfinite(chunk[first:end]).all(axis=1)
        if bad.any():
            raise InputError(
                f"the chunk holds NaN or infinity at step {first + int(bad.argmax())}; "
                "a policy that has diverged cannot be executed"
            )
        self._actions = deque(np.array(action) for action in chunk[first:end])

    def act(self) -> np.ndarray:
        """The next action [A] to execute, in the data's units."""
        if not self._actions:
            raise RuntimeError("act() without a chunk: call accept() whenever needs_chunk is true")
        return self._actions.popleft()


def _check_same(new: Mapping[str, np.ndarray], old: Mapping[str, np.ndarray]) -> None:
    if new.keys() != old.keys():
        raise InputError(f"the observation has the keys {sorted(new)}, the one before had {sorted(old)}")
    for key, value in new.items():
        if value.shape != old[key].shape:
            was = list(old[key].shape)
            raise InputError(f"observation {key!r} has shape {list(value.shape)}, the one before had {was}")
