"""Where chunks are computed: in the loop, which then waits for them, or in a thread beside it, which then goes on.

Either way the answer may be held back until a number of control steps has passed, to try what a slower computer or a
longer way to it would do.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from action_diffusion.deploy.loop.clock import Clock

Answer = TypeVar("Answer")


class Unavailable(RuntimeError):
    """No answer can be had now, for a reason that may pass: hold, and ask again."""


@dataclass(frozen=True)
class Thought(Generic[Answer]):
    """What came out, and the seconds that it took."""

    answer: Answer
    seconds: float


class InferenceWorker(Generic[Answer]):
    """One piece of work at a time: `ask`, then `answer` at every control step until it gives one.

    Ctrl-C may come at any instruction. Between the loop and the thread there are only queues that no exception leaves
    half locked, which a `concurrent.futures.Future` is, so that `close` always returns.

    Args:
        clock: that measures how long the work takes.
        beside: in a thread of its own. False: `ask` does the work and returns when it is done.
        delay: control steps that at least pass between the question and the answer (>= 0).
    """

    def __init__(self, *, clock: Clock, beside: bool = False, delay: int = 0) -> None:
        self._clock, self._delay = clock, delay
        self._number, self._due = 0, 0
        self._waiting = False
        self._work: SimpleQueue[tuple[int, Callable[[], Answer]] | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[int, Thought[Answer] | Exception]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        if beside:
            self._thread = threading.Thread(target=self._think, name="policy")
            _start(self._thread)

    def ask(self, step: int, work: Callable[[], Answer]) -> None:
        """Begin `work` at control step `step`."""
        if self._waiting:
            raise RuntimeError("ask() before the last question was answered")
        self._number, self._due, self._waiting = self._number + 1, step + self._delay, True
        if self._thread is not None:
            self._work.put((self._number, work))
            return
        try:
            self._done.put((self._number, self._timed(work)))
        except Unavailable as error:
            self._done.put((self._number, error))

    def answer(self, step: int) -> Thought[Answer] | None:
        """What came out, once; None where there is no question, or no answer yet. Raises what the work raised."""
        while self._waiting and step >= self._due:
            try:
                number, outcome = self._done.get_nowait()
            except Empty:
                break
            if number != self._number:  # forgotten
                continue
            self._waiting = False
            if isinstance(outcome, Exception):
                raise outcome
            return outcome
        return None

    def forget(self) -> bool:
        """The last question is not to be answered any more. Returns whether there was one; its work goes on to its
        end before that of the next one begins."""
        waited, self._waiting, self._number = self._waiting, False, self._number + 1
        return waited

    def _timed(self, work: Callable[[], Answer]) -> Thought[Answer]:
        before = self._clock.now()
        answer = work()
        return Thought(answer, self._clock.now() - before)

    def _think(self) -> None:
        """In the thread, until `close`."""
        while (question := self._work.get()) is not None:
            number, work = question
            if number != self._number:  # forgotten before it began
                continue
            try:
                self._done.put((number, self._timed(work)))
            except Exception as error:
                self._done.put((number, error))

    def close(self) -> None:
        """Wait for what is under way, and drop it."""
        self.forget()
        if self._thread is not None:
            self._work.put(None)
            self._thread.join()


def _start(thread: threading.Thread) -> None:
    """Start it, with a Ctrl-C kept until it runs: in between, one would leave it waiting for us for ever."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
