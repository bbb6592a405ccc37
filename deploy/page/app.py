"""The operator's page as a web application: ten times a second the state and new pictures; orders back.

    GET /start/{number}    in trials: the picture of the start, of the camera with this number

What it shares with other pages, its addresses among it, is in `shared`.
"""

from __future__ import annotations

import asyncio
import json
import time

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.websockets import WebSocket

from action_diffusion.deploy.loop.operator import MOST_VALUES, Order, Orders
from action_diffusion.deploy.page.shared import HEADERS, Admission, BasePage, Nonsense, finite, understood
from action_diffusion.deploy.page.view import AboutRun, RunView

PERIOD = 0.1
OF_TRIALS = ("score", "redo", "undo", "home")
TAKING_OVER = ("take_over", "point", "own")
"""Orders that there are in trials only, and in other runs only."""


class Page(BasePage):
    """The application, `app`.

    Args:
        view: what it shows.
        about: what does not change.
        orders: to the loop.
    """

    def __init__(self, *, view: RunView, about: AboutRun, orders: Orders, admission: Admission) -> None:
        super().__init__(name="page", about=about, admission=admission)
        self._view, self._orders = view, orders
        self._cameras, self._n_dimensions = about["cameras"], len(about["dimensions"])
        self._parts, self._trials = about["parts"], about["trials"]
        self.app.router.routes.append(Route("/start/{number:int}", self._start))
        self._said, self._at = "", -PERIOD

    async def _start(self, request: Request) -> Response:
        refused, number = self.admission.refusal(request), request.path_params["number"]
        if refused is not None:
            return Response(status_code=refused)
        path = self._view.start_picture(self._cameras[number]) if number < len(self._cameras) else None
        if path is None or not path.is_file():
            return Response(status_code=404)
        return FileResponse(path, headers=HEADERS)

    def _state(self) -> str:
        """What the view shows, looked at once for all who watch."""
        now = time.monotonic()
        if now - self._at > PERIOD / 2:
            self._said, self._at = json.dumps(self._view.state(), allow_nan=False), now
        return self._said

    async def _show(self, socket: WebSocket) -> None:
        """State and pictures."""
        shown: dict[str, int] = {}
        while True:
            await socket.send_text(self._state())
            for index, camera in enumerate(self._cameras):
                picture = self._view.picture(camera)
                if picture is not None and picture[0] != shown.get(camera):
                    shown[camera] = picture[0]
                    await socket.send_bytes(bytes([index]) + picture[1])
            await asyncio.sleep(PERIOD)

    def _obey(self, message: str, socket: WebSocket) -> None:
        """An order, {"order": "pause"}, {"order": "point", "values": […]}, {"order": "own", "values": [1, 0, …]}; in
        trials {"order": "score", "value": 0.5}, and nobody takes over."""
        said = understood(message)
        order = str(said.get("order")).lower()
        if order in (TAKING_OVER if self._trials else OF_TRIALS):
            raise Nonsense("no such order")
        if order == "point":
            point = finite(said.get("values"), self._n_dimensions, "a point has a finite value for each dimension")
            if len(point) > MOST_VALUES:
                raise Nonsense("there are too many dimensions to point at")
            self._orders.point(point)
        elif order == "own":
            owned = finite(said.get("values"), self._n_dimensions, "owned is 1 or 0 for each dimension") > 0
            parts = [set(owned[part]) for part in self._parts]
            if not owned.any() or not parts or any(len(values) > 1 for values in parts):
                raise Nonsense("what is owned is one dimension or more, and a rotation as a whole")
            self._orders.own(owned)
        elif order == "score":
            score = float(finite([said.get("value")], 1, "a score has a finite value")[0])
            if not 0 <= score <= 1:
                raise Nonsense("a score is from 0 to 1")
            self._orders.give(Order.SCORE, score=score)
        elif order.upper() in Order.__members__:
            self._orders.give(Order[order.upper()])
        else:
            raise Nonsense("no such order")
