"""One episode in a worker's simulator, a chunk at a time: what a rollout and learning from reward both drive.

run.worker.begin(seed)      ─▶ take_start()
accept(chunk), send_chunk() ─▶ take_outcome()       until done
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from action_diffusion.envs.workers import EnvWorker, Executed, Start
from action_diffusion.errors import InputError
from action_diffusion.policy import noise
from action_diffusion.policy.agent import Agent

ATTEMPTS = 2
"""How often an episode is begun before it is given up."""


class Spec(Protocol):
    """The part of a policy's specification that control needs."""

    @property
    def n_obs_steps(self) -> int: ...
    @property
    def n_action_steps(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One finished episode of T steps; of 0 steps, with a score of 0, where its simulator was lost every time.

    Attributes:
        seed: the start.
        score: the maximum reward, in [0, 1].
        rewards: float64 [T].
        actions: what was executed, [T, A] in the data's units: `replay` shows the episode again from them.
    """

    seed: int
    score: float
    rewards: np.ndarray
    actions: np.ndarray

    @property
    def n_steps(self) -> int:
        return len(self.rewards)


def generators(*seed: int) -> tuple[Any, Any]:
    """Two independent CPU generators (`policy.noise`) for one row: for the initial noise, and for that of the steps."""
    first, steps = np.random.SeedSequence(seed).generate_state(2, np.uint64)
    return noise.generator(int(first)), noise.generator(int(steps))


class Running:
    """One episode that is under way."""

    def __init__(self, *, worker: EnvWorker, index: int, seed: int, spec: Spec) -> None:
        self.worker, self.index, self.seed, self._spec = worker, index, seed, spec
        self._attempts, self.done = 0, False
        self.max_steps = 1
        self.begin_again()

    def begin_again(self) -> None:
        """As at first, with the same noise; given up when that has been tried often enough."""
        self._attempts += 1
        self.begun, self.done = False, self._attempts > ATTEMPTS
        self.agent = Agent(n_obs_steps=self._spec.n_obs_steps, n_action_steps=self._spec.n_action_steps)
        self.noise_generator, self.generator = generators(self.seed)
        self.rewards: list[float] = []
        self.actions: list[np.ndarray] = []

    def take_start(self) -> None:
        start = self.worker.answer()
        assert isinstance(start, Start)
        self.max_steps, self.action_shape = start.max_steps, start.action_shape
        self.agent.observe(start.observation)
        self.begun = True

    def accept(self, chunk: np.ndarray) -> None:
        try:
            self.agent.accept(chunk)
        except InputError as error:
            raise InputError(f"seed {self.seed}, episode step {len(self.rewards)}: {error}") from None
        if chunk.shape[1:] != self.action_shape:
            raise InputError(
                f"seed {self.seed}: the policy's actions have shape {list(chunk.shape[1:])}, "
                f"the simulator takes {list(self.action_shape)}"
            )

    def send_chunk(self, keys: Sequence[str]) -> None:
        """Let the simulator act until the agent needs another chunk or the episode ends."""
        self._plan: list[tuple[np.ndarray, bool]] = []
        while not self.agent.needs_chunk:
            self._plan.append((self.agent.act(), self.agent.will_be_seen))
        self.worker.execute(self._plan, keys, self.max_steps - len(self.rewards))

    def take_outcome(self) -> None:
        outcome = self.worker.answer()
        assert isinstance(outcome, Executed)
        self.actions += [action for action, _ in self._plan[: len(outcome.rewards)]]
        self.rewards += outcome.rewards
        self.done = outcome.done
        for observation in outcome.observations:
            self.agent.observe(observation)

    def episode(self) -> Episode:
        return Episode(
            seed=self.seed,
            score=max(self.rewards, default=0.0),
            rewards=np.asarray(self.rewards),
            actions=np.asarray(self.actions),
        )
