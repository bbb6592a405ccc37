"""Questions of many clients that are answered together.

    a ──question──▶┐
    b ──question──▶├─ waiting ── at most `most`, of one kind ──▶ one call of the policy ──▶ an answer for each
    c ──question──▶┘

Together are those that came while the policy was busy, and those of the next `wait` seconds. Nobody waits for a client
that cannot ask: one that is alone is answered at once, and so are all once each has asked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from action_diffusion.deploy.serve.answering import Outcome, Policy, answers, kind
from action_diffusion.deploy.serve.session import Question

Result = TypeVar("Result")


class Turns:
    """The threads in which policies compute. Whoever has a turn has one of them, number 0 to n - 1, to itself.

    Made, like all here, for one event loop.
    """

    def __init__(self, n: int = 1) -> None:
        self.n = n
        self._threads = ThreadPoolExecutor(max_workers=n, thread_name_prefix="policy")
        self._free: asyncio.PriorityQueue[int] = asyncio.PriorityQueue()  # those who wait are first come, first served
        self._began: dict[int, float] = {}
        for number in range(n):
            self._free.put_nowait(number)

    @property
    def n_free(self) -> int:
        return self._free.qsize()

    async def get(self) -> int:
        """The number of a thread that is free, once there is one."""
        return await self._free.get()

    def give_back(self, number: int) -> None:
        self._free.put_nowait(number)

    async def compute(self, number: int, work: Callable[..., Result], *given: Any) -> Result:
        """By whoever has this turn."""
        self._began[number] = time.monotonic()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *given)
        finally:
            del self._began[number]

    async def alone(self, work: Callable[..., Result], *given: Any) -> Result:
        """With all turns: what runs then may change what other threads depend on, as captures of CUDA graphs do."""
        numbers = [await self.get() for _ in range(self.n)]
        try:
            return await self.compute(numbers[0], work, *given)
        finally:
            for number in numbers:
                self.give_back(number)

    @property
    def busy_seconds(self) -> float:
        """How long the oldest work that is under way has taken so far."""
        now = time.monotonic()
        return max((now - began for began in self._began.values()), default=0.0)

    def close(self) -> None:
        self._threads.shutdown()


class Gone(Exception):
    """The client left before its turn."""


class Computed(NamedTuple):
    """An answer, or why there is none; when the policy began, and the seconds that it took."""

    outcome: Outcome
    began: float
    seconds: float


@dataclass(eq=False)
class _Waiting:
    question: Question
    gone: Callable[[], bool]
    came: float = field(default_factory=time.perf_counter)
    computed: asyncio.Future[Computed] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """Answers what is asked of one policy.

    Args:
        policies: the policy, and as many copies of it as there are turns. They may be replaced at any time by others
            that take and give the same.
        most: questions that are answered together (>= 1).
        wait: seconds that the first of them waits for others (>= 0).
        n_clients: how many there are that could ask.
        computed: is told of every call of the policy, its seconds and rows.
    """

    def __init__(
        self,
        policies: Sequence[Policy],
        turns: Turns,
        *,
        most: int,
        wait: float,
        n_clients: Callable[[], int],
        computed: Callable[[float, int], None],
    ) -> None:
        self.policies = policies
        self._turns, self._most, self._wait = turns, most, wait
        self._n_clients, self._computed = n_clients, computed
        self._waiting: list[_Waiting] = []
        self._came = asyncio.Event()
        self._choosing = asyncio.Lock()
        self._n_computed = 0

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    async def ask(self, question: Question, gone: Callable[[], bool]) -> Computed:
        """Raises `Gone` where the client is `gone` before its turn: nothing is computed for it then."""
        waiting = _Waiting(question, gone)
        self._waiting.append(waiting)
        self._came.set()
        return await waiting.computed

    async def run(self) -> None:
        """Answer until cancelled, in all threads that there are turns for."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._turns.n):
                group.create_task(self._answer())

    async def _answer(self) -> None:
        while True:
            async with self._choosing:
                while not self._waiting:
                    self._came.clear()
                    await self._came.wait()
                await self._gather()
                number = await self._turns.get()
                batch = self._next()
            try:
                if batch:
                    await self._compute(number, batch)
            finally:
                self._turns.give_back(number)

    async def _compute(self, number: int, batch: Sequence[_Waiting]) -> None:
        self._n_computed += len(batch)
        try:
            began, seconds, outcomes = await self._turns.compute(
                number, _timed, self.policies[number], [one.question for one in batch]
            )
        finally:
            self._n_computed -= len(batch)
        self._computed(seconds, len(batch))
        for one, outcome in zip(batch, outcomes, strict=True):
            if not one.computed.done():  # it is there still
                one.computed.set_result(Computed(outcome, began, seconds))

    async def _gather(self) -> None:
        """Wait for others, as long as there are some that may still ask."""
        end = self._waiting[0].came + self._wait
        while len(self._waiting) < min(self._most, self._n_clients() - self._n_computed):
            self._came.clear()
            try:
                await asyncio.wait_for(self._came.wait(), end - time.perf_counter())
            except TimeoutError:
                return

    def _next(self) -> list[_Waiting]:
        """The first that waits, with those of its kind; the others, in their order, wait on, some of them for the
        turns that are free beside this one."""
        for one in self._waiting:
            if one.gone() and not one.computed.done():
                one.computed.set_exception(Gone())
        there = [one for one in self._waiting if not one.computed.done()]
        kinds = [kind(self.policies[0], one.question) for one in there]
        alike = [one for one, its in zip(there, kinds, strict=True) if its == kinds[0]]
        share = -(-len(alike) // (1 + self._turns.n_free))
        batch = alike[: min(self._most, share)]
        self._waiting = [one for one in there if one not in batch]
        return batch


def _timed(policy: Policy, questions: Sequence[Question]) -> tuple[float, float, list[Outcome]]:
    """When it began, the seconds that it took, and `answers`."""
    began = time.perf_counter()
    outcomes = answers(policy, questions)
    return began, time.perf_counter() - began, outcomes
