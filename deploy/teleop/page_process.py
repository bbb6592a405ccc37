"""The process of a session's page: see `page`. Nobody waits for it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from action_diffusion.deploy.access import is_loopback
from action_diffusion.deploy.page_process import MISSING, page_token
from action_diffusion.deploy.processes import Ending, report, serve
from action_diffusion.errors import InputError


def run(*, folder: Path, name: str, host: str, port: int, token_file: str | None, about: Mapping[str, Any]) -> None:
    """Serve the page at `host` and `port` (0: one that is free) until asked to end, or until the loop is gone.

    about: task, device, help; points: the pointer shows targets; board: what is drawn of PushT (`collecting.board`);
    emergency: there is an arm that can be stopped.
    """
    try:
        from action_diffusion.deploy.site import listen, serve_site
        from action_diffusion.deploy.teleop.page_app import SessionPage
    except ModuleNotFoundError:
        raise InputError(MISSING) from None
    token, ending = page_token(host, token_file), Ending()
    listening = listen(host, port)
    page = SessionPage(folder, about, loopback=is_loopback(host), token=token)
    report(folder, name, {"port": listening.getsockname()[1]})
    serve_site(page.app, listening, lambda: bool(ending))


def main() -> int:
    return serve(run)


if __name__ == "__main__":
    sys.exit(main())
