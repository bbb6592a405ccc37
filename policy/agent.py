"""A policy's history and its current chunk, for whoever drives it step by step: simulators, servers, your own loop.

The timeline for To = 2 observation steps, Ta = 4 executed steps and a horizon of H = 8:

    control step        t-1  t    t+1  t+2  t+3  t+4  t+5  t+6
    history [To]        o    o                                      observe() up to "now" = t, then history()
    chunk [H]           0    1    2    3    4    5    6    7        accept(): step To-1 of it is "now"
    executed [Ta]            1    2    3    4                       act(), once a control step
    next history                            o    o                  only these two need to be observed

A chunk predicts To-1 steps that are already past; steps [To-1 : To-1+Ta] are executed, the rest is dropped.
Only the last To observations before the next chunk are ever looked at (`will_be_seen`), so a simulator needs
to render no others.

Which action is due is the action queue's to say, here as on a real arm: what was evaluated is what runs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from action_diffusion.errors import InputError
from action_diffusion.policy.action_queue import ActionQueue
from action_diffusion.policy.history import History


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
        if n_action_steps < 1:
            raise InputError(f"n_action_steps is {n_action_steps}; it must be at least 1")
        self.n_obs_steps, self.n_action_steps = n_obs_steps, n_action_steps
        self._history = History(n_obs_steps)
        self._queue = ActionQueue("sync", n_obs_steps=n_obs_steps, execution_horizon=n_action_steps)

    def reset(self) -> None:
        """Forget everything: a new episode begins."""
        self._history.reset()
        self._queue.reset()

    def observe(self, observation: Mapping[str, np.ndarray]) -> None:
        """Add the newest observation: arrays of any shape by key, the same keys and shapes throughout."""
        self._history.observe(observation)

    def history(self) -> dict[str, np.ndarray]:
        """The last To observations by key, [To, ...]; a younger episode repeats its first one in front."""
        return self._history.stacked()

    @property
    def needs_chunk(self) -> bool:
        """Whether every step of the current chunk that should be executed has been."""
        return self._queue.wants_chunk

    @property
    def will_be_seen(self) -> bool:
        """Whether the observation due next is in the history of the next chunk.

        Asked before the first `observe`, or after `act`.
        """
        return self._queue.will_be_seen

    def accept(self, chunk: np.ndarray) -> None:
        """Take a predicted chunk [H, A] in the data's units; it replaces what is left of the one before."""
        chunk, end = np.asarray(chunk), self.n_obs_steps - 1 + self.n_action_steps
        self._queue.request()
        self._queue.receive(chunk[:end] if chunk.ndim == 2 else chunk)

    def act(self) -> np.ndarray:
        """The next action [A] to execute, in the data's units."""
        command = None if self._queue.wants_chunk else self._queue.command()
        if command is None:
            raise RuntimeError("act() without a chunk: call accept() whenever needs_chunk is true")
        self._queue.begin_step(self._queue.step + 1)
        return command
