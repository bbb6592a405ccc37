"""The process that has a page's port, and stops the arm: no loop and no page is needed. See `stop_app`.

All other connections go to the page's process, which may be busy, hang or be dead: see `connections`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path

from action_diffusion.deploy.ipc.processes import Ending, report, serve
from action_diffusion.deploy.page.link import MISSING
from action_diffusion.deploy.page.process import CHANNEL
from action_diffusion.errors import InputError


def run(*, folder: Path, name: str, host: str, port: int, token_file: str | None, stops: bool) -> None:
    """Be at `host` and `port` (0: one that is free) until asked to end, or until the loop is gone.

    stops: there is an arm that can be stopped. Raises `InputError` for an address that cannot be had, a missing token,
    and a missing extra.
    """
    try:
        from starlette.applications import Starlette

        from action_diffusion.deploy.page.connections import Entrance, HandOver, Server, listen
        from action_diffusion.deploy.page.shared import Admission
        from action_diffusion.deploy.page.stop_app import Stop
    except ModuleNotFoundError:
        raise InputError(MISSING) from None
    admission, ending = Admission(host=host, token_file=token_file, run=folder.name), Ending()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    listening = listen(host, port)
    stop = Stop(folder, admission) if stops else None

    async def work() -> None:
        server = Server(stop.app if stop is not None else Starlette())
        watching = asyncio.create_task(stop.watch()) if stop is not None else None

        def ready() -> None:
            Entrance(listening, own=server.take, others=HandOver(folder / CHANNEL))
            report(folder, name, {"port": listening.getsockname()[1]})

        await server.serve_until(lambda: bool(ending), ready)
        if watching is not None:
            watching.cancel()

    asyncio.run(work())


def main() -> int:
    return serve(run)


if __name__ == "__main__":
    sys.exit(main())
