"""Which command each control step gets, while chunks take several control steps to compute.

Here steps are counted and nothing is timed, so that the same code schedules a robot's loop, its replay, and simulators
on a virtual clock. With an execution horizon s = 4, and chunks a, b, c that take d = 2 steps (b3: what b has for the
instant 3 steps after the observation that it was predicted from):

    control step      4    5    6    7    8    9   10   11   12   13   14   15
    sync             a2   a3   a4   a5    –    –   b2   b3   b4   b5    –    –    asks at 2, 8, 14; holds while it waits
    naive, rtc       a2   a3   a4   a5   b2   b3   b4   b5   c2   c3   c4   c5    ask at 2, 6, 10; go on while they wait
    ensemble         as naive, but every command is the mean of what all chunks so far have for its instant

In all of them a command is what some chunk meant for *this* instant: actions whose instant passed while their chunk was
computed are dropped, never executed late. naive takes whatever chunk arrives, which may begin elsewhere than the
running one goes on; rtc asks for one that continues it (`policy.rtc`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import numpy as np

from action_diffusion.errors import InputError, unknown

SCHEDULINGS = ("sync", "naive", "ensemble", "rtc")
MASKS = ("exponential", "linear", "ones", "hard")
"""How much less each step of a chunk has to agree with the running one, for rtc: `policy.rtc.weights`."""
BETA = 5.0
"""The published bound of rtc's guidance weight, for 5 denoising steps."""
ENSEMBLE_DECAY = 0.01
"""Chunk i, counted from the oldest, has the weight exp(−0.01 i): Zhao et al. 2023 (ACT)."""


class DelayEstimator:
    """Forecasts how many control steps the next chunk takes: a quantile of the last measurements.

    One slow chunk in ten is thus not waited for, and none is remembered for longer than the window. (The largest delay
    ever seen would freeze half of every chunk for ever, after one spike.)

    Args:
        window: measurements that count (>= 1).
        quantile: share of them that the forecast is to cover, in (0, 1].
        first: the forecast before anything has been measured (>= 0).
    """

    def __init__(self, *, window: int = 20, quantile: float = 0.9, first: int = 0) -> None:
        if window < 1 or not 0 < quantile <= 1 or first < 0:
            raise InputError(f"a delay estimator needs window={window} >= 1, 0 < quantile={quantile} <= 1, first >= 0")
        self._quantile = quantile
        self._first = first
        self._measured: deque[int] = deque(maxlen=window)

    def add(self, steps: int) -> None:
        """A chunk took `steps` control steps."""
        self._measured.append(steps)

    def forecast(self) -> int:
        """Control steps; one of the measured values."""
        if not self._measured:
            return self._first
        return int(np.quantile(self._measured, self._quantile, method="inverted_cdf"))


@dataclass(frozen=True, eq=False)
class Request:
    """A chunk that is asked for, from the observation of control step `step`.

    Attributes:
        running: what the running chunk has from this step on, [n, A] in the data's units, for the new one to continue;
            None where it need not, or where there is none.
        delay: the control steps that the chunk is expected to take.
        owned: which values of an action are a person's, bool [A], for the chunk to go with; None: none of them.
        person: what these are from this step on, [L, A] in the data's units; the others are not looked at.
    """

    step: int
    running: np.ndarray | None
    delay: int
    owned: np.ndarray | None = None
    person: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Swap:
    """A chunk took over: after how many control steps, and what it and its predecessor have for this instant, [A]."""

    delay: int
    new: np.ndarray
    running: np.ndarray | None

    @property
    def jump(self) -> float | None:
        """Distance between the two, in the data's units; None where the predecessor had ended, or there was none."""
        if self.running is None:
            return None
        with np.errstate(over="ignore", invalid="ignore"):  # of a chunk that the gate refuses
            return float(np.linalg.norm(self.new - self.running))


@dataclass(frozen=True, eq=False)
class _Chunk:
    """actions [L, A]: one for each step from `origin` on."""

    origin: int
    actions: np.ndarray

    @property
    def end(self) -> int:
        return self.origin + len(self.actions)


