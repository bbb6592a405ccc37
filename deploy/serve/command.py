"""`action-diffusion serve`: a policy for robots that think elsewhere."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console

from action_diffusion.deploy.serve.access import read_token
from action_diffusion.deploy.serve.policies import open_copies
from action_diffusion.deploy.serve.replacing import REPLACE, Replacing
from action_diffusion.deploy.serve.server import PolicyServer
from action_diffusion.options import Serve
from action_diffusion.policy.text.words import Words

LINE_SECONDS = 60.0
STATUS_SECONDS = 1.0


class ServerStatistics:
    """What the server did since the last line."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=100_000)
        self._turned_down = 0

    def answered(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def turned_down(self, line: str) -> None:
        self._turned_down += 1

    def line(self, n_connections: int) -> str:
        """Connections now, chunks and milliseconds since the last `reset`."""
        text = f"{n_connections} connection{'' if n_connections == 1 else 's'}, {len(self._seconds)} chunks"
        if self._seconds:
            median, p95 = 1e3 * np.percentile(self._seconds, [50, 95])
            text += f", inference {median:.1f} ms median, {p95:.1f} ms 95 %"
        return text + (f", {self._turned_down} messages refused" if self._turned_down else "")

    def reset(self) -> None:
        self._seconds.clear()
        self._turned_down = 0


def run(config: Serve) -> int:
    """Serve what `configs/serve.yaml` asks for, until SIGTERM (exit code 0) or Ctrl-C (`KeyboardInterrupt`).

    Raises `InputError` for a bundle that cannot be loaded, a host and port that cannot be listened at, a host that
    other machines reach without a token, and a missing extra.
    """
    token = read_token(config.token_file)
    policies = {name: open_copies(config, Path(path)) for name, path in config.named.items()}
    words = {name: Words.of(copies[0].spec, config.instruction, config.text_model) for name, copies in policies.items()}
    for one in words.values():
        one.ready()
    statistics = ServerStatistics()
    say = _once_each(lambda line: print(line, file=sys.stderr, flush=True))
    replacing = Replacing(config, say)
    signal.signal(REPLACE, lambda *_: replacing.ask())  # until the event loop takes it over
    server = PolicyServer(
        policies=policies,
        host=config.host,
        port=config.port,
        token=token,
        max_connections=config.max_connections,
        max_message_bytes=int(config.max_message_mb * 2**20),
        max_batch=config.batch_of,
        batch_wait=config.batch_wait_ms / 1e3,
        seed=config.seed,
        remember=config.remember,
        words=words,
        say=say,
        answered=statistics.answered,
        turned_down=statistics.turned_down,
    )
    try:
        asyncio.run(_serve(config, server, statistics, replacing, bool(token)))
    finally:
        print("stopped")
    return 0


async def _serve(
    config: Serve, server: PolicyServer, statistics: ServerStatistics, replacing: Replacing, with_token: bool
) -> None:
    server.warm_up()  # before anyone waits
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, server.stop)
    loop.add_signal_handler(REPLACE, replacing.ask)

    def ready(port: int) -> None:
        host = f"[{config.host}]" if ":" in config.host else config.host
        for name, spec in server.specs.items():
            where = f"ws://{host}:{port}{'' if config.bundles is None else f'/{name}'}"
            print(
                f"serving {spec.task or 'a policy'} at {where}{' with a token' if with_token else ''}, Ctrl-C ends",
                flush=True,
            )

    beside = [asyncio.create_task(_report(statistics, server)), asyncio.create_task(replacing.run(server))]
    try:
        await server.serve(ready)
    finally:
        for task in beside:
            task.cancel()


async def _report(statistics: ServerStatistics, server: PolicyServer) -> None:
    """A line a minute; in a terminal, the numbers so far below it."""
    console = Console()
    with console.status("", refresh_per_second=2) as status:
        began = time.monotonic()
        while True:
            await asyncio.sleep(STATUS_SECONDS)
            line = statistics.line(server.n_connections)
            if console.is_terminal:
                status.update(line)
            if time.monotonic() - began >= LINE_SECONDS:
                print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)
                statistics.reset()
                began = time.monotonic()


def _once_each(say: Callable[[str], None]) -> Callable[[str], None]:
    """The same line is not said twice in a row: a client may ask ten times a second."""
    last = ""

    def once(line: str) -> None:
        nonlocal last
        if line != last:
            say(line)
        last = line

    return once
