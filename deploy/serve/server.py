"""The policy server: observations in, chunks out, over WebSocket in the protocol of `openpi-client`.

    client                                server
      │ ── connect to /NAME, token? ────▶ │  refused: wrong token, a web page's request, no such policy, too many
      │ ◀──────────── metadata (msgpack) ─ │  the policy's specification: `PolicySpec.to_json`
      │ ── observation (msgpack) ───────▶ │  ClientSession.take ─▶ Batcher ─▶ one worker thread
      │ ◀─── {actions, server_timing} ──── │  or a line of text, "refused: …" or "failed: …", and the connection goes on

Every connection is an episode of its own. A client has at most one question under way, so that taking questions in
their order is taking turns; what it costs to read, check and send for one client never holds up the others.

Over HTTP: GET /healthz, while it lives; /readyz, while it takes clients; /metrics, for Prometheus, with the token.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING

from action_diffusion.deploy.serve.access import is_authorized, require_token
from action_diffusion.deploy.serve.answering import Policy, warm_up
from action_diffusion.deploy.serve.batching import Batcher, Gone, Turns
from action_diffusion.deploy.serve.metrics import BundleMetrics, Metrics
from action_diffusion.deploy.serve.session import ClientSession
from action_diffusion.deploy.serve.wire import pack, require, shortened, unpack
from action_diffusion.errors import InputError
from action_diffusion.options.commands import ANSWERED, ONLY_SERVED
from action_diffusion.policy.inference import choose_shared_threads
from action_diffusion.policy.runtime.onnx_policy import OnnxPolicy
from action_diffusion.policy.spec import PolicySpec
from action_diffusion.policy.text.words import Words

if TYPE_CHECKING:
    from websockets.asyncio.server import ServerConnection
    from websockets.http11 import Request, Response

SEND_SECONDS = 10.0
"""A client that takes an answer no faster than this is let go."""
PING_SECONDS = 20.0
"""So often each side asks whether the other is there; one that stays silent as long again is let go."""
STUCK_SECONDS = 10.0
"""A server whose policy computes for longer is not ready."""
HEALTH, READY, METRICS = (f"/{name}" for name in ANSWERED)
MOST_TEXT = 500
"""Characters of a line that goes out instead of an answer, whatever a message held."""


class _Served:
    """A policy by its name, who is connected to it, and what they ask."""

    def __init__(
        self,
        name: str,
        policies: Sequence[Policy],
        turns: Turns,
        metrics: Metrics,
        new_session: Callable[[], ClientSession],
        *,
        most: int,
        wait: float,
    ) -> None:
        self.n_connections = 0
        self.new_session = new_session
        self.counted = metrics.of(name, lambda: self.n_connections, lambda: self.batcher.n_waiting)
        self.batcher = Batcher(
            policies, turns, most=most, wait=wait, n_clients=lambda: self.n_connections, computed=self.counted.computed
        )
        self.answer_with(policies)

    def answer_with(self, policies: Sequence[Policy]) -> None:
        """From the next call on, and with its metadata for who comes from now on."""
        self.batcher.policies = policies
        self.metadata = pack({"policy": "action-diffusion", **self.spec.to_json()})

    @property
    def spec(self) -> PolicySpec:
        return self.batcher.policies[0].spec


class PolicyServer:
    """Answers clients until `stop`.

    Args:
        policies: of each the copies that compute side by side, as many of all; by the names that clients connect to,
            ws://HOST:PORT/NAME. The only one is had wherever they connect to, if it is `ONLY_SERVED`.
        token: that clients must show; required where `host` is not this machine alone.
        max_connections: more are turned away.
        max_message_bytes: of what a client sends; a larger message ends its connection.
        max_batch, batch_wait: questions answered together, and seconds that the first waits for others: see `Batcher`.
        seed, remember: see `ClientSession`. words: by the names of the policies that are told something else.
        say: takes a line about something that went wrong here.
        answered: is told how many seconds the policy took for an answer.
        turned_down: is told of every line of text that went out instead.
    """

    def __init__(
        self,
        *,
        policies: Mapping[str, Sequence[Policy]],
        host: str = "127.0.0.1",
        port: int = 8000,
        token: str | None = None,
        max_connections: int = 16,
        max_message_bytes: int = 2**24,
        max_batch: int = 8,
        batch_wait: float = 0.002,
        seed: int | None = None,
        remember: bool = True,
        words: Mapping[str, Words] | None = None,
        say: Callable[[str], None] = print,
        answered: Callable[[float], None] = lambda seconds: None,
        turned_down: Callable[[str], None] = lambda line: None,
    ) -> None:
        require_token(host, token, option="host", files="token_file")
        needed = max(_message_bytes(copies[0]) for copies in policies.values())
        if max_message_bytes < needed:
            raise InputError(
                f"max_message_mb={max_message_bytes / 2**20:.2g} is too little: a history takes {needed / 2**20:.2g}"
            )
        self._host, self._port, self._token = host, port, token
        self._max_connections, self._max_message_bytes, self._max_batch = max_connections, max_message_bytes, max_batch
        self._say, self._answered, self._turned_down = say, answered, turned_down
        self._closed: type[Exception] = require("websockets.exceptions").ConnectionClosed
        self._stop = asyncio.Event()
        self.metrics, self._turns = Metrics(), Turns(len(next(iter(policies.values()))))
        self._served = {
            name: _Served(
                *(name, copies, self._turns, self.metrics),
                functools.partial(
                    ClientSession, spec=copies[0].spec, seed=seed, remember=remember, words=(words or {}).get(name)
                ),
                most=max_batch,
                wait=batch_wait,
            )
            for name, copies in policies.items()
        }

    @property
    def n_connections(self) -> int:
        return sum(served.n_connections for served in self._served.values())

    @property
    def specs(self) -> dict[str, PolicySpec]:
        return {name: served.spec for name, served in self._served.items()}

    def counted(self, name: str) -> BundleMetrics:
        return self._served[name].counted

    def warm_up(self) -> None:
        """Choose threads and kernels, for every number of questions that may be answered together: takes seconds."""
        policies = [policy for served in self._served.values() for policy in served.batcher.policies]
        choose_shared_threads(policies, at_once=self._turns.n)
        for policy in policies:
            for rows in range(1, self._max_batch + 1):
                warm_up(policy, rows)

    def stop(self) -> None:
        """Let `serve` return; from its own event loop."""
        self._stop.set()

    async def replace(self, name: str, policies: Sequence[Policy]) -> None:
        """Answer with another policy from now on, in the midst of clients' episodes: as many copies as before.

        It is warmed up first, in turns with their questions. Raises `InputError` where clients could not go on with it,
        and then the old one stays.
        """
        served = self._served[name]
        old, new = served.batcher.policies[0], policies[0]
        check_replacement(old, new)
        said = [await self._turns.alone(warm_up, one, 1) for one in (old, new)]
        if said[0] != said[1]:
            raise InputError(f"it says {', '.join(sorted(said[1]))}, and clients may need {', '.join(sorted(said[0]))}")
        for policy in policies:
            for rows in range(1, self._max_batch + 1):
                await self._turns.alone(warm_up, policy, rows)
        served.answer_with(policies)

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
        try:
            server = await listening
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that no host can have
            raise InputError(f"cannot listen at host={self._host} port={self._port}: {_reason(error)}") from None
        try:
            async with asyncio.TaskGroup() as answering:
                running = [answering.create_task(served.batcher.run()) for served in self._served.values()]
                async with server:
                    ready(server.sockets[0].getsockname()[1])
                    await self._stop.wait()
                for task in running:
                    task.cancel()
        finally:
            self._turns.close()

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Before the handshake: an HTTP answer, or None to go on."""
        path = request.path.partition("?")[0]
        if path == HEALTH:
            return connection.respond(HTTPStatus.OK, "OK\n")
        if path == READY:
            why_not = self._not_ready()
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE if why_not else HTTPStatus.OK, why_not or "OK\n")
        if "Sec-Fetch-Site" in request.headers:  # of a web page, though it names no origin
            return connection.respond(HTTPStatus.FORBIDDEN, "web pages do not come in\n")
        if not is_authorized(_header(request), self._token):
            return connection.respond(HTTPStatus.UNAUTHORIZED, "this server asks for a token (openpi: api_key)\n")
        if path == METRICS:
            response = connection.respond(HTTPStatus.OK, self.metrics.text().decode())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = self.metrics.content_type
            return response
        if self._asked_for(request) is None:
            names = ", ".join(sorted(self._served))
            line = f"no policy {shortened(path)}; this server has {names}: connect to ws://HOST:PORT/NAME"
            return connection.respond(HTTPStatus.NOT_FOUND, f"{line}\n")
        if self.n_connections >= self._max_connections:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections\n")
        return None

    def _not_ready(self) -> str:
        """Why a load balancer should send clients elsewhere; "" if it need not."""
        if self._stop.is_set():
            return "it ends\n"
        if self._turns.busy_seconds > STUCK_SECONDS:
            return f"the policy has been computing for over {STUCK_SECONDS:g} s\n"
        return "too many connections\n" if self.n_connections >= self._max_connections else ""

    def _asked_for(self, request: Request) -> _Served | None:
        """The policy of a client's URL."""
        if self._served.keys() == {ONLY_SERVED}:
            return self._served[ONLY_SERVED]
        name = request.path.partition("?")[0].strip("/")
        only = next(iter(self._served)) if len(self._served) == 1 else ""
        return self._served.get(name or only)

    async def _converse(self, connection: ServerConnection) -> None:
        """One client, from its metadata to its end."""
        assert connection.request is not None
        served = self._asked_for(connection.request)
        if served is None or self.n_connections >= self._max_connections:  # several passed `_admit` at once
            await connection.close(1013, "too many connections")
            return
        session = served.new_session()
        timing: dict[str, float] = {}
        served.n_connections += 1
        try:
            await asyncio.wait_for(connection.send(served.metadata), SEND_SECONDS)
            async for message in connection:
                began = time.perf_counter()
                answer = await self._answer(connection, served, session, message, timing)
                await asyncio.wait_for(connection.send(answer), SEND_SECONDS)
                timing = {"prev_total_ms": 1e3 * (time.perf_counter() - began)}
        except TimeoutError:
            connection.transport.abort()
        except (Gone, self._closed):
            pass
        finally:
            served.n_connections -= 1

    async def _answer(
        self,
        connection: ServerConnection,
        served: _Served,
        session: ClientSession,
        message: str | bytes,
        timing: dict[str, float],
    ) -> bytes | str:
        came = time.perf_counter()
        served.counted.asked()
        try:
            if isinstance(message, str):
                raise InputError("the message is text, not msgpack")
            question = session.take(unpack(message))
            waited = time.perf_counter()
            outcome, began, seconds = await served.batcher.ask(question, lambda: connection.close_code is not None)
            if isinstance(outcome, Exception):
                raise outcome
            timing = {"infer_ms": 1e3 * seconds, "wait_ms": 1e3 * (began - waited), **timing}
            answer = pack({**outcome, "server_timing": timing})
        except InputError as error:
            kind, line = "refused", shortened(f"refused: {error}", MOST_TEXT)
        except (Gone, self._closed):
            raise
        except Exception as error:  # whatever a policy can fail with: the other clients go on
            kind, line = "failed", shortened(f"failed: {type(error).__name__}: {error}", MOST_TEXT)
            self._say(line)
        else:
            self._answered(seconds)
            served.counted.answered(time.perf_counter() - came)
            return answer
        served.counted.not_answered(kind)
        self._turned_down(line)
        return line


def check_replacement(old: Policy, new: Policy) -> None:
    """`InputError` where clients of `old` could not go on with `new`."""
    difference = old.spec.difference(new.spec)
    if difference:
        raise InputError(f"it is for other robots: {difference}")
    if isinstance(new, OnnxPolicy) and not isinstance(old, OnnxPolicy):
        raise InputError("an ONNX file cannot continue running chunks, as the bundle before it can")


def _header(request: Request) -> str | None:
    """The one `Authorization` of a request; none where there are several."""
    given = request.headers.get_all("Authorization")
    return given[0] if len(given) == 1 else None


def _message_bytes(policy: Policy) -> int:
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