class ActionQueue:
    """Turns chunks that arrive late into at most one command a control step.

        queue.begin_step(step)
        if queue.wants_chunk:
            request = queue.request()       # predict from the observation of this step
        if …:                                   # the chunk that was asked for is there
            queue.receive(chunk)
        command = queue.command()           # None: hold

    Args:
        scheduling: one of `SCHEDULINGS`.
        n_obs_steps: To; step To-1 of a chunk is the instant of its observation.
        execution_horizon: s. sync executes s actions of a chunk and then asks for the next; the others ask when s
            steps have passed since the running chunk's observation, or when it arrives where that is later.
        delays: forecasts the delay, for rtc; by default `DelayEstimator()`.
    """

    def __init__(
        self,
        scheduling: str,
        *,
        n_obs_steps: int,
        execution_horizon: int,
        delays: DelayEstimator | None = None,
    ) -> None:
        if scheduling not in SCHEDULINGS:
            raise unknown("scheduling", scheduling, SCHEDULINGS)
        for name, value in (("n_obs_steps", n_obs_steps), ("execution_horizon", execution_horizon)):
            if value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1")
        self.scheduling = scheduling
        self.n_obs_steps = n_obs_steps
        self.execution_horizon = execution_horizon
        self.delays = delays or DelayEstimator()
        self.reset()

    def reset(self) -> None:
        """A new episode begins at step 0, without a chunk. The measured delays stay."""
        self._step = 0
        self._ask_at = 0
        self._chunks: list[_Chunk] = []
        self._pending: Request | None = None

    def begin_step(self, step: int) -> None:
        """It is control step `step`; those in between had no command. Steps only go forward."""
        if step < self._step:
            raise ValueError(f"control step {step} after {self._step}")
        self._step = step
        self._chunks = [chunk for chunk in self._chunks if chunk.end > step]

    @property
    def step(self) -> int:
        """The control step that it is."""
        return self._step

    @property
    def wants_chunk(self) -> bool:
        """Whether a chunk should be asked for at this step; never while one is under way."""
        return self._pending is None and (self._step >= self._ask_at or not self._chunks)

    @property
    def will_be_seen(self) -> bool:
        """Whether the observation of this step is, or may be, in the history of the next request."""
        if self._pending is not None or not self._chunks:
            return True
        return self._ask_at - self._step < self.n_obs_steps

    def request(self) -> Request:
        """Ask for a chunk, which `receive` or `drop` then answers."""
        if self._pending is not None:
            raise RuntimeError("request() while a chunk is under way: ask where wants_chunk is true")
        running = None
        if self.scheduling == "rtc" and self._chunks:
            newest = self._chunks[-1]
            running = newest.actions[self._step - newest.origin :]
        self._pending = Request(self._step, running, self.delays.forecast())
        return self._pending

    def drop(self) -> None:
        """What was asked for will not come: ask again."""
        self._pending = None

    def clear(self) -> None:
        """Nothing that is planned, or was asked for, is to be executed: hold, and ask again."""
        self._chunks, self._pending = [], None

    def rest(self) -> None:
        """This step has no command, and what is planned comes a step later. Call it after `begin_step`."""
        self._chunks = [replace(chunk, origin=chunk.origin + 1) for chunk in self._chunks]
        self._ask_at += 1
        if self._pending is not None:
            self._pending = replace(self._pending, step=self._pending.step + 1)

    def receive(self, chunk: np.ndarray) -> Swap | None:
        """The chunk that was asked for, [H, A] in the data's units, is there from this step on.

        Returns None where it came so late that it has nothing left. Raises `InputError` for a chunk that is too
        short, has other than two axes, or holds NaN or infinity; it then counts as dropped.
        """
        if self._pending is None:
            raise RuntimeError("receive() without a request")
        origin, self._pending = self._pending.step, None
        delay = self._step - origin
        self.delays.add(delay)
        new = _Chunk(origin, self._checked(chunk))
        if new.end <= self._step:
            return None
        # Whether actions of another length are commands is not for here to say; but the two cannot be compared.
        self._chunks = [chunk for chunk in self._chunks if chunk.actions.shape[1:] == new.actions.shape[1:]]
        running = self._planned(self._step)
        if self.scheduling != "ensemble":
            self._chunks.clear()
        self._chunks.append(new)
        since = self._step if self.scheduling == "sync" else origin
        self._ask_at = min(since + self.execution_horizon, new.end)
        planned = self._planned(self._step)
        assert planned is not None
        return Swap(delay, planned, running)

    def command(self) -> np.ndarray | None:
        """The command of this step, [A] in the data's units; None where there is none: hold the one before."""
        planned = self.plan(1)
        return planned[0] if len(planned) else None

    def plan(self, n: int) -> list[np.ndarray]:
        """The commands of this step and of up to n - 1 that follow, as they would be without a further chunk."""
        waits = self.scheduling == "sync" and self._pending is not None
        end = self._ask_at if self.scheduling == "sync" else self._step + n
        steps = range(self._step, self._step if waits else min(end, self._step + n))
        commands = (self._planned(step) for step in steps)
        return [command for command in commands if command is not None]

    def _planned(self, step: int) -> np.ndarray | None:
        """What the chunks have for that step, the older ones a little more."""
        chunks = [chunk for chunk in self._chunks if chunk.end > step]
        if not chunks:
            return None
        actions = np.stack([chunk.actions[step - chunk.origin] for chunk in chunks])
        if len(actions) == 1:
            result: np.ndarray | None = actions[0]
            return result
        weights = np.exp(-ENSEMBLE_DECAY * np.arange(len(actions)))
        return np.average(actions, axis=0, weights=weights)

    def _checked(self, chunk: np.ndarray) -> np.ndarray:
        chunk = np.array(chunk)
        now = self.n_obs_steps - 1
        if chunk.ndim != 2 or len(chunk) < now + self.execution_horizon:
            raise InputError(
                f"the chunk has shape {list(chunk.shape)}; {self.n_obs_steps} observation steps and an execution "
                f"horizon of {self.execution_horizon} need [H >= {now + self.execution_horizon}, A]"
            )
        bad = ~np.isfinite(chunk[now:]).all(axis=1)
        if bad.any():
            raise InputError(
                f"the chunk holds NaN or infinity at step {now + int(bad.argmax())}; "
                "a policy that has diverged cannot be executed"
            )
        return chunk[now:]


def check_room(scheduling: str, *, horizon: int, n_obs_steps: int, execution_horizon: int, delay: int) -> None:
    """Raises `InputError` where chunks of `horizon` steps would end before the next one arrives, after `delay`."""
    room = horizon - n_obs_steps + 1
    waits = execution_horizon if scheduling == "sync" else max(execution_horizon, delay)
    needed = delay + waits
    if needed > room:
        raise InputError(
            f"scheduling={scheduling} with delay={delay} uses {needed} steps of a chunk, {delay} of them while the "
            f"next is computed; horizon={horizon} leaves {room} from now on: train with a longer horizon, or set a "
            "shorter execution_horizon"
        )
