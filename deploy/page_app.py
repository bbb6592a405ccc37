"""The operator's page as a web application: one static page, a socket with what changes, and an emergency stop.

    GET /            the page; no secret in it
    POST /session    a token for a cookie, where a token is asked for
    GET /about       what does not change
    WS /live         ▲ ten times a second the state, and new pictures;  ▼ orders
    POST /emergency  marks the moment that the arm's process looks at: no loop is needed
    POST /clear      takes it back; its body says that somebody meant it

Whatever another page in the same browser tries is refused: requests that change something come from this page's own
origin, and on a loopback host only under a loopback name.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
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

from action_diffusion.deploy.access import is_authorized, is_loopback
from action_diffusion.deploy.operation import Order, Orders
from action_diffusion.deploy.page_view import View
from action_diffusion.deploy.rings import Moment

STATIC = Path(__file__).resolve().parent / "static"
FILES = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js", "/draw.js": "draw.js"}
PERIOD = 0.1
COOKIE = "action-diffusion"
CLEARED = "the area is safe"
"""What a request to clear the emergency stop says."""
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Page:
    """The application, `app`.

    Args:
        view: what it shows.
        about: what does not change; `cameras`: names of them.
        orders: to the loop.
        emergency: the moment that the arm's process looks at.
        loopback: it listens where only this machine comes in.
        token: what others have to know.
    """

    def __init__(
        self,
        *,
        view: View,
        about: Mapping[str, Any],
        orders: Orders,
        emergency: Moment,
        loopback: bool,
        token: str | None,
    ) -> None:
        self._view, self._about, self._orders, self._emergency = view, about, orders, emergency
        self._loopback, self._token, self._session = loopback, token, secrets.token_urlsafe()
        routes: list[Any] = [Route(path, self._file) for path in FILES]
        routes += [Route("/about", self._tell), Route("/session", self._enter, methods=["POST"])]
        routes += [Route("/emergency", self._stop, methods=["POST"]), Route("/clear", self._clear, methods=["POST"])]
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
        return FileResponse(STATIC / FILES[request.url.path], headers=_HEADERS)

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
        refused = self._refusal(request)
        if refused is None:
            self._emergency.mark()
        return Response(status_code=refused or 204)

    async def _clear(self, request: Request) -> Response:
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
                self._obey(await socket.receive_text())
        except WebSocketDisconnect:
            pass
        finally:
            showing.cancel()

    async def _show(self, socket: WebSocket) -> None:
        """State and pictures, for as long as there is somebody to see them."""
        shown: dict[str, int] = {}
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            while True:
                await socket.send_text(json.dumps(self._view.state(), allow_nan=False))
                for index, camera in enumerate(self._about["cameras"]):
                    picture = self._view.picture(camera)
                    if picture is not None and picture[0] != shown.get(camera):
                        shown[camera] = picture[0]
                        await socket.send_bytes(bytes([index]) + picture[1])
                await asyncio.sleep(PERIOD)

    def _obey(self, message: str) -> None:
        """An order, {"order": "pause"}, or {"order": "point", "values": […]}; anything else is ignored."""
        try:
            said = json.loads(message)
            order = Order[str(said["order"]).upper()]
            values = np.array(said.get("values", []), dtype=np.float64)
        except (ValueError, KeyError, TypeError, AttributeError):
            return
        if order is not Order.POINT:
            self._orders.give(order)
        elif values.shape == (len(self._about["dimensions"]),) and np.isfinite(values).all() and len(values) <= 32:
            self._orders.give(order, values)
