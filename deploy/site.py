"""What the pages of a run have in common: static files, who may come in, an emergency stop, a socket, one port.

    GET /            the page; no secret in it
    POST /session    a token for a cookie, where a token is asked for
    GET /about       what does not change
    WS /live         what changes, and orders
    POST /emergency  marks the moment that the arm's process looks at: no loop is needed
    POST /clear      takes it back; its body says that somebody meant it

Whatever another page in the same browser tries is refused: requests that change something come from this page's own
origin, and on a loopback host only under a loopback name. So it works through an SSH tunnel, whatever its port there.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from action_diffusion.deploy.access import is_authorized, is_loopback
from action_diffusion.deploy.rings import Moment
from action_diffusion.errors import InputError

STATIC = Path(__file__).resolve().parent / "static"
COOKIE = "action-diffusion"
CLEARED = "the area is safe"
"""What a request to clear the emergency stop says."""
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Site:
    """The application, `app`. Subclasses say what the socket brings.

    Args:
        files: path → a file in `static/`.
        about: what does not change.
        emergency: the moment that the arm's process looks at; None where there is no arm.
        loopback: it listens where only this machine comes in.
        token: what others have to know.
    """

    def __init__(
        self,
        *,
        files: Mapping[str, str],
        about: Mapping[str, Any],
        emergency: Moment | None,
        loopback: bool,
        token: str | None,
    ) -> None:
        self._files, self._about, self._emergency = files, about, emergency
        self._loopback, self._token, self._session = loopback, token, secrets.token_urlsafe()
        routes: list[Any] = [Route(path, self._file) for path in files]
        routes += [Route("/about", self._tell), Route("/session", self._enter, methods=["POST"])]
        if emergency is not None:
            routes += [Route("/emergency", self._stop, methods=["POST"])]
            routes += [Route("/clear", self._clear, methods=["POST"])]
        self.app = Starlette(routes=[*routes, WebSocketRoute("/live", self._live)])

    def _refusal(self, connection: HTTPConnection, *, known: bool = True) -> int | None:
        """The HTTP status with which a request is turned down; None where it may come in."""
        host = urlsplit(f"//{connection.headers.get('host', '')}").hostname or ""
        if self._loopback and not is_loopback(host):
            return 403  # a name that somebody made to point here
        origin = connection.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != connection.headers.get("host"):
            return 403
        if known and self._token is not None:
            session = connection.cookies.get(COOKIE, "")
            if not secrets.compare_digest(session.encode(), self._session.encode()):
                return 401
        return None

    async def _file(self, request: Request) -> Response:
        return FileResponse(STATIC / self._files[request.url.path], headers=_HEADERS)

    async def _tell(self, request: Request) -> Response:
        refused = self._refusal(request)
        if refused is not None:
            return Response(status_code=refused)
        return JSONResponse(dict(self._about), headers=_HEADERS)

    async def _enter(self, request: Request) -> Response:
        refused = self._refusal(request, known=False)
        if refused is None and not is_authorized(request.headers.get("authorization"), self._token):
            refused = 401
        if refused is not None:
            return Response(status_code=refused)
        answer = Response(status_code=204)
        answer.set_cookie(COOKIE, self._session, httponly=True, samesite="strict")
        return answer

    async def _stop(self, request: Request) -> Response:
        assert self._emergency is not None
        refused = self._refusal(request)
        if refused is None:
            self._emergency.mark()
        return Response(status_code=refused or 204)

    async def _clear(self, request: Request) -> Response:
        assert self._emergency is not None
        refused = self._refusal(request)
        if refused is None and (await request.body()).decode("utf-8", "replace") != CLEARED:
            refused = 400
        if refused is None:
            self._emergency.clear()
        return Response(status_code=refused or 204)

    async def _live(self, socket: WebSocket) -> None:
        refused = self._refusal(socket)
        if refused is not None:
            await socket.close(1008)
            return
        await socket.accept()
        showing = asyncio.create_task(self._show(socket))
        try:
            while True:
                self._obey(await socket.receive_text(), socket)
        except WebSocketDisconnect:
            pass
        finally:
            showing.cancel()
            self._left(socket)

    async def _show(self, socket: WebSocket) -> None:
        """What changes, for as long as there is somebody to see it."""
        raise NotImplementedError

    def _obey(self, message: str, socket: WebSocket) -> None:
        """What a page says; nonsense is ignored."""
        raise NotImplementedError

    def _left(self, socket: WebSocket) -> None:
        """Somebody has closed the page, or was cut off."""


def listen(host: str, port: int) -> socket.socket:
    """Raises `InputError` for an address that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise InputError(f"page: cannot listen at {host}:{port}: {error.strerror or error}") from None


def serve_site(app: Any, listening: socket.socket, is_over: Callable[[], bool]) -> None:
    """Serve until `is_over`, which is asked five times a second."""

    async def watch(server: Any) -> None:
        while not is_over():
            await asyncio.sleep(0.2)
        server.should_exit = True

    async def work() -> None:
        quiet: dict[str, Any] = {"log_level": "critical", "access_log": False, "lifespan": "off"}
        config = uvicorn.Config(app, ws="websockets-sansio", ws_max_size=1 << 16, timeout_graceful_shutdown=1, **quiet)
        server = uvicorn.Server(config)
        watching = asyncio.create_task(watch(server))
        await server.serve(sockets=[listening])
        watching.cancel()

    asyncio.run(work())
