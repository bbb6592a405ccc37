"""Simulators that are given one order at a time: in this process, in processes of their own, or as Ray actors.

    rollout                    Simulators                   a worker                   its simulators
    give(3, Begin(seed))   ─▶  what waits for a worker  ─▶  one order after another ─▶ reset, observe
    give(7, Execute(plan)) ─▶  is one message               in `Host`                  step × Ta, observing only what
    answers()              ◀─                           ◀─                             will be seen

Workers are alike: a `Crew` starts them, sends, receives, and starts another where one died. Simulator i is held by
worker i mod n. A worker that dies, or gives no answer in time, takes nothing else with it: what its simulators held is
`Lost`, and whoever gave the orders begins those episodes again.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import multiprocessing.connection
import os
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from action_diffusion.envs.base import Env
from action_diffusion.errors import InputError

Workers = int | str | None
"""None: all simulators in this process; a number of processes; "ray" or "ray://HOST:PORT", see `actors`."""
Plan = Sequence[tuple[np.ndarray, bool]]
"""Actions [A] to execute, each with whether what is observed after it will be looked at."""
START_SECONDS = 300.0
"""How long a worker may take to start. What it is ordered has a time of its own (`SimulatorOrder.seconds`)."""
ATTEMPTS = 3
"""How often one thing is tried that a worker dies of."""
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


class Lost(NamedTuple):
    """What a simulator held is gone. fault: its share in that: 1 where nothing else was under way in its worker, 0
    where it was another simulator's."""

    reason: str
    fault: float


class SimulatorOrder(Protocol):
    """What a simulator is to do, as data that can be pickled."""

    @property
    def seconds(self) -> float:
        """After which the simulator counts as hung."""
        ...

    def run(self, on: Any, /) -> Any:
        """Do it with the simulator `on`, or whatever `make` gave; returns the answer."""
        ...


class Begin(NamedTuple):
    """Begin the episode of `seed`, and observe `keys`."""

    seed: int
    keys: Sequence[str]
    seconds: float = 300.0

    def run(self, env: Env, /) -> Start:
        env.reset(self.seed)
        return Start(env.observe(self.keys), env.max_steps, env.action_shape)


class Execute(NamedTuple):
    """At most `max_steps` steps of the plan, until the episode is over."""

    plan: Plan
    keys: Sequence[str]
    max_steps: int
    seconds: float = 120.0

    def run(self, env: Env, /) -> Executed:
        rewards: list[float] = []
        observations = []
        done = False
        for action, will_be_seen in self.plan:
            reward, over = env.step(action)
            rewards.append(float(reward))
            done = over or len(rewards) >= self.max_steps
            if done:
                break
            if will_be_seen:
                observations.append(env.observe(self.keys))
        return Executed(rewards, observations, done)


class Refused(NamedTuple):
    """An `InputError` in a worker, which is raised where the order came from."""

    message: str


class Failed(NamedTuple):
    """Anything else that a simulator raised."""

    reason: str


Message = Sequence[tuple[int, SimulatorOrder]]
"""Orders, each with the number of the simulator that is meant."""


