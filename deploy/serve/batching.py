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
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from action_diffusion.deploy.serve.answering import Outcome, answers, kind
from action_diffusion.deploy.serve.session import Question

if TYPE_CHECKING:
    from action_diffusion.policy.policy import DiffusionPolicy
    from action_diffusion.policy.runtime.onnx_policy import OnnxPolicy

Result = TypeVar("Result")


class Turns:
    """The one thread in which policies compute: those of a server, and what warms up a new one, take turns."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy")
        self._free = asyncio.Lock()  # first come, first served
        self._began: float | None = None

    async def __aenter__(self) -> Turns:
        await self._free.acquire()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._free.release()

    async def compute(self, work: Callable[..., Result], *given: Any) -> Result:
        """In the thread; for whoever has the turn."""
        self._began = time.monotonic()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, *given)
        finally:
            self._began = None

    async def take(self, work: Callable[..., Result], *given: Any) -> Result:
        """`compute`, once it is their turn."""
        async with self:
            return await self.compute(work, *given)

    @property
    def busy_seconds(self) -> float:
        """How long the work that is under way has taken so far."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def close(self) -> None:
        self._thread.shutdown()


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
    """Answers what is asked of one policy, which may be replaced at any time by another that takes and gives the same.

    Args:
        most: questions that are answered together (>= 1).
        wait: seconds that the first of them waits for others (>= 0).
        n_clients: how many there are that could ask.
        computed: is told of every call of the policy, its seconds and rows.
    """

    def __init__(
        self,
        policy: DiffusionPolicy | OnnxPolicy,
        turns: Turns,
        *,
        most: int,
        wait: float,
        n_clients: Callable[[], int],
        computed: Callable[[float, int], None],
    ) -> None:
        self.policy = policy
        self._computed = computed
        self._turns, self._most, self._wait, self._n_clients = turns, most, wait, n_clients
        self._waiting: list[_Waiting] = []
        self._came = asyncio.Event()

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
        """Answer until cancelled."""
        while True:
            if not self._waiting:
                self._came.clear()
                await self._came.wait()
            async with self._turns:
                await self._gather()
                batch = self._next()
                if batch:
                    questions = [one.question for one in batch]
                    began, seconds, outcomes = await self._turns.compute(_timed, self.policy, questions)
                    self._computed(seconds, len(batch))
                    for one, outcome in zip(batch, outcomes, strict=True):
                        if not one.computed.done():  # it is there still
                            one.computed.set_result(Computed(outcome, began, seconds))

    async def _gather(self) -> None:
        """Wait for others, as long as there are some that may still ask."""
        end = self._waiting[0].came + self._wait
        while len(self._waiting) < min(self._most, self._n_clients()):
            self._came.clear()
            try:
                await asyncio.wait_for(self._came.wait(), end - time.perf_counter())
            except TimeoutError:
                return

    def _next(self) -> list[_Waiting]:
        """The first that waits, with those of its kind; the others, in their order, wait on."""
        for one in self._waiting:
            if one.gone() and not one.computed.done():
                one.computed.set_exception(Gone())
        there = [one for one in self._waiting if not one.computed.done()]
        kinds = [kind(self.policy, one.question) for one in there]
        batch = [one for one, its in zip(there, kinds, strict=True) if its == kinds[0]][: self._most]
        self._waiting = [one for one in there if one not in batch]
        return batch


def _timed(policy: DiffusionPolicy | OnnxPolicy, questions: Sequence[Question]) -> tuple[float, float, list[Outcome]]:
    """When it began, the seconds that it took, and `answers`."""
    began = time.perf_counter()
    outcomes = answers(policy, questions)
    return began, time.perf_counter() - began, outcomes
