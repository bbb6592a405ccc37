"""Many episodes with one batched policy call, where no episode's result depends on the others.

Contact amplifies a difference of 1e-7 in an action into another outcome, and matrix products give other last
bits for other batch sizes and for other rows. So every policy call has exactly `policy_batch` rows, a start
always sits in the row `seed % policy_batch`, and it draws its noise from two generators of its own:

    seeds 100000 .. 100049, policy_batch = 4, n_envs = 3

    call 1   row 0: 100000   row 1: 100001   row 2: 100002   row 3: padding
    call 2   row 0: 100000   row 1: 100001   row 2: padding  row 3: 100003      (100002 is over)

A score is then a function of policy, seed and `policy_batch`: the same whatever `n_envs` is, wherever simulators are,
and whichever other starts are evaluated. A simulator that finishes an episode takes the next one. Nobody waits for the
slowest: a call is made when its rows are full, when no simulator is at work, or when an episode has waited for as long
as a call takes. An episode whose simulator is lost begins again, in any simulator.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from action_diffusion.envs.base import Env
from action_diffusion.envs.running import Episode, Running, Spec, generators
from action_diffusion.envs.workers import Lost, Simulators, Workers, open_simulators
from action_diffusion.errors import InputError

ProgressCallback = Callable[[float, Sequence[float]], None]
"""Called after every answer of simulators with the share of the work that is done, in [0, 1], and the scores so far."""

LostCallback = Callable[[int, str], None]
"""Called with the seed of an episode whose simulator was lost, and why."""


class Policy(Protocol):
    """What is evaluated: a loaded bundle, or anything else that predicts chunks."""

    @property
    def spec(self) -> Spec: ...

    def predict(
        self,
        obs: Mapping[str, np.ndarray],
        *,
        noise_generator: list[Any],
        generator: list[Any],
    ) -> Mapping[str, np.ndarray]:
        """From histories {key: [B, To, ...]} to at least {"action_pred": [B, H, A]} in the data's units.

        Both are of `policy.noise`, one a row: of torch wherever torch is loaded.
        """
        ...


def rollout(
    *,
    policy: Policy,
    make_env: Callable[[], Env],
    seeds: Sequence[int],
    keys: Sequence[str],
    n_envs: int = 10,
    policy_batch: int = 10,
    workers: Workers = None,
    progress: ProgressCallback | None = None,
    on_lost: LostCallback | None = None,
) -> list[Episode]:
    """Run one episode from every start in `seeds`, and return them in that order.

    Args:
        keys: the observations that the policy wants; they are only built where it looks at them.
        n_envs: simulators held at once. It changes the speed, never a score.
        policy_batch: rows of every policy call. It is part of what a score depends on.
        workers: where the simulators are (`workers.Workers`): None, in this process; else `make_env` must be picklable.

    Raises:
        InputError: for numbers below 1 or negative seeds, for Ray that is missing or cannot be reached, and, naming the
            seed, for actions that are NaN, infinite, or of another shape than the simulator takes.
    """
    _check_numbers(seeds, n_envs, policy_batch)
    simulators = open_simulators(make_env, min(n_envs, len(seeds)), workers)
    try:
        return _Rollout(policy, seeds, keys, policy_batch, simulators, progress, on_lost).run()
    finally:
        simulators.close()


class _Rollout:
    """Which episode is in which simulator, and which of them wait for a chunk."""

    def __init__(
        self,
        policy: Policy,
        seeds: Sequence[int],
        keys: Sequence[str],
        policy_batch: int,
        simulators: Simulators,
        progress: ProgressCallback | None,
        on_lost: LostCallback | None,
    ) -> None:
        self.policy, self.seeds, self.keys, self.policy_batch = policy, seeds, list(keys), policy_batch
        self.simulators, self.progress, self.on_lost = simulators, progress, on_lost
        self.waiting = list(range(len(seeds)))
        self.lost: dict[int, Running] = {}  # of those that wait, what was begun before
        self.running: dict[int, Running] = {}  # by simulator
        self.ready: dict[int, float] = {}  # simulators whose episodes wait for a chunk, and since when: the first first
        self.finished: dict[int, Episode] = {}
        self.call_seconds = self.share = 0.0

    def run(self) -> list[Episode]:
        while len(self.finished) < len(self.seeds):
            self._begin()
            if call := self._call():
                self._predict(call)
            for simulator, answer in self.simulators.answers(self._patience()):
                self._take(simulator, answer)
            if self.progress is not None:
                under_way = sum(len(run.rewards) / run.max_steps for run in self.running.values())
                self.share = max(self.share, (len(self.finished) + under_way) / len(self.seeds))  # lost ones begin anew
                self.progress(self.share, [self.finished[index].score for index in sorted(self.finished)])
        return [self.finished[index] for index in range(len(self.seeds))]

    def _begin(self) -> None:
        """Give each simulator that is there and has no episode the next one."""
        for simulator in sorted(self.simulators.available - self.running.keys())[: len(self.waiting)]:
            index = _next_episode(self.waiting, self.seeds, self.running.values(), self.policy_batch)
            self.waiting.remove(index)
            fresh = Running(index=index, seed=self.seeds[index], spec=self.policy.spec)
            run = self.running[simulator] = self.lost.pop(index, fresh)
            self.simulators.give(simulator, run.begin(self.keys), alone=run.suspect)

    def _call(self) -> dict[int, int]:
        """Row → simulator of the policy call to make now; {} where it is better to wait for others."""
        call: dict[int, int] = {}
        for simulator in self.ready:
            call.setdefault(self.running[simulator].seed % self.policy_batch, simulator)
        full = len(call) == self.policy_batch or not self.simulators.at_work
        return call if full or self._patience() == 0 else {}

    def _predict(self, call: Mapping[int, int]) -> None:
        began = time.perf_counter()
        _predict(self.policy, {row: self.running[simulator] for row, simulator in call.items()}, self.policy_batch)
        self.call_seconds = time.perf_counter() - began
        for simulator in call.values():
            del self.ready[simulator]
            run = self.running[simulator]
            self.simulators.give(simulator, run.chunk(self.keys), alone=run.suspect)

    def _patience(self) -> float:
        """How long to wait for simulators before the policy is called with what there is."""
        if not self.ready:
            return math.inf
        return max(0.0, min(self.ready.values()) + self.call_seconds - time.perf_counter())

    def _take(self, simulator: int, answer: Any) -> None:
        run = self.running.get(simulator)
        if run is None:  # it is lost that held an episode which is over
            return
        if isinstance(answer, Lost):
            run.lose(answer)
            self.ready.pop(simulator, None)
            if answer.fault and self.on_lost is not None:
                self.on_lost(run.seed, answer.reason)
            if run.given_up:
                warnings.warn(f"seed {run.seed}: {run.given_up}", stacklevel=4)
            else:
                self.waiting.append(run.index)
                self.lost[run.index] = run
                del self.running[simulator]
        else:
            run.take(answer)
            if not run.done:
                self.ready[simulator] = time.perf_counter()
        if run.done:
            self.finished[run.index] = run.episode()
            del self.running[simulator]


def replay(*, env: Env, episode: Episode, size: int = 256, every: int = 1) -> Iterator[np.ndarray]:
    """Execute an episode's recorded actions again, and yield pictures: the start, then one after `every` steps.

    Simulators are deterministic, so this shows what happened without asking the policy again, and only
    episodes that someone wants to see are rendered, one picture in memory at a time.

    Yields:
        uint8 [size, size, 3]; `episode.n_steps // every + 1` of them.

    Raises:
        RuntimeError: when the simulator gives another reward than it gave before (beyond 1e-6).
    """
    env.reset(episode.seed)
    yield env.render(size)
    for step, (action, expected) in enumerate(zip(episode.actions, episode.rewards, strict=True)):
        reward, _ = env.step(action)
        if abs(reward - expected) > 1e-6:
            raise RuntimeError(
                f"the simulator is not deterministic: seed {episode.seed} gave reward {expected} "
                f"at step {step}, and {reward} when its actions were replayed"
            )
        if (step + 1) % every == 0:
            yield env.render(size)


def _check_numbers(seeds: Sequence[int], n_envs: int, policy_batch: int) -> None:
    for name, value in (("n_envs", n_envs), ("policy_batch", policy_batch), ("n_episodes", len(seeds))):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    if min(seeds) < 0:
        raise InputError(f"seed {min(seeds)} is negative; seeds start at 0")


def _next_episode(waiting: Sequence[int], seeds: Sequence[int], running: Collection[Running], policy_batch: int) -> int:
    """The first waiting episode whose row the fewest running episodes share: two of a row need two calls."""
    shared = Counter(run.seed % policy_batch for run in running)
    return min(waiting, key=lambda index: (shared[seeds[index] % policy_batch], index))


def _predict(policy: Policy, call: Mapping[int, Running], policy_batch: int) -> None:
    """Give every episode of one call its chunk. Free rows repeat an observation; what they get is dropped."""
    histories = {row: run.agent.history() for row, run in call.items()}
    padding = next(iter(histories.values()))
    rows = [histories.get(row, padding) for row in range(policy_batch)]
    pairs = [
        (call[row].noise_generator, call[row].generator) if row in call else generators(row)
        for row in range(policy_batch)
    ]
    obs = {key: np.stack([row[key] for row in rows]) for key in padding}
    predicted = policy.predict(
        obs, noise_generator=[noise for noise, _ in pairs], generator=[steps for _, steps in pairs]
    )
    for row, run in call.items():
        run.accept(np.asarray(predicted["action_pred"][row]))


__all__ = ["Episode", "LostCallback", "Policy", "ProgressCallback", "generators", "replay", "rollout"]
