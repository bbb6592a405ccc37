"""How connections reach the two processes of a page, so that nothing ever waits before an emergency stop.

    browser ─▶ port ─▶ `Entrance` in the stop's process: how does the request begin?
                          ├── POST /emergency, POST /clear, GET /stop ─▶ answered there
                          └── anything else ─▶ `HandOver`, the socket itself ─▶ `receive` in the page's process

Every answer ends its connection, so that the next request passes the entrance again. Whoever says nothing, or does not
get to the end of a request, is let go after `PATIENCE`; of too many such ones the oldest is.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from action_diffusion.errors import InputError

PATIENCE = 5.0
"""Seconds that a request may take to arrive and to be answered."""
MOST = 128
"""Connections, of either process, on which no answer or no WebSocket has come about yet."""
AT_ONCE, PAUSE = 64, 0.005
"""So many new connections are taken at once, and then none for so long (s): strangers get no core to themselves."""
BACKLOG = 4096
RECEIVED = 1 << 13
"""Bytes that the system keeps of what somebody sends: one who floods the page gets a small share of each turn."""
STOP = (b"POST /emergency ", b"POST /clear ", b"GET /stop ")
_BEGINNING = 16
"""Bytes that tell, fewer than any request has."""
Take = Callable[[socket.socket], None]


def listen(host: str, port: int) -> socket.socket:
    """Raises `InputError` for an address that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no host can have
        raise InputError(f"cannot listen at {host}:{port}: {getattr(error, 'strerror', None) or error}") from None
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVED)  # every connection inherits it
    listening.setblocking(False)
    return listening


class Entrance:
    """Takes the connections that come to `listening`, and gives each to whom it belongs.

    Args:
        own: takes those that begin as one of `STOP`; others: takes the rest. Both must not wait.
    """

    def __init__(self, listening: socket.socket, *, own: Take, others: Take) -> None:
        self._listening, self._own, self._others = listening, own, others
        self._loop = asyncio.get_running_loop()
        self._silent: dict[socket.socket, asyncio.TimerHandle] = {}
        self._open()

    def _open(self) -> None:
        self._loop.add_reader(self._listening, self._accept)

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            try:
                connection, _ = self._listening.accept()
            except OSError:  # nobody else is there, or is already gone
                return
            self._await(connection)
        self._loop.remove_reader(self._listening)
        self._loop.call_later(PAUSE, self._open)

    def _await(self, connection: socket.socket) -> None:
        """Until it says what it wants; the system wakes us when it has said enough."""
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _BEGINNING)
        self._silent[connection] = self._loop.call_later(PATIENCE, self._drop, connection)
        self._loop.add_reader(connection, self._look, connection)
        if len(self._silent) > MOST:
            self._drop(next(iter(self._silent)))

    def _forget(self, connection: socket.socket) -> None:
        self._silent.pop(connection).cancel()
        self._loop.remove_reader(connection)

    def _drop(self, connection: socket.socket) -> None:
        self._forget(connection)
        connection.close()

    def _look(self, connection: socket.socket) -> None:
        self._forget(connection)
        try:
            beginning = connection.recv(_BEGINNING, socket.MSG_PEEK)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        except OSError:
            beginning = b""
        if len(beginning) < _BEGINNING:  # it has gone
            connection.close()
        elif beginning.startswith(STOP):
            self._own(connection)
        else:
            self._others(connection)


class HandOver:
    """Gives connections to the process that listens at `path`; where it takes no more, they are closed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._channel: socket.socket | None = None

    def __call__(self, connection: socket.socket) -> None:
        with connection:
            try:
                if self._channel is None:
                    self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                    self._channel.setblocking(False)
                    self._channel.connect(str(self._path))
                socket.send_fds(self._channel, [b"."], [connection.fileno()])
            except BlockingIOError:  # it hangs
                pass
            except OSError:  # it has died
                if self._channel is not None:
                    self._channel.close()
                self._channel = None


def receive(path: Path, take: Take) -> None:
    """From now on, on the running event loop, `take` gets what `HandOver` gives to `path`."""
    loop, listening = asyncio.get_running_loop(), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(path))
    listening.listen()
    listening.setblocking(False)

    def accept() -> None:
        channel, _ = listening.accept()
        channel.setblocking(False)
        loop.add_reader(channel, read, channel)

    def read(channel: socket.socket) -> None:
        given, descriptors, _, _ = socket.recv_fds(channel, 1, 1)  # each byte comes with a connection
        for descriptor in descriptors:
            take(socket.socket(fileno=descriptor))
        if not given:
            loop.remove_reader(channel)
            channel.close()

    loop.add_reader(listening, accept)


class Server(uvicorn.Server):
    """Answers connections that somebody else has accepted with the application `app`."""

    def __init__(self, app: ASGIApp) -> None:
        config = uvicorn.Config(
            _closing(app),
            timeout_graceful_shutdown=1,
            log_level="critical",
            access_log=False,
            lifespan="off",
            ws="websockets-sansio",
            ws_max_size=1 << 16,
            ws_per_message_deflate=False,
        )
        super().__init__(config)
        self._unanswered: dict[asyncio.Transport, asyncio.TimerHandle] = {}
        self._opening: set[asyncio.Task[None]] = set()

    def take(self, connection: socket.socket) -> None:
        """Answer it, from the running event loop."""
        task = asyncio.ensure_future(self._open(connection))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        parts: dict[str, Any] = {"config": self.config, "server_state": self.server_state, "app_state": {}}
        protocol = functools.partial(self.config.http_protocol_class, **parts, **{"_loop": loop})
        try:
            transport, _ = await loop.connect_accepted_socket(protocol, connection)
        except OSError:  # it has gone
            connection.close()
            return
        self._unanswered[transport] = loop.call_later(PATIENCE, self._end, transport)
        if len(self._unanswered) > MOST:
            self._end(next(iter(self._unanswered)))

    def _end(self, transport: asyncio.Transport) -> None:
        """Unless it has become a WebSocket; that goes on."""
        self._unanswered.pop(transport).cancel()
        if isinstance(transport.get_protocol(), self.config.http_protocol_class):
            transport.abort()

    async def serve_until(self, is_over: Callable[[], bool], ready: Callable[[], None]) -> None:
        """Serve until `is_over`, which is asked five times a second; `ready` is called once `take` may be."""

        async def watch() -> None:
            while not self.started:
                await asyncio.sleep(0.005)
            ready()
            while not is_over():
                await asyncio.sleep(0.2)
            self.should_exit = True

        watching = asyncio.create_task(watch())
        with contextlib.suppress(asyncio.CancelledError):
            await self.serve(sockets=[])
        watching.cancel()


def _closing(app: ASGIApp) -> ASGIApp:
    """`app`, with "Connection: close" in all of its answers."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            await send(message)

        await app(scope, receive, send_last if scope["type"] == "http" else send)

    return answer
