"""The page of a session and the loop, in processes of their own, so that no browser ever holds the loop up.

    browser ── WS /live ─▶ page's process ── ring `inputs` ───▶ loop: the device `Browser`
       ▲                        │  ◀──────── ring `sessions` ── loop: `Shown`, what a session's status says
       └────────────────────────┘  ◀──────── ring `pictures` ── of arms, while somebody looks

The page says thirty times a second where the pointer is and which keys are down. When it has been silent for half a
second, hangs, is hidden or is gone, nobody drives.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from action_diffusion.deploy.ipc.channels import text
from action_diffusion.deploy.ipc.rings import Fields, Moment, RingReader, RingWriter
from action_diffusion.deploy.page.link import PageLink
from action_diffusion.deploy.teleop.devices.device import Ask, Signals
from action_diffusion.deploy.teleop.devices.keys import HELP, Keys

INPUTS: Fields = {"order": ("i4", ()), "pointer": ("f8", (2,)), "down": ("S120", ()), "pressed": ("S120", ())}
"""order: 0 where there is none; pointer: NaN where there is none; keys are separated by tabs."""
TEXT = 2400
SESSIONS: Fields = {"json": (f"S{TEXT}", ())}
PICTURE = 256
SILENT = 0.5
"""After so many seconds without a word of the page nobody drives."""


class Shown:
    """The loop's end: what the page shows. Made before the page's process starts.

    Args:
        folder: the shared memory of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._sessions = RingWriter(folder / "sessions", fields=SESSIONS, n_slots=64)
        self._pictures = RingWriter(folder / "pictures", fields={"picture": ("u1", (PICTURE, PICTURE, 3))}, n_slots=4)
        self._watched = Moment.create(folder / "watched")

    @property
    def is_watched(self) -> bool:
        """Whether somebody has the page open."""
        return time.monotonic() - self._watched.t < 2 * SILENT

    def tell(self, status: Mapping[str, object]) -> None:
        """Plain values; a line that is too long is cut."""
        values = {**status, "message": str(status["message"])[:400]}
        self._sessions.append(time.monotonic(), {"json": json.dumps(values, allow_nan=False).encode()[:TEXT]})

    def picture(self, picture: np.ndarray) -> None:
        """uint8 [H, W, 3]; shown in a square of 256."""
        import cv2

        if picture.shape != (PICTURE, PICTURE, 3):
            picture = cv2.resize(picture, (PICTURE, PICTURE), interpolation=cv2.INTER_AREA)
        self._pictures.append(time.monotonic(), {"picture": picture})


class Pictures:
    """Pictures for the page, while somebody looks and something changes, as many as drawing them leaves time for.

    Args:
        draw: makes one, uint8 [H, W, 3], or None where the page draws by itself.
    """

    def __init__(self, draw: Callable[[], np.ndarray | None], shown: Shown) -> None:
        self._draw, self._shown = draw, shown
        self._next = 0.0
        self._of: tuple[str | None, int] = (None, -1)

    def __call__(self, mode: str, step: int) -> None:
        """The session is at `step` of an episode. Nothing is drawn twice, and drawing takes a third of the time."""
        began = time.monotonic()
        if not self._shown.is_watched:
            self._of = (None, -1)  # whoever comes next wants to see something
        elif began >= self._next and (mode, step) != self._of:
            picture = self._draw()
            if picture is not None:
                self._shown.picture(picture)
            now = time.monotonic()
            self._next, self._of = now + max(0.05, 2 * (now - began)), (mode, step)


class Browser:
    """See `device.Device`: the pointer of the page, or its keys.

    Args:
        folder: the shared memory of the run.
        page: the page's process.
        points: the pointer shows targets; otherwise keys drive.
    """

    def __init__(self, folder: Path, page: PageLink, *, points: bool) -> None:
        self._folder, self._page, self._points = folder, page, points
        self._keys = Keys()
        self.help = "move the pointer to the finger, and lead it" if points else HELP
        self._heard, self._t = -1, -np.inf
        self._pointer, self._down = np.full(2, np.nan), [""]

    def connect(self) -> None:
        self._inputs = RingReader(self._folder / "inputs")

    def poll(self) -> Signals:
        orders, pressed, new = [], [], []
        for record in self._inputs.after(self._heard):
            self._heard, self._t = record.number, record.t
            if int(record.values["order"]):
                orders.append(Ask(int(record.values["order"])))
            else:
                self._pointer = record.values["pointer"]
                new.append(_keys(text(record.values["down"])))
            pressed += _keys(text(record.values["pressed"]))
        silent = time.monotonic() - self._t > SILENT
        down = {key for keys in new or [self._down] for key in keys if not silent}  # a short tap counts
        self._down = new[-1] if new else self._down
        signals = self._keys.signals(down, pressed)
        signals = signals._replace(orders=(*orders, *signals.orders))
        if silent:
            return signals._replace(engaged=False, why=self._why())
        if self._points and not down:
            pointed = bool(np.isfinite(self._pointer).all())
            why = "" if pointed else "move the pointer, or a finger, onto the table"
            return signals._replace(engaged=pointed, why=why, target=self._pointer, twist=None)
        return signals

    def _why(self) -> str:
        if not self._page.alive:
            return "the page's process has died: end with Ctrl-C, what is kept is safe"
        return "the page is silent or hidden: paused"

    def close(self) -> None:
        pass


def _keys(joined: str) -> list[str]:
    return [key for key in joined.split("\t") if key]


class Inputs:
    """The page's end of the ring `inputs`."""

    def __init__(self, folder: Path) -> None:
        self._ring = RingWriter(folder / "inputs", fields=INPUTS, n_slots=512)

    def write(self, *, order: int = 0, pointer: np.ndarray | None = None, down: str = "", pressed: str = "") -> None:
        """One word of the page. pointer: [2]; keys: separated by tabs."""
        values = {
            "order": order,
            "pointer": np.full(2, np.nan) if pointer is None else pointer,
            "down": down.encode()[:120],
            "pressed": pressed.encode()[:120],
        }
        self._ring.append(time.monotonic(), values)
