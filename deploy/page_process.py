"""The page's process: it reads the run's rings and writes orders. Nobody waits for it, and nobody needs it to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from action_diffusion.deploy.access import is_loopback, read_token
from action_diffusion.deploy.operation import Orders
from action_diffusion.deploy.page_view import View
from action_diffusion.deploy.processes import Ending, report, serve
from action_diffusion.deploy.rings import Moment
from action_diffusion.errors import InputError

MISSING = "the operator's page needs the extra [page]: pip install 'action-diffusion[page]'"


def run(*, folder: Path, name: str, host: str, port: int, token_file: str | None, about: Mapping[str, Any]) -> None:
    """Serve the page at `host` and `port` (0: one that is free) until asked to end, or until the loop is gone.

    about: task, control_rate, n_obs_steps, cameras, dimensions (a name each), limits and plane: see `onlookers`.
    Raises `InputError` for an address that cannot be had, a missing token, and a missing extra.
    """
    try:
        import uvicorn

        from action_diffusion.deploy.page_app import Page
    except ModuleNotFoundError:
        raise InputError(MISSING) from None
    token = read_token(token_file) if token_file or not is_loopback(host) else None
    if token is None and not is_loopback(host):
        raise InputError(f"page_host={host} lets other machines in: give page_token_file=, or set a token")
    ending = Ending()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 5)
    listening = _listen(host, port)
    view = View(folder, about)
    page = Page(
        view=view,
        about=about,
        orders=Orders(folder),
        emergency=Moment(folder / "emergency"),
        loopback=is_loopback(host),
        token=token,
    )
    quiet: dict[str, Any] = {"log_level": "critical", "access_log": False, "lifespan": "off"}
    config = uvicorn.Config(page.app, ws="websockets-sansio", ws_max_size=1 << 16, timeout_graceful_shutdown=1, **quiet)
    server = uvicorn.Server(config)
    report(folder, name, {"port": listening.getsockname()[1]})
    asyncio.run(_serve(server, listening, view, ending))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise InputError(f"page: cannot listen at {host}:{port}: {error.strerror or error}") from None


async def _serve(server: Any, listening: socket.socket, view: View, ending: Ending) -> None:
    async def watch() -> None:
        while not ending:
            view.look()  # also while nobody is at the page
            await asyncio.sleep(0.2)
        server.should_exit = True

    watching = asyncio.create_task(watch())
    await server.serve(sockets=[listening])
    watching.cancel()


def main() -> int:
    return serve(run)


if __name__ == "__main__":
    sys.exit(main())
