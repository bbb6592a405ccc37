"""Trials: many simulators at once, a chunk at a time, from starts that never repeat.

obs of all simulators ──act──▶ chunks and what is remembered of them ──executed──▶ rewards
                                                 │
   rows of `Transitions` ◀── completed when the next condition of the same episode is known ──┘
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from action_diffusion.envs.base import Env
from action_diffusion.envs.running import Episode, Running, Spec
from action_diffusion.envs.workers import Lost, Workers, open_simulators
from action_diffusion.training.reward.transitions import Rows


class Acted(NamedTuple):
    """chunk: [B, H, A] in the data's units, finite. remembered: name → [B, …]; among them "condition" [B, C]."""

    chunk: np.ndarray
    remembered: Mapping[str, Tensor]


Act = Callable[[Mapping[str, np.ndarray]], Acted]
"""Histories, key → [B, To, …], to chunks."""


class Turn(NamedTuple):
    """Of one chunk in each simulator: finished rows, episodes that ended, and how many steps were executed."""

    rows: Rows
    episodes: list[Episode]
    steps: int


class Reward(NamedTuple):
    """What of the simulator's reward r in [0, 1] is learnt from, each step; at most 0, so that sooner is better.

    kind "success": −1 until r reaches 1. "dense": r − 1. "both": the mean of the two, which is the same as either where
    the simulator knows success only. gamma: discount of a control step, in (0, 1).
    """

    kind: str = "both"
    gamma: float = 0.99

    def of(self, rewards: Sequence[float], chunk_steps: int) -> tuple[float, float]:
        """Of executed steps: the discounted sum, in units of a whole chunk's, and γ^n, which is 0 after a success."""
        dense = np.asarray(rewards) - 1.0
        success = np.where(np.asarray(rewards) >= 1.0, 0.0, -1.0)
        given = {"success": success, "dense": dense, "both": (success + dense) / 2}[self.kind]
        total = float((given * self.gamma ** np.arange(len(given))).sum()) / chunk_steps
        return total, 0.0 if rewards and rewards[-1] >= 1.0 else self.gamma ** len(given)


class _Trial:
    """An episode that is under way, and the chunk in it whose next condition is not known yet."""

    def __init__(self, run: Running) -> None:
        self.run = run
        self.waiting: dict[str, Tensor] | None = None
        self.counted = 0


class Experience:
    """n_envs simulators that begin a new episode whenever one ends.

    All take turns, so that what is learnt does not depend on where the simulators are (`workers`, see `rollout`), nor
    on how fast; it does where one dies, as its episode begins again. seeds: of the starts, an endless supply. Raises
    `InputError` as `rollout` does.
    """

    def __init__(
        self,
        *,
        make_env: Callable[[], Env],
        spec: Spec,
        keys: Sequence[str],
        seeds: Iterable[int],
        n_envs: int,
        reward: Reward,
        workers: Workers = None,
        on_lost: Callable[[int, str], None] | None = None,
    ) -> None:
        self.spec, self.keys, self.reward, self.on_lost = spec, list(keys), reward, on_lost
        self._seeds = iter(seeds)
        self._trials = [self._new() for _ in range(n_envs)]
        self._simulators = open_simulators(make_env, n_envs, workers)

    def _new(self) -> _Trial:
        return _Trial(Running(index=0, seed=next(self._seeds), spec=self.spec))

    def turn(self, act: Act) -> Turn:
        """Let every simulator execute one chunk."""
        ready = self._ready()
        histories = [self._trials[simulator].run.agent.history() for simulator in ready]
        acted = act({key: np.stack([history[key] for history in histories]) for key in self.keys})
        rows: list[dict[str, Tensor]] = []
        for index, simulator in enumerate(ready):
            trial = self._trials[simulator]
            now = {name: value[index].detach() for name, value in acted.remembered.items()}
            place = {"simulator": simulator, "time": len(trial.run.rewards)}
            now |= {name: now["condition"].new_tensor(value) for name, value in place.items()}
            if trial.waiting is not None:
                rows.append({**trial.waiting, "next_condition": now["condition"]})
            trial.waiting, trial.counted = now, len(trial.run.rewards)
            trial.run.accept(acted.chunk[index])
            self._simulators.give(simulator, trial.run.chunk(self.keys), alone=trial.run.suspect)
        self._answers()
        steps, episodes = 0, []
        for index, trial in enumerate(self._trials):
            if trial.waiting is None:  # lost
                continue
            given = trial.run.rewards[trial.counted :]
            steps += len(given)
            reward, discount = self.reward.of(given, self.spec.n_action_steps)
            condition = trial.waiting["condition"]
            trial.waiting |= {"reward": condition.new_tensor(reward), "discount": condition.new_tensor(discount)}
            if trial.run.done:
                if discount == 0.0:  # what follows a success counts for nothing; what a time limit hides is left out
                    rows.append({**trial.waiting, "next_condition": condition})
                episodes.append(trial.run.episode())
                self._trials[index] = self._new()
        return Turn(_stacked(rows), episodes, steps)

    def _ready(self) -> list[int]:
        """Simulators whose episodes wait for a chunk, once there is one: all but those that are being started again."""
        if not any(trial.run.begun for trial in self._trials):
            self._simulators.wait()
        while True:
            for simulator in sorted(self._simulators.available):
                run = self._trials[simulator].run
                if not run.begun:
                    self._simulators.give(simulator, run.begin(self.keys), alone=run.suspect)
            self._answers()
            ready = [simulator for simulator, trial in enumerate(self._trials) if trial.run.begun]
            if ready:
                return ready
            self._simulators.answers()

    def _answers(self) -> None:
        """Take what comes until no simulator is at work."""
        while self._simulators.at_work:
            for simulator, answer in self._simulators.answers():
                trial = self._trials[simulator]
                if not isinstance(answer, Lost):
                    trial.run.take(answer)
                    continue
                trial.waiting = None
                trial.run.lose(answer)
                if answer.fault and self.on_lost is not None:
                    self.on_lost(trial.run.seed, answer.reason)
                if trial.run.given_up:  # another start
                    self._trials[simulator] = self._new()

    def close(self) -> None:
        """Release the simulators."""
        self._simulators.close()


def _stacked(rows: Sequence[Mapping[str, Tensor]]) -> Rows:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}
