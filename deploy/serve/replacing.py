"""Bundles that take the place of those that are served, in the midst of clients' episodes, at a signal.

    new folder in its place, kill -USR1 ─▶ loaded, golden pair, same contract ─▶ warmed up by turns ─▶ the next call
                                             │ no: one line, and the old one goes on

A signal comes from this machine and from the same user alone: no client can ask for it.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from pathlib import Path

from action_diffusion.deploy.serve.policies import open_copies
from action_diffusion.deploy.serve.server import PolicyServer
from action_diffusion.errors import InputError
from action_diffusion.options import Serve

REPLACE = signal.SIGUSR1


class Replacing:
    """Looks, whenever it is asked to, for bundles that have changed since they were loaded.

    Made before they are loaded. say: takes a line for each that is not taken.
    """

    def __init__(self, config: Serve, say: Callable[[str], None]) -> None:
        self._config, self._say = config, say
        self._seen = {name: _files(Path(path)) for name, path in config.named.items()}
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """From the event loop's thread."""
        self._asked.set()

    async def run(self, server: PolicyServer) -> None:
        """Until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            for name, path in self._config.named.items():
                await self._look(server, name, Path(path))

    async def _look(self, server: PolicyServer, name: str, path: Path) -> None:
        try:
            there = _files(path)
            if there == self._seen[name]:
                self._tell(f"{name}: {path} has not changed")
                return
            policies = await asyncio.to_thread(open_copies, self._config, path, verify=True)
            await server.replace(name, policies)
        except Exception as error:  # whatever a bundle can fail with: the old one goes on
            why = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            self._say(f"{name}: {path} is not taken, the bundle before it goes on: {' '.join(why.split())}")
            server.counted(name).replaced("refused")
            return
        self._seen[name] = there
        server.counted(name).replaced("taken")
        self._tell(f"{name}: {path} has taken its place")

    def _tell(self, line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


def _files(path: Path) -> frozenset[tuple[object, ...]]:
    """What changes when a bundle, or an ONNX file, is replaced or written to."""
    stats = [(str(file), file.stat()) for file in (path, *path.rglob("*")) if file.is_file()]
    return frozenset((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
