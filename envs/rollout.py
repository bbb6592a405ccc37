"""Many episodes with one batched policy call, where no episode's result depends on the others.

Contact amplifies a difference of 1e-7 in an action into another outcome, and matrix products give other last
bits for other batch sizes and for other rows. So every policy call has exactly `policy_batch` rows, a start
always sits in the row `seed % policy_batch`, and it draws its noise from two generators of its own:

    seeds 100000 .. 100049, policy_batch = 4, n_envs = 3

    call 1   row 0: 100000   row 1: 100001   row 2: 100002   row 3: padding
    call 2   row 0: 100000   row 1: 100001   row 2: padding  row 3: 100003      (100002 is over)

A score is then a function of policy, seed and `policy_batch`: the same whatever `n_envs` is, and whichever
other starts are evaluated. Simulators run in this process, in turns of one chunk: all waiting episodes go
into as few calls as their rows allow, then each executes its chunk. An environment that finishes takes the
next episode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from action_diffusion.envs.base import Env
from action_diffusion.errors import InputError
from action_diffusion.policy.agent import Agent

ProgressCallback = Callable[[float, Sequence[float]], None]
"""Called after every turn with the share of the work that is done, in [0, 1], and the scores so far."""


class Spec(Protocol):
    """The part of a policy's specification that control needs."""

    @property
    def n_obs_steps(self) -> int: ...
    @property
    def n_action_steps(self) -> int: ...


class Policy(Protocol):
    """What is evaluated: a loaded bundle, or anything else that predicts chunks."""

    @property
    def spec(self) -> Spec: ...

    def predict(
        self,
        obs: Mapping[str, np.ndarray],
        *,
        noise_generator: list[torch.Generator],
        generator: list[torch.Generator],
    ) -> Mapping[str, np.ndarray]:
        """From histories {key: [B, To, ...]} to at least {"action_pred": [B, H, A]} in the data's units."""
        ...


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One finished episode of T steps.

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


def rollout(
    *,
    policy: Policy,
    make_env: Callable[[], Env],
    seeds: Sequence[int],
    keys: Sequence[str],
    n_envs: int = 10,
    policy_batch: int = 10,
    progress: ProgressCallback | None = None,
) -> list[Episode]:
    """Run one episode from every start in `seeds`, and return them in that order.

    Args:
        keys: the observations that the policy wants; they are only built where it looks at them.
        n_envs: simulators held at once. It changes the speed, never a score.
        policy_batch: rows of every policy call. It is part of what a score depends on.

    Raises:
        InputError: for numbers below 1 or negative seeds, and, naming the seed, for actions that are NaN,
            infinite, or of another shape than the simulator takes.
    """
    _check_numbers(seeds, n_envs, policy_batch)
    waiting = list(range(len(seeds)))
    finished: dict[int, Episode] = {}
    envs = [make_env() for _ in range(min(n_envs, len(seeds)))]
    try:
        running: list[_Running] = []
        while len(finished) < len(seeds):
            idle = [env for env in envs if all(run.env is not env for run in running)]
            for env in idle[: len(waiting)]:
                index = _next_episode(waiting, seeds, running, policy_batch)
                waiting.remove(index)
                running.append(_begin(env, index, seeds[index], keys, policy.spec))
            for call in _pack(running, policy_batch):
                _predict(policy, call, policy_batch)
            for run in running:
                run.execute_chunk(keys)
            finished |= {run.index: run.episode() for run in running if run.done}
            running = [run for run in running if not run.done]
            if progress is not None:
                share = len(finished) + sum(len(run.rewards) / run.env.max_steps for run in running)
                progress(share / len(seeds), [finished[index].score for index in sorted(finished)])
    finally:
        for env in envs:
            env.close()
    return [finished[index] for index in range(len(seeds))]


def replay(*, env: Env, episode: Episode, size: int = 256) -> Iterator[np.ndarray]:
    """Execute an episode's recorded actions again, and yield pictures: the start, then one after every step.

    Simulators are deterministic, so this shows what happened without asking the policy again, and only
    episodes that someone wants to see are rendered, one picture in memory at a time.

    Yields:
        uint8 [size, size, 3]; `episode.n_steps + 1` of them.

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
        yield env.render(size)


def generators(*seed: int) -> tuple[torch.Generator, torch.Generator]:
    """Two independent CPU generators for one row: for the initial noise, and for the noise of the steps."""
    states = np.random.SeedSequence(seed).generate_state(2, np.uint64)
    noise, steps = (torch.Generator().manual_seed(int(state)) for state in states)
    return noise, steps


@dataclass(kw_only=True)
class _Running:
    """One episode that is under way."""

    env: Env
    index: int
    seed: int
    agent: Agent
    noise_generator: torch.Generator
    generator: torch.Generator
    rewards: list[float] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    done: bool = False

    def accept(self, chunk: np.ndarray) -> None:
        try:
            self.agent.accept(chunk)
        except InputError as error:
            raise InputError(f"seed {self.seed}, episode step {len(self.rewards)}: {error}") from None
        if chunk.shape[1:] != self.env.action_shape:
            raise InputError(
                f"seed {self.seed}: the policy's actions have shape {list(chunk.shape[1:])}, "
                f"the simulator takes {list(self.env.action_shape)}"
            )

    def execute_chunk(self, keys: Sequence[str]) -> None:
        """Act until the agent needs another chunk or the episode ends."""
        while not (self.done or self.agent.needs_chunk):
            action = self.agent.act()
            reward, over = self.env.step(action)
            self.actions.append(action)
            self.rewards.append(float(reward))
            self.done = over or len(self.rewards) >= self.env.max_steps
            if not self.done and self.agent.will_be_seen:
                self.agent.observe(self.env.observe(keys))

    def episode(self) -> Episode:
        return Episode(
            seed=self.seed,
            score=max(self.rewards),
            rewards=np.asarray(self.rewards),
            actions=np.stack(self.actions),
        )


def _check_numbers(seeds: Sequence[int], n_envs: int, policy_batch: int) -> None:
    for name, value in (("n_envs", n_envs), ("policy_batch", policy_batch), ("n_episodes", len(seeds))):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    if min(seeds) < 0:
        raise InputError(f"seed {min(seeds)} is negative; seeds start at 0")


def _next_episode(waiting: Sequence[int], seeds: Sequence[int], running: Sequence[_Running], policy_batch: int) -> int:
    """The first waiting episode whose row the fewest running episodes share: two of a row need two calls."""
    shared = Counter(run.seed % policy_batch for run in running)
    return min(waiting, key=lambda index: (shared[seeds[index] % policy_batch], index))


def _begin(env: Env, index: int, seed: int, keys: Sequence[str], spec: Spec) -> _Running:
    agent = Agent(n_obs_steps=spec.n_obs_steps, n_action_steps=spec.n_action_steps)
    noise_generator, generator = generators(seed)
    env.reset(seed)
    agent.observe(env.observe(keys))
    return _Running(env=env, index=index, seed=seed, agent=agent, noise_generator=noise_generator, generator=generator)


def _pack(running: Sequence[_Running], policy_batch: int) -> list[dict[int, _Running]]:
    """Spread episodes over as few calls as their rows allow: for each call, who sits in which row."""
    calls: list[dict[int, _Running]] = []
    for run in running:
        row = run.seed % policy_batch
        call = next((call for call in calls if row not in call), None)
        if call is None:
            call = {}
            calls.append(call)
        call[row] = run
    return calls


def _predict(policy: Policy, call: Mapping[int, _Running], policy_batch: int) -> None:
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
