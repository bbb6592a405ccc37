"""The page's process: it reads the run's rings and writes orders. Nobody waits for it, and nobody needs it to stop.

Its connections come from `stop_process`, which has the port.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from action_diffusion.deploy.ipc.processes import Ending, report, serve
from action_diffusion.deploy.loop.operator import Orders
from action_diffusion.deploy.page.link import MISSING
from action_diffusion.deploy.page.view import AboutRun, RunView
from action_diffusion.errors import InputError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

CHANNEL = "connections"
"""The socket in the run's folder through which they come."""


def run(*, folder: Path, name: str, host: str, token_file: str | None, about: AboutRun) -> None:
    """Serve the page, of which others know as `host`, until asked to end, or until the loop is gone.

    Raises `InputError` for a missing token, and a missing extra.
    """
    try:
        from action_diffusion.deploy.page.app import Page
        from action_diffusion.deploy.page.shared import Admission
    except ModuleNotFoundError:
        raise InputError(MISSING) from None
    admission, ending = Admission(host=host, token_file=token_file, run=folder.name), Ending()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 5)
    view = RunView(folder, about)
    page = Page(view=view, about=about, orders=Orders(folder), admission=admission)

    def is_over() -> bool:
        view.look()  # also while nobody is at the page
        return bool(ending)

    serve_page(page.app, folder, name, is_over)


def serve_page(app: ASGIApp, folder: Path, name: str, is_over: Callable[[], bool]) -> None:
    """Answer with `app` what comes through `CHANNEL`, and say that it does, until `is_over`."""
    from action_diffusion.deploy.page.connections import Server, receive

    async def work() -> None:
        server = Server(app)

        def ready() -> None:
            receive(folder / CHANNEL, server.take)
            report(folder, name, {})

        await server.serve_until(is_over, ready)

    asyncio.run(work())


def main() -> int:
    return serve(run)


if __name__ == "__main__":
    sys.exit(main())
