"""Simulators that a rollout drives a chunk at a time: in this process, or in one of their own.

    rollout                       worker                          simulator
    begin(seed)      ──────────▶                ──────────▶     reset, observe
    execute(plan)    ──────────▶                ──────────▶     step × Ta, observing only what will be seen
    answer()         ◀──────────                ◀──────────     rewards, observations, done

Orders are given to all workers before the first answer is waited for, so that simulators in processes of their own work
at the same time. One that dies, or gives no answer in time, takes nothing else with it: it is ended, a new one is
started, and `Lost` says why.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

import numpy as np

from action_diffusion.envs.base import Env
from action_diffusion.errors import InputError

Plan = Sequence[tuple[np.ndarray, bool]]
"""Actions [A] to execute, each with whether what is observed after it will be looked at."""
BEGIN_SECONDS, EXECUTE_SECONDS = 300.0, 120.0
"""How long a simulator may take to start and reset, and to execute a chunk, before it counts as hung."""
NOT_STARTED = (
    "a process for a simulator could not start, as it says above; "
    'a script that uses several must do its work under `if __name__ == "__main__":`'
)


class Start(NamedTuple):
    """The first observation of an episode, and what a rollout must know of the simulator."""

    observation: dict[str, np.ndarray]
    max_steps: int
    action_shape: tuple[int, ...]


class Executed(NamedTuple):
    """Of an executed plan: the reward of every step, the observations that will be seen, and whether it is over."""

    rewards: list[float]
    observations: list[dict[str, np.ndarray]]
    done: bool


class Lost(Exception):
    """The simulator died or hung; a new one has been started in its place."""


class EnvWorker(Protocol):
    """One order at a time, then its answer, which raises `Lost` where the simulator was lost."""

    def begin(self, seed: int, keys: Sequence[str]) -> None: ...

    def execute(self, plan: Plan, keys: Sequence[str], max_steps: int) -> None: ...

    def answer(self) -> Start | Executed: ...

    def close(self) -> None: ...


class InlineWorker:
    """A simulator in this process: it works when it is asked for its answer."""

    def __init__(self, make_env: Callable[[], Env]) -> None:
        self._env = make_env()
        self._work: Callable[[], Start | Executed] | None = None

    def begin(self, seed: int, keys: Sequence[str]) -> None:
        self._work = lambda: _begin(self._env, seed, keys)

    def execute(self, plan: Plan, keys: Sequence[str], max_steps: int) -> None:
        self._work = lambda: _execute(self._env, plan, keys, max_steps)

    def answer(self) -> Start | Executed:
        assert self._work is not None
        return self._work()

    def close(self) -> None:
        self._env.close()


class ProcessWorker:
    """A simulator in a process of its own. `make_env` must be picklable (`functools.partial(envs.make, "lift")`)."""

    def __init__(
        self,
        make_env: Callable[[], Env],
        *,
        begin_seconds: float = BEGIN_SECONDS,
        execute_seconds: float = EXECUTE_SECONDS,
    ) -> None:
        self._make_env = make_env
        self._seconds = {"begin": begin_seconds, "execute": execute_seconds}
        self._begun = False
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # OpenGL and torch's threads do not survive a fork
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._make_env), daemon=True)
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # one core each
        try:
            self._process.start()
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        theirs.close()

    def begin(self, seed: int, keys: Sequence[str]) -> None:
        self._send("begin", (seed, keys))

    def execute(self, plan: Plan, keys: Sequence[str], max_steps: int) -> None:
        self._send("execute", (plan, keys, max_steps))

    def _send(self, order: str, arguments: tuple[Any, ...]) -> None:
        self._order = order
        with contextlib.suppress(OSError):  # it is gone, as the answer will say
            self._pipe.send((order, arguments))

    def answer(self) -> Start | Executed:
        seconds = self._seconds[self._order]
        try:
            if not self._pipe.poll(seconds):
                raise self._lost(f"the simulator gave no answer for {seconds:g} s")
            failed, value = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(10)
            if not self._begun and self._process.exitcode == 1:
                raise InputError(NOT_STARTED) from None
            raise self._lost(f"the simulator's process ended with exit code {self._process.exitcode}") from None
        self._begun = True
        if isinstance(failed, str):
            raise InputError(failed)
        if failed:
            raise self._lost(str(value))
        answer: Start | Executed = value
        return answer

    def _lost(self, reason: str) -> Lost:
        self.close()
        self._start()
        return Lost(reason)

    def close(self) -> None:
        self._pipe.close()
        self._process.join(0.5)  # without its pipe it ends by itself
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _begin(env: Env, seed: int, keys: Sequence[str]) -> Start:
    env.reset(seed)
    return Start(env.observe(keys), env.max_steps, env.action_shape)


def _execute(env: Env, plan: Plan, keys: Sequence[str], max_steps: int) -> Executed:
    """At most `max_steps` steps of the plan, until the episode is over."""
    rewards: list[float] = []
    observations = []
    done = False
    for action, will_be_seen in plan:
        reward, over = env.step(action)
        rewards.append(float(reward))
        done = over or len(rewards) >= max_steps
        if done:
            break
        if will_be_seen:
            observations.append(env.observe(keys))
    return Executed(rewards, observations, done)


def _serve(pipe: Connection, make_env: Callable[[], Env]) -> None:
    """The other process: orders in, answers out, until the pipe is closed."""
    work: dict[str, Callable[..., Any]] = {"begin": _begin, "execute": _execute}
    env: Env | None = None
    try:
        while True:
            order, arguments = pipe.recv()
            try:
                env = env or make_env()
                pipe.send((False, work[order](env, *arguments)))
            except InputError as error:
                pipe.send((str(error), None))
            except Exception as error:  # whatever a simulator raises, the evaluation goes on without it
                pipe.send((True, f"the simulator failed: {type(error).__name__}: {error}"))
    except (EOFError, OSError, KeyboardInterrupt):
        pass
    finally:
        if env is not None:
            env.close()
