"""The page's process: it reads the run's rings and writes orders. Nobody waits for it, and nobody needs it to stop."""

from __future__ import annotations

import contextlib
import os
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
        from action_diffusion.deploy.page_app import Page
        from action_diffusion.deploy.site import listen, serve_site
    except ModuleNotFoundError:
        raise InputError(MISSING) from None
    token = page_token(host, token_file)
    ending = Ending()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 5)
    listening = listen(host, port)
    view = View(folder, about)
    page = Page(
        view=view,
        about=about,
        orders=Orders(folder),
        emergency=Moment(folder / "emergency"),
        loopback=is_loopback(host),
        token=token,
    )

    def is_over() -> bool:
        view.look()  # also while nobody is at the page
        return bool(ending)

    report(folder, name, {"port": listening.getsockname()[1]})
    serve_site(page.app, listening, is_over)


def page_token(host: str, token_file: str | None) -> str | None:
    """What others have to know; None where nobody else gets in. Raises `InputError` where they would without one."""
    token = read_token(token_file) if token_file or not is_loopback(host) else None
    if token is None and not is_loopback(host):
        raise InputError(f"page_host={host} lets other machines in: give page_token_file=, or set a token")
    return token


def main() -> int:
    return serve(run)


if __name__ == "__main__":
    sys.exit(main())
