"""The person who watches: starts, pauses, takes over, and says how it went.

    page's process ── ring `orders`, ring `points` ─▶ `PageOperator` in the loop ── ring `modes` ─▶ page

       begin ─▶ (PAUSED) ── start ─▶ POLICY ── pause ─▶ PAUSED ── start ─▶ POLICY, which begins anew: no old chunk,
                                       └── take over ─▶ PERSON ── start ─┘               no old observation

None of this makes the arm safe: an emergency stop does not pass here but straight to the arm's process, which also
stops when the loop dies. Orders that never come change nothing: the loop goes on as it was told last. Points are many,
and only the last one counts; in a ring of their own they push no order out.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from action_diffusion.deploy.ipc.rings import Fields, RingReader, RingWriter

if TYPE_CHECKING:  # the page's process imports this, and none of the simulators
    from action_diffusion.deploy.robot.robots import Feedback

MOST_VALUES = 32
"""Of a command that somebody points at, or shares with the policy."""
ORDERS: Fields = {"order": ("i4", ()), "owned": ("i8", ()), "score": ("f8", ())}
POINTS: Fields = {"size": ("i4", ()), "values": ("f8", (MOST_VALUES,))}
MODES: Fields = {"mode": ("i4", ()), "owned": ("i8", ())}
EVERYTHING = -1
"""Is owned, see `bits`."""
STALE = 0.5
"""How old (s) a person's command may be; then the robot holds."""
LOOK = 0.02
"""Between two looks (s) at what the person says, while nothing moves."""


class Mode(enum.IntEnum):
    """Who commands. OVER: no episode is under way. RESET, MARK: nor is one in these, and the person is asked to set the
    scene up, or how it went (`trial_operator`)."""

    POLICY, PAUSED, PERSON, OVER, RESET, MARK = 0, 1, 2, 3, 4, 5


class Order(enum.IntEnum):
    """What a person may ask the loop for. SCORE and those after it: of trials (`trial_operator`)."""

    START, PAUSE, TAKE_OVER, SUCCESS, FAILURE, OWN, SCORE, REDO, UNDO, HOME = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10


def bits(owned: np.ndarray | None) -> int:
    """Which values of an action are somebody's, bool [A <= MOST_VALUES], as one number; `EVERYTHING` for None."""
    return EVERYTHING if owned is None else sum(1 << i for i, mine in enumerate(owned) if mine)


def owned_of(number: int, size: int) -> np.ndarray | None:
    """The inverse of `bits`, for actions of `size` values; None where all of them are owned."""
    owned = np.array([number >> i & 1 for i in range(size)], bool)
    return None if owned.all() else owned


MARKS = {Order.SUCCESS: "success", Order.FAILURE: "failure"}
MODE_OF = {Order.START: Mode.POLICY, Order.PAUSE: Mode.PAUSED, Order.TAKE_OVER: Mode.PERSON}


class Teleoperator(Protocol):
    """Where a person's commands come from: a mouse, a leader arm, a SpaceMouse."""

    def command(self, t: float) -> np.ndarray | None:
        """The command of the control step at `t` (monotonic s), [A] in the data's units; None: hold."""
        ...


class Operator(Protocol):
    """What the loop asks the person for.

    Attributes:
        commands: whether the person commands, and not the policy.
        owned: which values of the action are the person's while they command, see `bits`; the policy fills in the rest.
        mark: what the person said of this episode, which is then over: "success", "failure"; None so far.
    """

    @property
    def commands(self) -> bool: ...
    @property
    def owned(self) -> int: ...
    @property
    def mark(self) -> str | None: ...

    def begin(self) -> None:
        """An episode begins."""

    def wait(self, hold: Callable[[], Feedback]) -> bool:
        """Wait until the next control step may begin, and call `hold` meanwhile. False: the episode is over."""
        ...

    def begin_step(self) -> bool:
        """A control step begins. Returns whether, since the one before, it changed who commands."""
        ...

    def ask_take_over(self) -> None:
        """Pause, and ask the person to take over: what `wait` waits for then is them."""

    def command(self, t: float) -> np.ndarray | None:
        """See `Teleoperator`."""
        ...

    def end(self) -> None:
        """The episode is over."""


class NoOperator:
    """Nobody watches."""

    commands = False
    owned = EVERYTHING
    mark: str | None = None

    def begin(self) -> None:
        pass

    def wait(self, hold: Callable[[], Feedback]) -> bool:
        return True

    def begin_step(self) -> bool:
        return False

    def ask_take_over(self) -> None:
        pass

    def command(self, t: float) -> np.ndarray | None:
        return None

    def end(self) -> None:
        pass


