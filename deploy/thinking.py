"""Where chunks are computed: in the loop, which then waits for them, or in a thread beside it, which then goes on.

Either way the answer may be held back until a number of control steps has passed, to try what a slower computer or a
longer way to it would do.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from action_diffusion.deploy.clock import Clock

Answer = TypeVar("Answer")


class Unavailable(RuntimeError):
    """No answer can be had now, for a reason that may pass: hold, and ask again."""


@dataclass(frozen=True)
class Thought(Generic[Answer]):
    """What came out, and the seconds that it took."""

    answer: Answer
    seconds: float


class Thinker(Generic[Answer]):
    """One piece of work at a time: `ask`, then `answer` at every control step until it gives one.

    Args:
        clock: that measures how long the work takes.
        beside: in a thread of its own. False: `ask` does the work and returns when it is done.
        delay: control steps that at least pass between the question and the answer (>= 0).
    """

    def __init__(self, *, clock: Clock, beside: bool = False, delay: int = 0) -> None:
        self._clock = clock
        self._delay = delay
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy") if beside else None
        self._future: Future[Thought[Answer]] | None = None
        self._due = 0

    def ask(self, step: int, work: Callable[[], Answer]) -> None:
        """Begin `work` at control step `step`."""
        if self._future is not None:
            raise RuntimeError("ask() before the last question was answered")
        self._due = step + self._delay
        if self._pool is not None:
            self._future = self._pool.submit(self._timed, work)
            return
        self._future = Future()
        try:
            self._future.set_result(self._timed(work))
        except Unavailable as error:
            self._future.set_exception(error)

    def answer(self, step: int) -> Thought[Answer] | None:
        """What came out, once; None where there is no question, or no answer yet. Raises what the work raised."""
        if self._future is None or step < self._due or not self._future.done():
            return None
        future, self._future = self._future, None
        return future.result()

    def forget(self) -> bool:
        """The last question is not to be answered any more. Returns whether there was one; its work goes on to its
        end before that of the next one begins."""
        asked, self._future = self._future is not None, None
        return asked

    def _timed(self, work: Callable[[], Answer]) -> Thought[Answer]:
        before = self._clock.now()
        answer = work()
        return Thought(answer, self._clock.now() - before)

    def close(self) -> None:
        """Wait for what is under way, and drop it."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._future = None
