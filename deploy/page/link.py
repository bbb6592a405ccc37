"""A page, as the run that opens it sees it: two processes, the page's own, and the one that has the port and stops."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

from action_diffusion.deploy.ipc.processes import Child
from action_diffusion.errors import InputError

MISSING = "the operator's page needs the extra [page]: pip install 'action-diffusion[page]'"


class PageLink:
    """Both are ready when this returns.

    Args:
        module: of the page's process.
        folder: the run's shared memory.
        host, token_file: where it listens, and the file of its token, where that is not this machine only.
        port: 0 for one that is free.
        about: what the page is told at its start.
        stops: the run has an arm that can be stopped.

    Attributes:
        url: where it is.

    Raises:
        InputError: for an address that cannot be had, a missing token, and a missing extra.
    """

    def __init__(
        self,
        module: str,
        folder: Path,
        *,
        host: str,
        token_file: str | None,
        port: int,
        about: Mapping[str, object],
        stops: bool,
    ) -> None:
        common = {"host": host, "token_file": token_file}
        self._page = Child(module, folder, "page", {**common, "about": dict(about)})
        self._stop = Child(
            "action_diffusion.deploy.page.stop_process", folder, "page's port", {**common, "port": port, "stops": stops}
        )
        try:
            self._page.wait_ready()
            self.port = int(self._stop.wait_ready()["port"])
        except BaseException:
            self.end()
            raise
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def alive(self) -> bool:
        """Whether somebody can come to it."""
        return self._page.alive and self._stop.alive

    def end(self) -> None:
        """End both."""
        for child in (self._stop, self._page):
            child.end()


def page_port(page: object, say: Callable[[str], None]) -> int | None:
    """The page's port, 0 for one that is free; None for no page."""
    if page is False:
        return None
    if page is None and importlib.util.find_spec("uvicorn") is None:
        say(MISSING)
        return None
    if page is None or page is True:
        return 0
    if isinstance(page, int) and 0 <= page <= 65535:
        return page
    raise InputError(f"page={page}: give true, false or a port")
