"""One episode in a simulator, a chunk at a time: what a rollout and learning from reward both drive.

begin()                ─ order ─▶ simulator ─ answer ─▶ take()
accept(chunk), chunk() ─ order ─▶ simulator ─ answer ─▶ take()       until done
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from action_diffusion.envs.workers import ATTEMPTS, Begin, Execute, Executed, Lost, Start
from action_diffusion.errors import InputError
from action_diffusion.policy import noise
from action_diffusion.policy.agent import Agent


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
    """One episode that is under way.

    suspect: a worker died while this was one of several things that it was to do. given_up: why, or "".
    """

    def __init__(self, *, index: int, seed: int, spec: Spec) -> None:
        self.index, self.seed, self._spec = index, seed, spec
        self._losses = Counter[int]()
        self.suspect, self.done, self.given_up = False, False, ""
        self.max_steps = 1
        self._begin_again()

    def _begin_again(self) -> None:
        """As at first, with the same noise."""
        self.begun = False
        self.agent = Agent(n_obs_steps=self._spec.n_obs_steps, n_action_steps=self._spec.n_action_steps)
        self.noise_generator, self.generator = generators(self.seed)
        self.rewards: list[float] = []
        self.actions: list[np.ndarray] = []

    def lose(self, lost: Lost) -> None:
        """Back to the start. Lost at the same step `ATTEMPTS` times, by nothing but itself, it is given up: `done`.

        A worker that something else kills is not counted against an episode, as it does not die at the same step.
        """
        place = len(self.rewards)
        self._losses[place] += lost.fault == 1
        self.suspect |= lost.fault > 0
        self._begin_again()
        if self._losses[place] >= ATTEMPTS:
            self.done = True
            self.given_up = f"its simulator was lost {ATTEMPTS} times at step {place} ({lost.reason}); it scores 0"

    def begin(self, keys: Sequence[str]) -> Begin:
        return Begin(self.seed, keys)

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

    def chunk(self, keys: Sequence[str]) -> Execute:
        """Let the simulator act until the agent needs another chunk or the episode ends."""
        self._plan: list[tuple[np.ndarray, bool]] = []
        while not self.agent.needs_chunk:
            self._plan.append((self.agent.act(), self.agent.will_be_seen))
        return Execute(self._plan, keys, self.max_steps - len(self.rewards))

    def take(self, answer: Start | Executed) -> None:
        """What came of the order."""
        if isinstance(answer, Start):
            self.max_steps, self.action_shape = answer.max_steps, answer.action_shape
            self.agent.observe(answer.observation)
            self.begun = True
            return
        self.actions += [action for action, _ in self._plan[: len(answer.rewards)]]
        self.rewards += answer.rewards
        self.done = answer.done
        for observation in answer.observations:
            self.agent.observe(observation)

    def episode(self) -> Episode:
        return Episode(
            seed=self.seed,
            score=max(self.rewards, default=0.0),
            rewards=np.asarray(self.rewards),
            actions=np.asarray(self.actions),
        )
