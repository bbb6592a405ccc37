"""One file over HTTP that may be interrupted at any time: what has come is kept, and the next try goes on."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from http import HTTPStatus
from pathlib import Path

from action_diffusion.errors import InputError
from action_diffusion.files import writing
from action_diffusion.progress import progress

_BLOCK = 1 << 18
_TIMEOUT = 30.0  # seconds without a byte


def download(url: str, partial: Path, *, timeout: float = _TIMEOUT) -> None:
    """Fetch `url` into the file `partial`, which may hold its beginning already.

    A connection that breaks is taken up again for as long as every try brings something. Raises
    `InputError` with the reason where one does not; what has come so far stays in `partial`.
    """
    while True:
        before = _size(partial)
        try:
            if _fetch(url, partial, timeout):
                return
            reason = "the connection broke"
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not before:
                raise InputError(f"{url}: the server answers {error.code} {error.reason}") from error
            if error.headers.get("Content-Range") == f"bytes */{before}":
                return  # it was all there
            partial.unlink()  # more than there is: the beginning of another file
            continue
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        if _size(partial) <= before:
            raise InputError(f"{url}: {reason}")


def _fetch(url: str, partial: Path, timeout: float) -> bool:
    """One try. Whether the file is complete."""
    done = _size(partial)
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        if response.status != HTTPStatus.PARTIAL_CONTENT:
            done = 0  # the server sends all of it, always
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        with writing(str(partial)):
            file = partial.open("ab" if done else "wb")
        with file, progress(f"downloading {url}", total or 0, done) as advance:
            while block := response.read(_BLOCK):
                with writing(str(partial)):
                    file.write(block)
                    file.flush()
                advance(len(block))
                done += len(block)
    return total is None or done == total


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
