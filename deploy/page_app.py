"""The operator's page as a web application: ten times a second the state and new pictures; orders back.

What it shares with other pages, its addresses among it, is in `site`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect

from action_diffusion.deploy.operation import Order, Orders
from action_diffusion.deploy.page_view import View
from action_diffusion.deploy.rings import Moment
from action_diffusion.deploy.site import Site

FILES = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js", "/draw.js": "draw.js"}
PERIOD = 0.1


class Page(Site):
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
        super().__init__(files=FILES, about=about, emergency=emergency, loopback=loopback, token=token)
        self._view, self._orders = view, orders

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

    def _obey(self, message: str, socket: WebSocket) -> None:
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
