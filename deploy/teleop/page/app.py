"""The page of a session as a web application: what the person sees, and what they say. See `page`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.websockets import WebSocket

from action_diffusion.deploy.ipc.channels import text
from action_diffusion.deploy.ipc.rings import Moment, RingReader
from action_diffusion.deploy.page.shared import Admission, BasePage, Nonsense, finite, understood
from action_diffusion.deploy.page.view import jpeg
from action_diffusion.deploy.teleop.devices.device import Ask
from action_diffusion.deploy.teleop.devices.keys import KEYS
from action_diffusion.deploy.teleop.page.board import Inputs

PERIOD = 0.02
"""How often (s) somebody looks for something new to send."""


class SessionPage(BasePage):
    """One page drives: the first, or the one where somebody pressed a button last. The others watch.

    Args:
        folder: the run's shared memory.
        about: see `page.process.run`.
    """

    def __init__(self, folder: Path, about: Mapping[str, object], admission: Admission) -> None:
        super().__init__(name="teleop", about=about, admission=admission)
        self._inputs, self._watched = Inputs(folder), Moment(folder / "watched")
        self._sessions, self._pictures = RingReader(folder / "sessions"), RingReader(folder / "pictures")
        self._driver: WebSocket | None = None

    async def _show(self, socket: WebSocket) -> None:
        shown = pictured = -1
        while True:
            self._watched.mark()
            session, picture = self._sessions.latest(), self._pictures.latest()
            if session is not None and session.number != shown:
                shown = session.number
                said = json.loads(text(session.values["json"]))
                said["drives"] = self._driver is None or self._driver is socket
                await socket.send_text(json.dumps(said, allow_nan=False))
            if picture is not None and picture.number != pictured:
                pictured = picture.number
                await socket.send_bytes(jpeg(picture.values["picture"], quality=80))
            await asyncio.sleep(PERIOD)

    def _obey(self, message: str, socket: WebSocket) -> None:
        said = word(message)
        if "order" in said or self._driver is None:
            self._driver = socket
        if self._driver is socket:
            self._inputs.write(**said)

    def _left(self, socket: WebSocket) -> None:
        if self._driver is socket:
            self._driver = None


def word(message: str) -> dict[str, Any]:
    """{"order": "start"} or {"pointer": [x, y] or null, "down": […], "pressed": […]}. Raises `Nonsense`."""
    said = understood(message)
    try:
        if "order" in said:
            return {"order": int(Ask[said["order"].upper()])}
        pointer = said["pointer"]
        keys = {name: "\t".join(key for key in said[name][:16] if key in KEYS) for name in ("down", "pressed")}
    except (KeyError, TypeError, AttributeError):
        raise Nonsense("neither an order nor a pointer with keys") from None
    return {"pointer": None if pointer is None else finite(pointer, 2, "a pointer is two numbers"), **keys}
