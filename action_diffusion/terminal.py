"""Words in a terminal's lines: names that are parted where a reader would part them, and lines that go on below."""

from __future__ import annotations

import re
import shutil
import textwrap

WIDTH = 80
"""Where nothing says how wide the terminal is."""


def width() -> int:
    """Characters in a line."""
    return shutil.get_terminal_size((WIDTH, 24)).columns


def parted(name: str, most: int | None = None) -> str:
    """`name` in lines of at most `most` characters (None: a third of the terminal's), parted behind . _ / - : and
    within a word only where that alone is longer."""
    most = max(8, width() // 3) if most is None else most
    lines = [""]
    for part in re.findall(r"[^._/:-]*[._/:-]|[^._/:-]+", name):
        pieces = [part[start : start + most] for start in range(0, len(part), most)]
        for piece in pieces:
            if len(lines[-1]) + len(piece) > most:
                lines.append("")
            lines[-1] += piece
    return "\n".join(lines)


def wrapped(words: str) -> str:
    """`words` in the terminal's lines; those after the first are indented. Nothing is parted within a word."""
    return textwrap.fill(words, width(), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
