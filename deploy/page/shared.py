"""What the pages of a run have in common: static files, who may come in, a socket that has no time for nonsense.

What they have in common in the browser is in `static/shared.js`.

    GET /            the page; no secret in it
    POST /session    a token for a cookie, where a token is asked for
    GET /about       what does not change
    WS /live         what changes, and orders

The emergency stop is elsewhere, in a process of its own: `stop_process`, which has the port (see `connections`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from action_diffusion.deploy.serve.access import is_authorized, is_loopback, read_token, require_token, session

STATIC = Path(__file__).resolve().parent / "static"
COMMON = ("page.css", "shared.js", "draw.js", "stop.js", "trial.js")
"""Files of `STATIC` that every page uses."""
COOKIE = "action-diffusion"
MOST_SOCKETS = 100
"""WebSockets at once, of either process."""
MESSAGES, BURST = 100.0, 200
"""A second, that a page may send on a socket, and at once after a silence; one that sends more is cut off."""
PENALTY = 2.0
"""Seconds until it is, in which nothing of it is read: who comes back at once costs nothing either."""
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Admission:
    """Who may come in. Whatever another page in the same browser tries is refused.

    Requests come from the page's own origin, and on a loopback host only under a loopback name. So it works through an
    SSH tunnel, whatever its port there, and behind a proxy with TLS that says so (X-Forwarded-Proto).

    Args:
        host: where it listens.
        token_file: of what others have to know.
        run: the name of the run's folder: its processes let in the same browsers.

    Raises:
        InputError: where others would get in without a token.
    """

    def __init__(self, *, host: str, token_file: str | None, run: str) -> None:
        self._loopback = is_loopback(host)
        self.token = read_token(token_file) if token_file or not self._loopback else None
        require_token(host, self.token, option="page_host", files="page_token_file")
        self.session = session(self.token, run)

    def refusal(self, connection: HTTPConnection, *, known: bool = True) -> int | None:
        """The HTTP status with which a request is turned down; None where it may come in."""
        host = connection.headers.get("host", "")
        if self._loopback and not is_loopback(_hostname(host)):
            return 403  # a name that somebody made to point here
        origin = connection.headers.get("origin")
        scheme = "https" if connection.url.scheme in ("https", "wss") else "http"
        if origin is not None and origin != f"{scheme}://{host}":
            return 403
        if origin is None and connection.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return 403
        if known and not hmac.compare_digest(connection.cookies.get(COOKIE, "").encode(), self.session.encode()):
            return 401 if self.token is not None else None
        return None


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


class Nonsense(ValueError):
    """A message that no page of ours sends."""


class Allowance:
    """How many messages a socket may bring: `MESSAGES` a second in the long run, `BURST` at once."""

    def __init__(self) -> None:
        self._left, self._at = float(BURST), time.monotonic()

    def take(self) -> bool:
        """Whether one more is allowed."""
        now = time.monotonic()
        self._left, self._at = min(BURST, self._left + MESSAGES * (now - self._at)), now
        self._left -= 1
        return self._left >= 0


class Sockets:
    """WebSockets of those who may come in, `MOST_SOCKETS` at once; subclasses say what they bring."""

    def __init__(self, admission: Admission) -> None:
        self.admission, self._n_sockets = admission, 0

    async def live(self, socket: WebSocket) -> None:
        """One socket, from its handshake to its end. One that brings nonsense, or too much, is closed with a reason."""
        if self.admission.refusal(socket) is not None:
            await socket.close(1008)
            return
        if self._n_sockets >= MOST_SOCKETS:
            await socket.close(1013)
            return
        self._n_sockets += 1
        allowance = Allowance()
        await socket.accept()
        showing = asyncio.create_task(self._show_until_gone(socket))
        try:
            while (message := await socket.receive())["type"] == "websocket.receive":
                if not allowance.take():
                    await asyncio.sleep(PENALTY)
                    await socket.close(1008, "too many messages")
                    break
                if message.get("text") is None:
                    await socket.close(1003, "messages are text")
                    break
                self._obey(message["text"], socket)
        except Nonsense as error:
            await socket.close(1008, str(error))
        except WebSocketDisconnect:
            pass
        finally:
            self._n_sockets -= 1
            showing.cancel()
            self._left(socket)

    async def _show_until_gone(self, socket: WebSocket) -> None:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            await self._show(socket)

    async def _show(self, socket: WebSocket) -> None:
        """What changes, for ever: it is ended when nobody is there to see it."""
        raise NotImplementedError

    def _obey(self, message: str, socket: WebSocket) -> None:
        """What a page says. Raises `Nonsense`."""
        raise NotImplementedError

    def _left(self, socket: WebSocket) -> None:
        """Somebody has closed the page, or was cut off."""


class BasePage(Sockets):
    """The application, `app`.

    Args:
        name: of the page's own files in `static/`: .html, .css and .js.
        about: what does not change.
    """

    def __init__(self, *, name: str, about: Mapping[str, object], admission: Admission) -> None:
        super().__init__(admission)
        own = (f"{name}.css", f"{name}.js")
        self._files, self._about = {"/": f"{name}.html"} | {f"/{file}": file for file in (*COMMON, *own)}, about
        routes = [Route(path, self._file) for path in self._files]
        routes += [Route("/about", self._tell), Route("/session", self._enter, methods=["POST"])]
        self.app = Starlette(routes=[*routes, WebSocketRoute("/live", self.live)])

    async def _file(self, request: Request) -> Response:
        return FileResponse(STATIC / self._files[request.url.path], headers=HEADERS)

    async def _tell(self, request: Request) -> Response:
        refused = self.admission.refusal(request)
        if refused is not None:
            return Response(status_code=refused)
        return JSONResponse(dict(self._about), headers=HEADERS)

    async def _enter(self, request: Request) -> Response:
        refused = self.admission.refusal(request, known=False)
        if refused is None and not is_authorized(request.headers.get("authorization"), self.admission.token):
            refused = 401
        if refused is not None:
            return Response(status_code=refused)
        answer = Response(status_code=204)
        answer.set_cookie(COOKIE, self.admission.session, httponly=True, samesite="strict")
        return answer


def understood(message: str) -> dict[str, Any]:
    """The JSON object that a page says. Raises `Nonsense`."""
    try:
        said = json.loads(message)
    except (ValueError, RecursionError):
        raise Nonsense("no JSON") from None
    if not isinstance(said, dict):
        raise Nonsense("no JSON object")
    return said


def finite(said: object, n: int, otherwise: str) -> np.ndarray:
    """The `n` finite numbers, float64 [n], that a page says. Raises `Nonsense` with `otherwise` for anything else."""
    try:
        values = np.array(said, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        raise Nonsense(otherwise) from None
    if values.shape != (n,) or not np.isfinite(values).all():
        raise Nonsense(otherwise)
    return values
