"""The page of a session as a web application: what the person sees, and what they say. See `page`."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect

from action_diffusion.deploy.messages import text
from action_diffusion.deploy.rings import Moment, RingReader
from action_diffusion.deploy.site import Site
from action_diffusion.deploy.teleop.device import Order
from action_diffusion.deploy.teleop.keys import KEYS
from action_diffusion.deploy.teleop.page import Inputs

FILES = {"/": "teleop.html", "/page.css": "page.css", "/teleop.css": "teleop.css", "/teleop.js": "teleop.js"}
PERIOD = 0.02
"""How often (s) somebody looks for something new to send."""


class SessionPage(Site):
    """One page drives: the first, or the one where somebody pressed a button last. The others watch.

    Args:
        folder: the run's shared memory.
        about: see `page_process.run`.
        loopback, token: see `Site`.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], *, loopback: bool, token: str | None) -> None:
        emergency = Moment(folder / "emergency") if about.get("emergency") else None
        super().__init__(files=FILES, about=about, emergency=emergency, loopback=loopback, token=token)
        self._inputs, self._watched = Inputs(folder), Moment(folder / "watched")
        self._sessions, self._pictures = RingReader(folder / "sessions"), RingReader(folder / "pictures")
        self._driver: WebSocket | None = None

    async def _show(self, socket: WebSocket) -> None:
        shown = pictured = -1
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            while True:
                self._watched.mark()
                session, picture = self._sessions.latest(), self._pictures.latest()
                if session is not None and session.number != shown:
                    shown = session.number
                    said = json.loads(text(session.values["json"]))
                    said["drives"] = self._driver is None or self._driver is socket
                    said["emergency"] = self._emergency is not None and self._emergency.t > 0
                    await socket.send_text(json.dumps(said, allow_nan=False))
                if picture is not None and picture.number != pictured:
                    pictured = picture.number
                    await socket.send_bytes(jpeg(picture.values["picture"]))
                await asyncio.sleep(PERIOD)

    def _obey(self, message: str, socket: WebSocket) -> None:
        said = understood(message)
        if said is None:
            return
        if "order" in said or self._driver is None:
            self._driver = socket
        if self._driver is socket:
            self._inputs.write(**said)

    def _left(self, socket: WebSocket) -> None:
        if self._driver is socket:
            self._driver = None


def understood(message: str) -> dict[str, Any] | None:
    """{"order": "start"} or {"pointer": [x, y] or null, "down": […], "pressed": […]}; None for anything else."""
    try:
        said = json.loads(message)
        if "order" in said:
            return {"order": int(Order[said["order"].upper()])}
        pointer = None if said["pointer"] is None else np.array(said["pointer"], dtype=np.float64)
        if pointer is not None and (pointer.shape != (2,) or not np.isfinite(pointer).all()):
            return None
        keys = {name: "\t".join(key for key in said[name][:16] if key in KEYS) for name in ("down", "pressed")}
        return {"pointer": pointer, **keys}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def jpeg(picture: np.ndarray) -> bytes:
    """`picture` uint8 [H, W, 3] as a file of some 15 kB."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=80)
    return file.getvalue()
