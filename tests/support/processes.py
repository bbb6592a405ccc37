"""`python …` in processes of their own that need not import torch first: they are forked off one that has.

An import of everything takes five seconds of a core, and the tests start some eighty processes. What is forked off goes
through the same `main` as a process that starts from nothing, has its own id, signals, outputs and exit code, and ends
as an interpreter does. What is about starting itself still starts from nothing, by `subprocess`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

IMPORTED = (
    "action_diffusion.cli",
    "action_diffusion.training.run",
    "action_diffusion.training.evaluation.command",
    "action_diffusion.deploy.run",
    "action_diffusion.deploy.serve.command",
    "action_diffusion.deploy.records.command",
)


class Forked:
    """What `subprocess.Popen` is for a process that starts from nothing.

    words: what follows `python`: -m NAME …, -c CODE …, or FILE …
    stdin: `subprocess.PIPE` (of text) or None for nothing. stdout, stderr: that, `DEVNULL`, a file, or None for those
    of the tests; stderr may be `STDOUT`.
    """

    def __init__(
        self,
        *words: str | Path,
        stdin: Any = None,
        stdout: Any = None,
        stderr: Any = None,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        start_new_session: bool = False,
    ) -> None:
        self.args = [str(word) for word in words]
        self.returncode: int | None = None
        asked: dict[str, Any] = {"words": self.args, "cwd": str(cwd or Path.cwd()), "session": start_new_session}
        asked["env"] = dict(os.environ if env is None else env)
        self._status, status = socket.socketpair()
        with contextlib.ExitStack() as handed_over:  # and closed here
            handed_over.enter_context(status)
            self.stdin, into = _end(stdin or subprocess.DEVNULL, 0, handed_over)
            self.stdout, out = _end(stdout, 1, handed_over)
            self.stderr, err = (None, out) if stderr == subprocess.STDOUT else _end(stderr, 2, handed_over)
            _send(asked, [status.fileno(), into, out, err])
        self.pid = self._told()

    def _told(self) -> int:
        number = self._status.recv(4, socket.MSG_WAITALL)
        if len(number) < 4:
            raise ChildProcessError("the process that others are forked off has ended")
        return int.from_bytes(number, "little")

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(self._told())
            self._status.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(*words: str | Path, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with `capture_output` and `text`."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = Forked(*words, stdout=out, stderr=err, **options)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        said = [_all_of(file) for file in (out, err)]
    return subprocess.CompletedProcess(process.args, code, *said)


def _all_of(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


def _end(wanted: Any, number: int, handed_over: contextlib.ExitStack) -> tuple[IO[str] | None, int]:
    """(our end of a pipe, the descriptor that is to be `number` in the process)"""
    if wanted is None:
        return None, number
    if wanted == subprocess.DEVNULL:
        return None, handed_over.enter_context(open(os.devnull, "r+")).fileno()
    if wanted == subprocess.PIPE:
        ends = os.pipe()
        theirs = ends[number > 0]
        handed_over.callback(os.close, theirs)
        return open(ends[number == 0], "r" if number else "w"), theirs
    return None, wanted.fileno()


_parents: list[tuple[socket.socket, subprocess.Popen[bytes]]] = []
"""The process that others are forked off, once there is one."""


def _send(asked: dict[str, Any], descriptors: list[int]) -> None:
    if not _parents:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            number = theirs.fileno()
            command = [sys.executable, __file__, str(number)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a process that has threads must not fork
            process = subprocess.Popen(command, pass_fds=[number], stdin=subprocess.DEVNULL, env=environment)
        _parents.append((ours, process))
    socket.send_fds(_parents[0][0], [json.dumps(asked).encode()], descriptors)


# In that process.


def serve(requests: socket.socket) -> None:
    """Fork off what is asked for, and say how it ended; returns when there is nobody to ask, and in what was forked."""
    ended, wake = socket.socketpair()
    wake.setblocking(False)
    ended.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    waiting: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([requests, ended], [], [])
        if ended in ready:
            with contextlib.suppress(BlockingIOError):
                ended.recv(4096)
            for pid, status in _reaped(waiting):
                with waiting.pop(pid) as answer, contextlib.suppress(OSError):
                    answer.sendall(status.to_bytes(4, "little"))
        if requests in ready:
            message, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 4)
            if not message:
                return
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for one in (requests, ended, wake, *waiting.values()):
                    one.close()
                become(**json.loads(message), descriptors=descriptors)
                return
            waiting[pid] = socket.socket(fileno=descriptors[0])
            waiting[pid].sendall(pid.to_bytes(4, "little"))
            for descriptor in descriptors[1:]:
                os.close(descriptor)


def _reaped(waiting: Mapping[int, object]) -> list[tuple[int, int]]:
    found = [os.waitpid(pid, os.WNOHANG) for pid in waiting]
    return [(pid, status) for pid, status in found if pid]


def become(words: list[str], cwd: str, env: dict[str, str], session: bool, descriptors: list[int]) -> None:
    """What `python WORDS` does after its start."""
    os.close(descriptors[0])
    for number, descriptor in enumerate(descriptors[1:]):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if session:
        os.setsid()
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True, errors="backslashreplace")
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = [cwd, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    if words[0] == "-m":
        sys.argv = ["", *words[2:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] != "-c":
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
    else:
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    import gc
    from importlib import import_module

    sys.path.pop(0)  # this folder
    for module in IMPORTED:
        import_module(module)
    n_threads = len(os.listdir("/proc/self/task"))
    if n_threads > 1:
        raise SystemExit(f"{n_threads} threads after the imports: what is forked off would lack all but one")
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])))
