"""The emergency stop as a web application, in a process where nothing else waits before it: see `stop_process`.

WS /stop         "stop" stops; at every change, and twice a second, whether the stop is set, and what the arm does
POST /emergency  marks the moment that the arm's process looks at, for whoever has no such socket
POST /clear      takes it back; its body says that somebody meant it
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from action_diffusion.deploy.ipc.channels import Phase
from action_diffusion.deploy.ipc.rings import Moment, RingReader
from action_diffusion.deploy.page.shared import Admission, Nonsense, Sockets

CLEARED = b"the area is safe"
"""What a request to clear the emergency stop says."""
PERIOD, LOOK = 0.5, 0.01
"""Seconds between two words while nothing happens, and between two looks at what the arm does."""


class Stop(Sockets):
    """The application, `app`.

    Args:
        folder: the run's shared memory, with the arm's ring `setpoints` and the moment `emergency`.
    """

    def __init__(self, folder: Path, admission: Admission) -> None:
        super().__init__(admission)
        self._emergency, self._setpoints = Moment(folder / "emergency"), RingReader(folder / "setpoints")
        self._word, self._news = "", asyncio.Event()
        routes = [Route("/emergency", self._mark, methods=["POST"]), Route("/clear", self._clear, methods=["POST"])]
        self.app = Starlette(routes=[*routes, WebSocketRoute("/stop", self.live)])

    async def watch(self) -> None:
        """For all sockets: see what changes."""
        while True:
            word = self._now()
            if word != self._word:
                self._word = word
                self._news.set()
                self._news = asyncio.Event()
            await asyncio.sleep(LOOK)

    def _now(self) -> str:
        emergency = self._emergency.t > 0
        return json.dumps({"emergency": emergency, "obeyed": emergency and self._obeyed()})

    def _obeyed(self) -> bool:
        """Whether the arm's process has seen the stop: it has sent a setpoint since, and is not free to move."""
        record = self._setpoints.latest()
        return record is not None and record.t > self._emergency.t and int(record.values["phase"]) != Phase.MOVING

    async def _show(self, socket: WebSocket) -> None:
        while True:
            news = self._news
            await socket.send_text(self._now())  # a page that comes right after a stop hears of it at once
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), PERIOD)

    def _obey(self, message: str, socket: WebSocket) -> None:
        if message != "stop":
            raise Nonsense('there is one message: "stop"')
        self._emergency.mark()

    async def _mark(self, request: Request) -> Response:
        refused = self.admission.refusal(request)
        if refused is None:
            self._emergency.mark()
        return Response(status_code=refused or 204)

    async def _clear(self, request: Request) -> Response:
        refused = self.admission.refusal(request)
        if refused is None and not await _says(request, CLEARED):
            refused = 400
        if refused is None:
            self._emergency.clear()
        return Response(status_code=refused or 204)


async def _says(request: Request, words: bytes) -> bool:
    """Whether the body of `request` is `words`; no more of it is read than it takes to know."""
    body = b""
    with contextlib.suppress(ClientDisconnect):
        async for part in request.stream():
            body += part
            if not words.startswith(body):
                return False
        return body == words
    return False