class Pointer:
    """Commands that a person shows by pointing on the page: the latest, for as long as it is not stale.

    Args:
        folder: the run's shared memory, with the page's ring `points`.
    """

    def __init__(self, folder: Path) -> None:
        self._points = RingReader(folder / "points")

    def command(self, t: float) -> np.ndarray | None:
        """See `Teleoperator`."""
        latest = self._points.latest()
        if latest is None or t - latest.t > STALE:
            return None
        return latest.values["values"][: int(latest.values["size"])]


class PageOperator:
    """See `Operator`: a person at the page. `listen` never waits, and does nothing where the page is gone.

    Args:
        folder: the run's shared memory, with the page's rings; the ring `modes` is made there.
        waits: every episode begins when the person starts it.
        teleoperator: gives the person's commands; by default what they point at on the page.
        say: takes a line for whoever started the run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        waits: bool = False,
        teleoperator: Teleoperator | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self._orders, self._heard = RingReader(folder / "orders"), -1
        self._modes = RingWriter(folder / "modes", fields=MODES, n_slots=64)
        self._teleoperator: Teleoperator = teleoperator or Pointer(folder)
        self._waits, self._say = waits, say
        self.mark: str | None = None
        self.owned = EVERYTHING
        self._fresh = self._next_waits = False
        self._become(Mode.OVER)

    @property
    def mode(self) -> Mode:
        return self._mode

    @property
    def commands(self) -> bool:
        return self._mode is Mode.PERSON

    def _become(self, mode: Mode) -> None:
        self._mode = mode
        self._modes.append(time.monotonic(), {"mode": int(mode), "owned": self.owned})

    def begin(self) -> None:
        self.listen()
        waits = self._waits or self._next_waits
        self.mark, self._fresh, self._next_waits = None, False, False
        self._become(Mode.PAUSED if waits else Mode.POLICY)
        if waits:
            self._say("waiting for somebody to press Start on the page")

    def let_next_wait(self) -> None:
        """The next episode begins only when the person starts it."""
        self._next_waits = True

    def listen(self) -> None:
        """Take the orders that have come. Between episodes a pause makes the next one wait, unless a start follows."""
        for record in self._orders.after(self._heard):
            self._heard = record.number
            order = Order(int(record.values["order"]))
            if order is Order.OWN:
                self.owned = int(record.values["owned"])
                self._become(self._mode)
            elif self._mode is not Mode.OVER:
                self._obey(order, float(record.values["score"]))
            elif order in (Order.PAUSE, Order.START):
                self._next_waits = order is Order.PAUSE

    def _obey(self, order: Order, score: float) -> None:
        """score: of a mark that has one."""
        if order in MARKS:
            self.mark = MARKS[order]
            return
        mode = MODE_OF.get(order, self._mode)
        if mode is not self._mode or order is Order.START:  # once more: where the guard holds, that goes on
            self._fresh = True
            self._become(mode)

    def wait(self, hold: Callable[[], Feedback]) -> bool:
        """Paused, the robot rests until somebody goes on, or the episode is over."""
        self.listen()
        while self._mode is Mode.PAUSED and self.mark is None:
            if hold()[1]:
                return False
            time.sleep(LOOK)
            self.listen()
        return self.mark is None

    def begin_step(self) -> bool:
        self.listen()
        fresh, self._fresh = self._fresh, False
        return fresh

    def ask_take_over(self) -> None:
        if self._mode is Mode.POLICY:
            self._become(Mode.PAUSED)
            self._say("the guard asks for somebody to press Take over, or Start, on the page")

    def command(self, t: float) -> np.ndarray | None:
        return self._teleoperator.command(t)

    def end(self) -> None:
        self._become(Mode.OVER)


class Orders:
    """The page's end: writes the rings `orders` and `points` in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._orders = RingWriter(folder / "orders", fields=ORDERS, n_slots=4096)
        self._points = RingWriter(folder / "points", fields=POINTS, n_slots=64)

    def give(self, order: Order, *, score: float = 0.0) -> None:
        """Ask the loop for it. score: of a `SCORE`, in [0, 1]."""
        self._orders.append(time.monotonic(), {"order": int(order), "owned": EVERYTHING, "score": score})

    def own(self, owned: np.ndarray) -> None:
        """From now on these values, bool [A <= MOST_VALUES], are the person's while they command."""
        self._orders.append(time.monotonic(), {"order": int(Order.OWN), "owned": bits(owned), "score": 0.0})

    def point(self, values: np.ndarray) -> None:
        """A command [A <= MOST_VALUES], for the time in which the person commands."""
        padded = np.zeros(MOST_VALUES)
        padded[: len(values)] = values
        self._points.append(time.monotonic(), {"size": len(values), "values": padded})
