"""One kind of error for everything that a user can mend: one clear line, and exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something handed in is wrong. The message says what, where, and what would be right, in one line."""


def unknown(kind: str, name: str, choices: Iterable[str], where: str = "") -> InputError:
    """An `InputError` for a name that does not exist; it suggests the close ones, or lists all.

    `kind` is the word for what was named ("scheduler"), `where` says where the name came from.
    """
    valid = sorted(str(choice) for choice in choices)
    close = difflib.get_close_matches(str(name), valid, n=3, cutoff=0.6)
    listed = ", ".join(valid[:20]) + (", …" if len(valid) > 20 else "")
    hint = f"did you mean {' or '.join(close)}?" if close else f"choose from {listed or '(none)'}"
    return InputError(f"unknown {kind} {str(name)!r}{f' in {where}' if where else ''}: {hint}")
