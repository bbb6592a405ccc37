"""The policy server: observations in, chunks out, over WebSocket in the protocol of `openpi-client`.

    client                                server
      │ ── connect, Authorization? ─────▶ │  refused: wrong token, a web page's request, too many connections
      │ ◀──────────── metadata (msgpack) ─ │  the policy's specification: `PolicySpec.to_json`
      │ ── observation (msgpack) ───────▶ │  ClientSession.take ─▶ one worker thread, first come, first served
      │ ◀─── {actions, server_timing} ──── │  or a line of text, "refused: …" or "failed: …", and the connection goes on

Every connection is an episode of its own. A client has at most one question under way, so that taking questions in
their order is taking turns; what it costs to read, check and send for one client never holds up the others.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from action_diffusion.deploy.serve.access import is_authorized, require_token
from action_diffusion.deploy.serve.session import ClientSession, Question
from action_diffusion.deploy.serve.wire import pack, require, shortened, unpack
from action_diffusion.errors import InputError
from action_diffusion.policy.runtime.onnx_policy import OnnxPolicy
from action_diffusion.policy.text.words import Words

if TYPE_CHECKING:
    from websockets.asyncio.server import ServerConnection
    from websockets.http11 import Request, Response

    from action_diffusion.policy.policy import DiffusionPolicy

SEND_SECONDS = 10.0
"""A client that takes an answer no faster than this is let go."""
PING_SECONDS = 20.0
"""So often each side asks whether the other is there; one that stays silent as long again is let go."""
HEALTH = "/healthz"
MOST_TEXT = 500
"""Characters of a line that goes out instead of an answer, whatever a message held."""


class PolicyServer:
    """Answers clients until `stop`.

    Args:
        token: that clients must show; required where `host` is not this machine alone.
        max_connections: more are turned away.
        max_message_bytes: of what a client sends; a larger message ends its connection.
        seed, remember, words: see `ClientSession`.
        say: takes a line about something that went wrong here.
        answered: is told how many seconds the policy took for an answer.
        turned_down: is told of every line of text that went out instead.
    """

    def __init__(
        self,
        *,
        policy: DiffusionPolicy | OnnxPolicy,
        host: str = "127.0.0.1",
        port: int = 8000,
        token: str | None = None,
        max_connections: int = 16,
        max_message_bytes: int = 2**24,
        seed: int | None = None,
        remember: bool = True,
        words: Words | None = None,
        say: Callable[[str], None] = print,
        answered: Callable[[float], None] = lambda seconds: None,
        turned_down: Callable[[str], None] = lambda line: None,
    ) -> None:
        require_token(host, token, option="host", files="token_file")
        needed = _message_bytes(policy)
        if max_message_bytes < needed:
            raise InputError(
                f"max_message_mb={max_message_bytes / 2**20:.2g} is too little: a history takes {needed / 2**20:.2g}"
            )
        self._policy, self._host, self._port, self._token = policy, host, port, token
        self._max_connections, self._max_message_bytes = max_connections, max_message_bytes
        self._session = functools.partial(ClientSession, spec=policy.spec, seed=seed, remember=remember, words=words)
        self._say, self._answered, self._turned_down = say, answered, turned_down
        self._metadata = pack({"policy": "action-diffusion", **policy.spec.to_json()})
        self._closed: type[Exception] = require("websockets.exceptions").ConnectionClosed
        self._stop = asyncio.Event()
        self.n_connections = 0

    def stop(self) -> None:
        """Let `serve` return; from its own event loop."""
        self._stop.set()

    async def serve(self, ready: Callable[[int], None]) -> None:
        """Serve until `stop`; `ready` is told the port once clients can connect.

        Raises `InputError` for a host and port that cannot be listened at.
        """
        logger = logging.getLogger("action_diffusion.server")  # a silent one: websockets logs headers, token and all
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
        listening = require("websockets.asyncio.server").serve(
            self._converse,
            self._host,
            self._port,
            process_request=self._admit,
            origins=[None],  # only browsers send one
            compression=None,
            max_size=self._max_message_bytes,
            max_queue=1,
            ping_interval=PING_SECONDS,
            ping_timeout=PING_SECONDS,
            close_timeout=2,
            logger=logger,
        )
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy") as self._worker:
            try:
                server = await listening
            except (OSError, UnicodeError) as error:  # UnicodeError: a name that no host can have
                raise InputError(f"cannot listen at host={self._host} port={self._port}: {_reason(error)}") from None
            async with server:
                ready(server.sockets[0].getsockname()[1])
                await self._stop.wait()

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Before the handshake: an HTTP answer, or None to go on."""
        if request.path == HEALTH:
            return connection.respond(HTTPStatus.OK, "OK\n")
        if "Sec-Fetch-Site" in request.headers:  # of a web page, though it names no origin
            return connection.respond(HTTPStatus.FORBIDDEN, "web pages do not come in\n")
        if not is_authorized(_header(request), self._token):
            return connection.respond(HTTPStatus.UNAUTHORIZED, "this server asks for a token (openpi: api_key)\n")
        if self.n_connections >= self._max_connections:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections\n")
        return None

    async def _converse(self, connection: ServerConnection) -> None:
        """One client, from its metadata to its end."""
        if self.n_connections >= self._max_connections:  # several passed `_admit` at once
            await connection.close(1013, "too many connections")
            return
        session = self._session()
        timing: dict[str, float] = {}
        self.n_connections += 1
        try:
            await asyncio.wait_for(connection.send(self._metadata), SEND_SECONDS)
            async for message in connection:
                began = time.perf_counter()
                answer = await self._answer(connection, session, message, timing)
                await asyncio.wait_for(connection.send(answer), SEND_SECONDS)
                timing = {"prev_total_ms": 1e3 * (time.perf_counter() - began)}
        except TimeoutError:
            connection.transport.abort()
        except self._closed:
            pass
        finally:
            self.n_connections -= 1

    async def _answer(
        self, connection: ServerConnection, session: ClientSession, message: str | bytes, timing: dict[str, float]
    ) -> bytes | str:
        try:
            if isinstance(message, str):
                raise InputError("the message is text, not msgpack")
            question = session.take(unpack(message))
            waited = time.perf_counter()
            loop = asyncio.get_running_loop()
            began, ended, actions = await loop.run_in_executor(self._worker, self._think, connection, session, question)
            timing = {"infer_ms": 1e3 * (ended - began), "wait_ms": 1e3 * (began - waited), **timing}
            self._answered(ended - began)
            return pack({**actions, "server_timing": timing})
        except InputError as error:
            line = shortened(f"refused: {error}", MOST_TEXT)
        except self._closed:
            raise
        except Exception as error:  # whatever a policy can fail with: the other clients go on
            line = shortened(f"failed: {type(error).__name__}: {error}", MOST_TEXT)
            self._say(line)
        self._turned_down(line)
        return line

    def _think(
        self, connection: ServerConnection, session: ClientSession, question: Question
    ) -> tuple[float, float, dict[str, Any]]:
        """In the worker thread: when it began and ended, and the answer. Not for a client that has left meanwhile."""
        if connection.close_code is not None:
            raise self._closed(None, None)
        began = time.perf_counter()
        actions = session.answer(self._policy, question)
        return began, time.perf_counter(), actions


def _header(request: Request) -> str | None:
    """The one `Authorization` of a request; none where there are several."""
    given = request.headers.get_all("Authorization")
    return given[0] if len(given) == 1 else None


def _message_bytes(policy: DiffusionPolicy | OnnxPolicy) -> int:
    """What a history of float64 takes, with a running chunk and noise, and the words around them."""
    spec = policy.spec
    values = {key: spec.n_obs_steps * (1 if value.kind == "image" else 8) for key, value in spec.observations.items()}
    total = 2 * 8 * spec.horizon * spec.action.shape[0] + 4096
    for key, n_bytes in values.items():
        for size in spec.observations[key].shape:
            n_bytes *= size
        total += n_bytes
    return total


def _reason(error: OSError | UnicodeError) -> str:
    if isinstance(error, socket.gaierror | UnicodeError):
        return "no such host"
    if error.errno == errno.EADDRINUSE:
        return "the port is in use, give another one"
    return error.strerror or str(error)
