"""Processes of a run: started with plain values, watched by heartbeats, never left behind.

A child is `python -m MODULE FOLDER NAME JSON`: it imports what its module needs and nothing of its parent's (which has
torch), and nothing is pickled. It says that it is ready, or why not, in FOLDER/NAME.json. It has a process group of
its own, so that Ctrl-C reaches the parent alone, and ends by itself when its parent is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from action_diffusion.deploy.ipc.rings import Moment
from action_diffusion.errors import InputError

BEAT = 0.01
"""Between two heartbeats (s)."""
SILENCE = 0.5
"""A process that runs, but has no heartbeat for so long (s), counts as hanging. Less would stop arms for nothing: a
thread of Python's keeps the others waiting for as long as its call takes, 0.1 s to start a process from a large one."""
UNSEEN = 0.075
"""The same where the system does not say whether a process runs at all; a stop is to begin within 0.1 s."""

_EXITING = 0x4
"""Linux's PF_EXITING. A killed process has it as soon as it is on a core again; its memory is freed next, 0.1 s for a
large one, and only then is it a zombie and do those who wait for it hear."""

USUAL = "usual"


class Child:
    """A process of this run, called `name`.

    Args:
        module: with a function `main`, that calls `serve`.
        folder: the run's shared memory.
        arguments: plain values, for the function that is served.
    """

    def __init__(self, module: str, folder: Path, name: str, arguments: Mapping[str, object]) -> None:
        self.name = name
        self._report = folder / f"{name}.json"
        words = [sys.executable, "-m", module, str(folder), name, json.dumps(dict(arguments))]
        paths = os.pathsep.join(path for path in sys.path if path)
        threads = {"OMP_NUM_THREADS": "1"}  # what they compute is small, and cores are few
        self.process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, env=os.environ | threads | {"PYTHONPATH": paths}, process_group=0
        )

    def wait_ready(self, timeout: float = 60.0) -> dict[str, Any]:
        """What the child says of itself, once it is ready. Raises `InputError` with its reason where it is not."""
        deadline = time.monotonic() + timeout
        while not self._report.exists():
            if self.process.poll() is not None and not self._report.exists():
                raise InputError(f"{self.name}: its process ended with code {self.process.returncode} at its start")
            if time.monotonic() > deadline:
                raise InputError(f"{self.name}: its process was not ready within {timeout:g} s")
            time.sleep(0.005)
        said: dict[str, Any] = json.loads(self._report.read_text(encoding="utf-8"))
        if "error" in said:
            raise InputError(f"{self.name}: {said['error']}")
        return said

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def halted(self) -> bool:
        """Whether it is stopped, by SIGSTOP or a debugger; never where there is no /proc to say so."""
        try:
            return _state(Path(f"/proc/{self.process.pid}/stat").read_bytes())[0] in b"Tt"
        except OSError:
            return False

    def end(self, timeout: float = 5.0) -> None:
        """Ask it to end, and insist after `timeout` (s)."""
        if self.alive:
            self.process.terminate()
            self.process.send_signal(signal.SIGCONT)  # one that was halted has to run to end
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


def report(folder: Path, name: str, said: Mapping[str, object]) -> None:
    """Tell the parent: ready, and what it should know, or {"error": why not}."""
    new = folder / f".{name}.json"
    new.write_text(json.dumps(dict(said)), encoding="utf-8")
    new.rename(folder / f"{name}.json")


def serve(work: Callable[..., None]) -> int:
    """The `main` of a child: `work(folder=…, name=…, **arguments)`, until it returns. Returns the exit code."""
    folder, name, arguments = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        work(folder=folder, name=name, **arguments)
    except InputError as error:
        if not folder.exists():
            return 1
        report(folder, name, {"error": str(error)})
        return 2
    return 0


def prefer(priority: int, *, everything: bool = False) -> str:
    """Run before others where the system lets us, in real time with a `priority` of 1 to 99; says how.

    The calling thread does, and with `everything` all threads of this process: one that waits for a library's own
    thread would otherwise keep it from a core.
    """
    tasks = Path("/proc/self/task")
    threads = [int(path.name) for path in tasks.iterdir()] if everything and tasks.exists() else [0]

    def each(call: Callable[[int], None]) -> None:
        for thread in threads:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                call(thread)

    try:
        each(lambda thread: os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(priority)))
        return f"SCHED_FIFO {priority}"
    except (OSError, AttributeError):
        pass
    try:
        each(lambda thread: os.setpriority(os.PRIO_PROCESS, thread, -15))
        return "nice -15"
    except (OSError, AttributeError):
        return USUAL


class Ending:
    """Whether this child should end: because it was asked to, or because its parent is gone."""

    def __init__(self) -> None:
        self.asked = False
        self._parent = os.getppid()
        self._poll: select.poll | None = None
        if hasattr(os, "pidfd_open") and hasattr(select, "poll"):
            try:
                descriptor = os.pidfd_open(self._parent)
            except OSError:  # an old kernel, or gone already
                pass
            else:
                self._poll = select.poll()
                self._poll.register(descriptor, select.POLLIN)
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True

    @property
    def orphaned(self) -> bool:
        """Whether the parent has died."""
        return os.getppid() != self._parent or (self._poll is not None and bool(self._poll.poll(0)))

    def __bool__(self) -> bool:
        return self.asked or self.orphaned


class Watched:
    """A process with a `Heartbeat` at `path`, as the one sees it who needs it."""

    def __init__(self, path: Path) -> None:
        self._moment = Moment(path)
        pid = int(path.with_suffix(".pid").read_text(encoding="utf-8"))
        self._state: int | None = None
        if Path("/proc/self/stat").exists():
            self._state = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)

    def trouble(self, now: float) -> str | None:
        """What is wrong with it at `now` (monotonic s), or None. Dead and halted ones are seen at once."""
        if self._state is not None:
            try:
                state, flags = _state(os.pread(self._state, 1024, 0))
            except ProcessLookupError:
                return "has died"
            if state in b"XxZ" or flags & _EXITING:
                return "has died"
            if state in b"Tt":
                return "is halted"
        most = UNSEEN if self._state is None else SILENCE
        return f"is silent: no heartbeat for {1e3 * most:.0f} ms" if now - self._moment.t > most else None


def _state(stat: bytes) -> tuple[bytes, int]:
    """State and flags of a process from its /proc/PID/stat (proc_pid_stat(5)); a name may hold any characters."""
    fields = stat.rpartition(b")")[2].split()
    return fields[0], int(fields[6])


class Heartbeat:
    """Marks a moment every 10 ms from a thread, so that one who watches (`Watched`) sees a process that hangs.

    The thread says nothing of the main one. Therefore a lease: the main thread says until when it is to be believed,
    at every step of its loop, and without a further word the heart stops then.
    """

    def __init__(self, path: Path, lease: float) -> None:
        path.with_suffix(".pid").write_text(str(os.getpid()), encoding="utf-8")
        self._moment = Moment.create(path)
        self._lease = lease
        self._ends = threading.Event()
        self.renew()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._thread.start()

    def renew(self) -> None:
        """The main thread is well, and will be heard of within the lease."""
        self._until = time.monotonic() + self._lease
        self._moment.mark()  # not when the thread wakes up: whoever watches may look at once

    def _beat(self) -> None:
        while not self._ends.wait(BEAT):
            if time.monotonic() < self._until:
                self._moment.mark()

    def end(self) -> None:
        """Stop beating."""
        self._ends.set()
        self._thread.join()
