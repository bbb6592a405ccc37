"""Who may talk to the policy server and to a page: everyone on this machine; anyone else with the token.

The token comes from a file or from the environment, so that neither the list of processes nor a log shows it.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from pathlib import Path

from action_diffusion.errors import InputError

TOKEN_VARIABLE = "ACTION_DIFFUSION_TOKEN"
MIN_LENGTH = 16
SCHEME = "Api-Key "
"""What `openpi-client` puts before its `api_key` in the header `Authorization`."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_token(token_file: str | None) -> str | None:
    """The token in `token_file`, or else in $ACTION_DIFFUSION_TOKEN; None where there is neither.

    Raises `InputError`, which does not repeat it, for a file that cannot be read and for one that is easily guessed.
    """
    if token_file is not None:
        where = f"token_file={token_file}"
        try:
            token = Path(token_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    else:
        where, token = f"${TOKEN_VARIABLE}", os.environ.get(TOKEN_VARIABLE, "").strip()
        if not token:
            return None
    if len(token) < MIN_LENGTH or not (token.isascii() and token.isprintable()):
        raise InputError(
            f"{where} holds no token of at least {MIN_LENGTH} printable ASCII characters: "
            "make one with  python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    return token


def require_token(host: str, token: str | None, *, option: str, files: str) -> None:
    """`InputError` for a `host` that other machines reach, without a token. option, files: what to give, by name."""
    if token is None and not is_loopback(host):
        raise InputError(f"{option}={host} lets other machines in: give {files}=PATH, or set {TOKEN_VARIABLE}")


def authorization(token: str | None) -> dict[str, str]:
    """The headers with which a client asks."""
    return {} if token is None else {"Authorization": f"{SCHEME}{token}"}


def is_authorized(header: str | None, token: str | None) -> bool:
    """Whether a client with this `Authorization` may come in. Takes as long for a nearly right token as for any."""
    if token is None:
        return True
    expected = f"{SCHEME}{token}".encode()
    return hmac.compare_digest((header or "").encode("utf-8", "replace"), expected)


def session(token: str | None, run: str) -> str:
    """What a browser shows instead of the token, once it has: the same in all processes of a run, and in no other."""
    return "" if token is None else hmac.new(token.encode(), run.encode(), hashlib.sha256).hexdigest()