class Host:
    """What a worker holds: its simulators by number, each made when it is first needed."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._held: dict[int, Any] = {}

    def work(self, message: Message) -> list[Any]:
        """The answer to each order. Whatever a simulator raises is `Failed`, and another is made in its place."""
        return [self._guarded(simulator, order) for simulator, order in message]

    def run(self, simulator: int, order: SimulatorOrder) -> Any:
        """The answer to one order; what it raises is raised."""
        if simulator not in self._held:
            self._held[simulator] = self._make()
        return order.run(self._held[simulator])

    def _guarded(self, simulator: int, order: SimulatorOrder) -> Any:
        try:
            return self.run(simulator, order)
        except InputError as error:
            return Refused(str(error))
        except Exception as error:  # the evaluation goes on without it
            with contextlib.suppress(Exception):
                _close(self._held.pop(simulator, None))
            return Failed(f"the simulator failed: {type(error).__name__}: {error}")

    def close(self) -> None:
        for held in self._held.values():
            _close(held)


def _close(held: Any) -> None:
    if hasattr(held, "close"):
        held.close()


class Died(Exception):
    """A worker is gone; the message says how."""


class Crew(Protocol):
    """n workers, numbered from 0, each of which is sent one message at a time and then answers."""

    n: int

    def start(self, worker: int) -> None:
        """Begin to start it, ending what is left of an earlier one. Its first answer, [], says that it is there."""

    def send(self, worker: int, message: Message) -> None: ...

    def ready(self, workers: Collection[int], seconds: float) -> list[int]:
        """Those of `workers`, all of which owe an answer, that have it or died; waits for one, up to `seconds`."""
        ...

    def receive(self, worker: int) -> list[Any]:
        """The answers of one that is ready. Raises `Died`, and `InputError` where none can ever work here."""
        ...

    def close(self) -> None:
        """End them all."""


class Inline:
    """The one worker in this process: it works when it is asked for its answers, and what a simulator raises is
    raised."""

    n = 1

    def __init__(self, make: Callable[[], Any]) -> None:
        self._host = Host(make)
        self._message: Message = ()

    def start(self, worker: int) -> None:
        self._message = ()

    def send(self, worker: int, message: Message) -> None:
        self._message = message

    def ready(self, workers: Collection[int], seconds: float) -> list[int]:
        return list(workers)

    def receive(self, worker: int) -> list[Any]:
        return [self._host.run(simulator, order) for simulator, order in self._message]

    def close(self) -> None:
        self._host.close()


class Processes:
    """Workers in processes of their own. `make` must be picklable (`functools.partial(envs.make, "lift")`)."""

    def __init__(self, make: Callable[[], Any], n: int) -> None:
        self.n, self._make = n, make
        self._pipes: dict[int, Connection] = {}
        self._processes: dict[int, Any] = {}
        self._begun = False

    def start(self, worker: int) -> None:
        self._end([worker])
        context = multiprocessing.get_context("spawn")  # OpenGL and torch's threads do not survive a fork
        self._pipes[worker], theirs = context.Pipe()
        process = self._processes[worker] = context.Process(target=_serve, args=(theirs, self._make), daemon=True)
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # one core each
        try:
            process.start()
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        theirs.close()

    def send(self, worker: int, message: Message) -> None:
        with contextlib.suppress(OSError):  # it is gone, as the answer will say
            self._pipes[worker].send(message)

    def ready(self, workers: Collection[int], seconds: float) -> list[int]:
        of = {self._pipes[worker]: worker for worker in workers}
        timeout = None if seconds == math.inf else seconds
        return sorted(of[pipe] for pipe in multiprocessing.connection.wait(list(of), timeout))  # type: ignore[index]

    def receive(self, worker: int) -> list[Any]:
        try:
            answers: list[Any] = self._pipes[worker].recv()
        except (EOFError, OSError):
            self._processes[worker].join(10)
            code = self._processes[worker].exitcode
            if not self._begun and code == 1:
                raise InputError(NOT_STARTED) from None
            raise Died(f"the simulator's process ended with exit code {code}") from None
        self._begun = True
        return answers

    def close(self) -> None:
        self._end(list(self._processes))

    def _end(self, workers: Sequence[int]) -> None:
        for worker in workers:
            if worker in self._pipes:
                self._pipes.pop(worker).close()
        for worker in workers:
            process = self._processes.pop(worker, None)
            if process is None:
                continue
            process.join(0.5)  # without its pipe it ends by itself
            if process.is_alive():
                process.kill()
                process.join()


def _serve(pipe: Connection, make: Callable[[], Any]) -> None:
    """The other process: messages in, answers out, until the pipe is closed."""
    host = Host(make)
    try:
        pipe.send([])
        while True:
            pipe.send(host.work(pipe.recv()))
    except (EOFError, OSError, KeyboardInterrupt):
        pass
    finally:
        host.close()


class _Sent(NamedTuple):
    message: Message
    by: float


class Simulators:
    """n simulators, numbered from 0, in the workers of `crew`, which it starts and at last ends."""

    def __init__(self, crew: Crew, n: int) -> None:
        self.n, self._crew = n, crew
        self._up: set[int] = set()
        self._waiting: dict[int, list[tuple[int, SimulatorOrder, bool]]] = {worker: [] for worker in range(crew.n)}
        self._sent: dict[int, _Sent] = {}
        self._began: set[int] = set()
        self._failed_starts = 0
        try:
            for worker in range(crew.n):
                self._start(worker)
        except BaseException:
            crew.close()
            raise

    @property
    def available(self) -> set[int]:
        """Those whose worker is there."""
        return {simulator for simulator in range(self.n) if simulator % self._crew.n in self._up}

    @property
    def at_work(self) -> bool:
        """Whether an order has no answer yet."""
        return any(sent.message for sent in self._sent.values()) or any(self._waiting.values())

    def give(self, simulator: int, order: SimulatorOrder, *, alone: bool = False) -> None:
        """An order for an available simulator that has none. alone: nothing else in its worker at the same time."""
        self._began.add(simulator)
        self._waiting[simulator % self._crew.n].append((simulator, order, alone))

    def answers(self, seconds: float = math.inf) -> list[tuple[int, Any]]:
        """(simulator, answer or `Lost`) of those that have it, after `seconds` at the latest; [] too where a worker
        came up.

        Raises `InputError` that a simulator raised, and where no worker starts.
        """
        self._send()
        if not self._sent:
            return []
        end = min([time.monotonic() + seconds, *(sent.by for sent in self._sent.values())])
        found = []
        for worker in self._crew.ready(list(self._sent), max(0.0, end - time.monotonic())):
            sent = self._sent.pop(worker)
            try:
                answers = self._crew.receive(worker)
            except Died as error:
                found += self._lost(worker, sent.message, str(error))
                continue
            self._up.add(worker)
            self._failed_starts = 0
            found += [(simulator, _taken(answer)) for (simulator, _), answer in zip(sent.message, answers, strict=True)]
        for worker in [worker for worker, sent in self._sent.items() if sent.by < time.monotonic()]:
            message = self._sent.pop(worker).message
            limit = sum(order.seconds for _, order in message) or START_SECONDS
            found += self._lost(worker, message, f"the simulator gave no answer for {limit:g} s")
        self._send()
        return found

    def wait(self) -> None:
        """Until all workers are there."""
        while len(self._up) < self._crew.n:
            self.answers()

    def close(self) -> None:
        self._crew.close()

    def _start(self, worker: int) -> None:
        self._crew.start(worker)
        self._sent[worker] = _Sent((), time.monotonic() + START_SECONDS)

    def _send(self) -> None:
        """To every worker that owes no answer, what waits for it."""
        for worker, waiting in self._waiting.items():
            if not waiting or worker in self._sent:
                continue
            shared = [(simulator, order) for simulator, order, alone in waiting if not alone]
            message = shared or [waiting[0][:2]]
            sent = {simulator for simulator, _ in message}
            waiting[:] = [one for one in waiting if one[0] not in sent]
            self._sent[worker] = _Sent(message, time.monotonic() + sum(order.seconds for _, order in message))
            self._crew.send(worker, message)

    def _lost(self, worker: int, message: Message, reason: str) -> list[tuple[int, Lost]]:
        """Start another in place of a worker that died at `message`."""
        self._up.discard(worker)
        self._waiting[worker].clear()
        if not message:
            self._failed_starts += 1
            if self._failed_starts >= ATTEMPTS * self._crew.n or (not self._up and self._failed_starts >= ATTEMPTS):
                raise InputError(f"no worker for simulators starts: {reason}")
        self._start(worker)
        busy = {simulator for simulator, _ in message}
        lost = sorted(simulator for simulator in self._began if simulator % self._crew.n == worker)
        self._began.difference_update(lost)
        return [(simulator, Lost(reason, 1 / len(busy) if simulator in busy else 0.0)) for simulator in lost]


def _taken(answer: Any) -> Any:
    if isinstance(answer, Refused):
        raise InputError(answer.message)
    return Lost(answer.reason, 1.0) if isinstance(answer, Failed) else answer


def open_simulators(make: Callable[[], Any], n: int, workers: Workers) -> Simulators:
    """n of what `make` makes, in `workers`. Raises `InputError` where Ray is missing or cannot be reached."""
    if workers is None:
        return Simulators(Inline(make), n)
    if isinstance(workers, int):
        return Simulators(Processes(make, min(workers, n)), n)
    from action_diffusion.envs.actors import Actors

    return Simulators(Actors(make, n, workers), n)


def count(workers: Workers) -> int:
    """How many there are: of a Ray cluster, one a CPU."""
    if workers is None or isinstance(workers, int):
        return workers or 1
    from action_diffusion.envs.actors import cpus

    return cpus(workers)


Item = TypeVar("Item", bound=Hashable)


def each(simulators: Simulators, orders: Mapping[Item, SimulatorOrder]) -> Iterator[tuple[Item, Any]]:
    """(item, answer to its order), as they are done. A worker that dies at one is replaced, and the order given again.

    Where that happens `ATTEMPTS` times the answer is `Lost`.
    """
    waiting, given = list(orders), dict[int, Item]()
    losses, suspects = dict.fromkeys(orders, 0), set[Item]()
    while waiting or given:
        for simulator in sorted(simulators.available - given.keys())[: len(waiting)]:
            item = given[simulator] = waiting.pop(0)
            simulators.give(simulator, orders[item], alone=item in suspects)
        for simulator, answer in simulators.answers():
            item = given.pop(simulator, None)  # type: ignore[assignment]
            if item is None:  # of an order that was answered before
                continue
            if isinstance(answer, Lost):
                losses[item] += answer.fault == 1
                if answer.fault:
                    suspects.add(item)
                if losses[item] < ATTEMPTS:
                    waiting.insert(0, item)
                    continue
            yield item, answer
