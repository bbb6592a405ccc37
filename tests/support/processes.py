"""`python …` in processes of their own that need not import torch first: they are forked off one that has.

An import of everything takes five seconds of a core, and the tests start some eighty processes. What is forked off goes
through the same `main` as a process that starts from nothing, has its own id, signals, outputs and exit code, and ends
as an interpreter does. What is about starting itself still starts from nothing, by `subprocess`.
"""

from __future__ import annotations

import contextlib
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
    """What `subprocess.Popen` is for a process that starts from nothing. `words` follow `python`: -m NAME, or -c CODE.

    `stdout` and `stderr`: `subprocess.PIPE` (of text), `STDOUT`, `DEVNULL`, a file, or None for those of the tests.
    """

    def __init__(
        self,
        *words: str | Path,
        stdout: Any = None,
        stderr: Any = None,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        if words[0] not in ("-m", "-c"):
            raise ValueError("python -m NAME … or python -c CODE …")
        asked = {
            "words": [str(word) for word in words],
            "cwd": str(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
        }
        self.args, self.returncode = asked["words"], None
        self._status, status = socket.socketpair()
        self.stdout, out, ours = _end(stdout, 1)
        self.stderr, err, ours_too = (None, out, False) if stderr == subprocess.STDOUT else _end(stderr, 2)
        with status:
            _send(asked, [status.fileno(), out, err])
        for descriptor, close in ((out, ours), (err, ours_too)):
            if close:
                os.close(descriptor)
        self.pid = int.from_bytes(self._status.recv(4, socket.MSG_WAITALL), "little")

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(
                int.from_bytes(self._status.recv(4, socket.MSG_WAITALL), "little")
            )
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


def _end(wanted: Any, default: int) -> tuple[IO[str] | None, int, bool]:
    """(what to read, the descriptor to hand over, whether to close it here then)"""
    if wanted is None:
        return None, default, False
    if wanted == subprocess.DEVNULL:
        return None, os.open(os.devnull, os.O_WRONLY), True
    if wanted == subprocess.PIPE:
        reader, writer = os.pipe()
        return open(reader), writer, True
    return None, wanted.fileno(), False


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
            message, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 3)
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


def become(words: list[str], cwd: str, env: dict[str, str], descriptors: list[int]) -> None:
    """What `python WORDS` does after its start."""
    os.close(descriptors[0])
    for descriptor, number in zip(descriptors[1:], (1, 2), strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = (
        open(1, "w", buffering=1, closefd=False),
        open(2, "w", buffering=1, closefd=False, errors="backslashreplace"),
    )
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = [cwd, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    if words[0] == "-m":
        sys.argv = ["", *words[2:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
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
