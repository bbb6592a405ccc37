"""What the pages need beside mkdocs: the package in one folder for the reference, and links into the repository."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.exceptions import Abort
from mkdocs.plugins import event_priority

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")
_copy = tempfile.TemporaryDirectory(prefix="action-diffusion-docs-")


@event_priority(100)
def on_config(config: Any) -> Any:
    """Show mkdocstrings a copy of the package as it installs: packages are known there by their `__init__.py`."""
    package = Path(_copy.name) / "action_diffusion"
    shutil.copytree(ROOT / "typings/action_diffusion", package, ignore=shutil.ignore_patterns("embedded", "*.so"))
    (package / "datasets/__init__.py").touch()
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_copy.name]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to pages stay; links to other files of the repository, which the site lacks, become the files' names.

    Pages that are links themselves, such as architecture.md, have links as from where the file lies.
    """
    shown_at = DOCS / page.file.src_uri
    lies_in = shown_at.resolve().parent

    def shown(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        place = lies_in / target
        if ":" in target:
            return link[0]
        if not place.exists():
            raise Abort(f"{page.file.src_uri}: {target} does not exist")
        if place.resolve().is_relative_to(DOCS):
            return f"[{text}]({os.path.relpath(place.resolve(), shown_at.parent)}{anchor})"
        pages = [one for one in DOCS.glob("*.md") if one.is_symlink() and one.resolve() == place.resolve()]
        if pages:
            return f"[{text}]({os.path.relpath(pages[0], shown_at.parent)}{anchor})"
        return text if text.strip("`") == place.name else f"{text} (`{place.resolve().relative_to(ROOT)}`)"

    return _LINK.sub(shown, markdown)
