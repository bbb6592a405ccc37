"""The person in trials: sets the scene up, starts each run, and says how it went, while it runs or afterwards.

    before(): RESET ── start ─▶ run: POLICY ⇄ PAUSED ─┬─ marked ───────────────▶ OVER
                ├── undo: the last mark was wrong      └─ over by itself ─▶ ask(): MARK ── marked ─▶ OVER
                └── home: the arm is to go back

Between runs the robot is at rest: nothing moves while somebody's hands are in the scene. Nobody takes over: a run that
a person drove says nothing of the policy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from action_diffusion.deploy.loop.operator import LOOK, MARKS, Mode, Order, PageOperator
from action_diffusion.errors import InputError

TRIAL_MARKS = MARKS | {Order.SCORE: "partial", Order.REDO: "redo"}
REDO = "redo"
"""The mark of a run that does not count."""


class TrialOperator(PageOperator):
    """See `operator.PageOperator`, whose further arguments are `options`.

    Args:
        idle: is called while the person is waited for; whether the page is still there.

    Attributes:
        score: what the mark is worth, in [0, 1]; None without one, and for a run that does not count.
    """

    def __init__(self, folder: Path, *, idle: Callable[[], bool], **options: Any) -> None:
        super().__init__(folder, **options)
        self._idle = idle
        self._answer: Order | None = None
        self.score: float | None = None

    def before(self) -> Order:
        """Wait for what the person wants before the next run: START, UNDO or HOME.

        Raises `InputError` where the page is gone.
        """
        self.listen()  # what was pressed before is no answer
        self._answer = None
        self._wait_in(Mode.RESET, lambda: self._answer is not None)
        assert self._answer is not None
        return self._answer

    def ask(self) -> None:
        """Wait for a mark of the run that is over. Raises `InputError` where the page is gone."""
        self._wait_in(Mode.MARK, lambda: self.mark is not None)

    def _wait_in(self, mode: Mode, done: Callable[[], bool]) -> None:
        self._become(mode)
        while not done():
            if not self._idle():
                raise InputError("the page is gone, and nobody can start and mark runs")
            time.sleep(LOOK)
            self.listen()
        self._become(Mode.OVER)

    def begin(self) -> None:
        self.listen()
        self._next_waits, self.score = False, None  # they have just said so
        super().begin()

    def _obey(self, order: Order, score: float) -> None:
        if self._mode is Mode.RESET:
            if order in (Order.START, Order.UNDO, Order.HOME):
                self._answer = order
        elif order in TRIAL_MARKS:
            self.mark = TRIAL_MARKS[order]
            self.score = {Order.SUCCESS: 1.0, Order.FAILURE: 0.0, Order.SCORE: score}.get(order)
        elif self._mode is not Mode.MARK and order is not Order.TAKE_OVER:
            super()._obey(order, score)
