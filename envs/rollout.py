"""Many episodes with one batched policy call, where no episode's result depends on the others.

Contact amplifies a difference of 1e-7 in an action into another outcome, and matrix products give other last
bits for other batch sizes and for other rows. So every policy call has exactly `policy_batch` rows, a start
always sits in the row `seed % policy_batch`, and it draws its noise from two generators of its own:

    seeds 100000 .. 100049, policy_batch = 4, n_envs = 3

    call 1   row 0: 100000   row 1: 100001   row 2: 100002   row 3: padding
    call 2   row 0: 100000   row 1: 100001   row 2: padding  row 3: 100003      (100002 is over)

A score is then a function of policy, seed and `policy_batch`: the same whatever `n_envs` is, and whichever
other starts are evaluated. Simulators take turns of one chunk: all waiting episodes go into as few calls as
their rows allow, then all execute their chunks, each in its `workers.EnvWorker`. One that finishes takes the next
episode. An episode whose simulator is lost is begun again, and given up after `ATTEMPTS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from action_diffusion.envs.base import Env
from action_diffusion.envs.running import Episode, Running, Spec, generators
from action_diffusion.envs.workers import EnvWorker, InlineWorker, Lost, ProcessWorker
from action_diffusion.errors import InputError

ProgressCallback = Callable[[float, Sequence[float]], None]
"""Called after every turn with the share of the work that is done, in [0, 1], and the scores so far."""

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
    in_processes: bool = False,
    progress: ProgressCallback | None = None,
    on_lost: LostCallback | None = None,
) -> list[Episode]:
    """Run one episode from every start in `seeds`, and return them in that order.

    Args:
        keys: the observations that the policy wants; they are only built where it looks at them.
        n_envs: simulators held at once. It changes the speed, never a score.
        policy_batch: rows of every policy call. It is part of what a score depends on.
        in_processes: each simulator in a process of its own; `make_env` must be picklable then.

    Raises:
        InputError: for numbers below 1 or negative seeds, and, naming the seed, for actions that are NaN,
            infinite, or of another shape than the simulator takes.
    """
    _check_numbers(seeds, n_envs, policy_batch)
    waiting = list(range(len(seeds)))
    finished: dict[int, Episode] = {}
    workers: list[EnvWorker] = []
    try:
        for _ in range(min(n_envs, len(seeds))):
            workers.append(ProcessWorker(make_env) if in_processes else InlineWorker(make_env))
        running: list[Running] = []
        while len(finished) < len(seeds):
            idle = [worker for worker in workers if all(run.worker is not worker for run in running)]
            for worker in idle[: len(waiting)]:
                index = _next_episode(waiting, seeds, running, policy_batch)
                waiting.remove(index)
                running.append(Running(worker=worker, index=index, seed=seeds[index], spec=policy.spec))
            _turn(policy, running, keys, policy_batch, on_lost)
            finished |= {run.index: run.episode() for run in running if run.done}
            running = [run for run in running if not run.done]
            if progress is not None:
                share = len(finished) + sum(len(run.rewards) / run.max_steps for run in running)
                progress(share / len(seeds), [finished[index].score for index in sorted(finished)])
    finally:
        for worker in workers:
            worker.close()
    return [finished[index] for index in range(len(seeds))]


def _turn(
    policy: Policy,
    running: Sequence[Running],
    keys: Sequence[str],
    policy_batch: int,
    on_lost: LostCallback | None,
) -> None:
    """Begin what has not begun, then let every episode execute one chunk."""

    def answers(runs: Sequence[Running], take: Callable[[Running], None]) -> None:
        for run in runs:
            try:
                take(run)
            except Lost as lost:
                run.begin_again()
                if on_lost is not None:
                    on_lost(run.seed, str(lost))

    fresh = [run for run in running if not run.begun]
    for run in fresh:
        run.worker.begin(run.seed, keys)
    answers(fresh, Running.take_start)
    ready = [run for run in running if run.begun]
    for call in _pack(ready, policy_batch):
        _predict(policy, call, policy_batch)
    for run in ready:
        run.send_chunk(keys)
    answers(ready, Running.take_outcome)


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


def _next_episode(waiting: Sequence[int], seeds: Sequence[int], running: Sequence[Running], policy_batch: int) -> int:
    """The first waiting episode whose row the fewest running episodes share: two of a row need two calls."""
    shared = Counter(run.seed % policy_batch for run in running)
    return min(waiting, key=lambda index: (shared[seeds[index] % policy_batch], index))


def _pack(running: Sequence[Running], policy_batch: int) -> list[dict[int, Running]]:
    """Spread episodes over as few calls as their rows allow: for each call, who sits in which row."""
    calls: list[dict[int, Running]] = []
    for run in running:
        row = run.seed % policy_batch
        call = next((call for call in calls if row not in call), None)
        if call is None:
            call = {}
            calls.append(call)
        call[row] = run
    return calls


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
