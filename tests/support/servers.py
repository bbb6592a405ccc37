"""Real policy servers in real processes, for tests."""

from __future__ import annotations

import asyncio
import os
import queue
import re
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from processes import Forked
from websockets.sync.client import ClientConnection, connect

from action_diffusion.deploy.serve import wire
from action_diffusion.deploy.serve.server import PolicyServer
from action_diffusion.options.commands import ONLY_SERVED


class Server:
    """`action-diffusion serve` on loopback; `lines` is what it has said so far, on both of its outputs."""

    def __init__(
        self,
        bundle: Path | Mapping[str, Path],
        *options: str,
        env: dict[str, str] | None = None,
        host: str = "127.0.0.1",
        program: tuple[str, ...] = ("-m", "action_diffusion"),
    ) -> None:
        named = bundle if isinstance(bundle, Mapping) else {}
        several = ", ".join(f"{name}: {path}" for name, path in named.items())
        given = f"bundles={{{several}}}" if named else f"bundle={bundle}"
        words = [given, "device=cpu", "seed=7", f"host={host}", *options]
        if not any(word.startswith("port=") for word in options):
            words.append("port=0")
        self.process = Forked(
            *(*program, "serve", *words),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
        )
        assert self.process.stdout is not None
        self.lines: list[str] = []
        self.port = 0
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            found = re.search(r"serving .* at ws://.*:(\d+)", line)
            if found:
                self.port = int(found[1])
                break
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(line.rstrip() for line in self.process.stdout)

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def connect(self, **options: Any) -> ClientConnection:
        """A bare connection, with its metadata still to be received."""
        connection: ClientConnection = connect(self.url, compression=None, max_size=None, proxy=None, **options)
        return connection.__enter__()

    def end(self) -> int:
        """Ask it to end, and wait. Returns its exit code."""
        self.process.terminate()
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()
            self._reader.join(5)


@contextmanager
def serving(bundle: Path | Mapping[str, Path], *options: str, **more: Any) -> Iterator[Server]:
    server = Server(bundle, *options, **more)
    try:
        assert server.port, server.lines
        yield server
    finally:
        server.end()


@contextmanager
def serving_here(policy: Any, **options: Any) -> Iterator[tuple[PolicyServer, int, asyncio.AbstractEventLoop]]:
    """A `PolicyServer` of a policy, a list of copies, or several by name, in a thread; with its port and its loop."""
    ports: queue.Queue[int] = queue.Queue()
    loops: list[asyncio.AbstractEventLoop] = []
    policies = policy if isinstance(policy, dict) else {ONLY_SERVED: policy}
    copies = {name: one if isinstance(one, list) else [one] for name, one in policies.items()}
    server = PolicyServer(policies=copies, port=0, **options)

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve(ports.put)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        yield server, ports.get(timeout=10), loops[0]
    finally:
        loops[0].call_soon_threadsafe(server.stop)
        thread.join(20)
        assert not thread.is_alive()


def connection_to(port: int, name: str = "") -> ClientConnection:
    """To the policy of this name, with its metadata received."""
    connection = connect(f"ws://127.0.0.1:{port}/{name}", compression=None, proxy=None).__enter__()
    connection.recv()
    return connection


def ask(connection: ClientConnection, message: Any) -> Any:
    """One question and its answer: decoded, or the line of text."""
    connection.send(message if isinstance(message, bytes | str) else wire.pack(message))
    answer = connection.recv(timeout=20)
    if isinstance(answer, str):
        return answer
    return {key: _decoded(value) for key, value in wire.unpack(answer).items()}


def _decoded(value: Any) -> Any:
    return wire.decode_array(value, "") if isinstance(value, dict) and b"__ndarray__" in value else value


def states(n: int, seed: int = 0) -> np.ndarray:
    """float32 [n, 5] that a tiny PushT policy was normalised for."""
    return np.random.default_rng(seed).uniform(200, 300, (n, 5)).astype(np.float32)
