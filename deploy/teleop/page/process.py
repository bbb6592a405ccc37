"""The process of a session's page: see `page`. Nobody waits for it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from action_diffusion.deploy.ipc.processes import Ending, serve
from action_diffusion.deploy.page.link import MISSING
from action_diffusion.deploy.page.process import serve_page
from action_diffusion.errors import InputError


def run(*, folder: Path, name: str, host: str, token_file: str | None, about: Mapping[str, object]) -> None:
    """Serve the page, of which others know as `host`, until asked to end, or until the loop is gone.

    about: task, device, help; points: the pointer shows targets; board: what is drawn of PushT (`collecting.board`);
    emergency: there is an arm that can be stopped.
    """
    try:
        from action_diffusion.deploy.page.shared import Admission
        from action_diffusion.deploy.teleop.page.app import SessionPage
    except ModuleNotFoundError:
        raise InputError(MISSING) from None
    admission, ending = Admission(host=host, token_file=token_file, run=folder.name), Ending()
    serve_page(SessionPage(folder, about, admission).app, folder, name, lambda: bool(ending))


def main() -> int:
    return serve(run)


if __name__ == "__main__":
    sys.exit(main())
