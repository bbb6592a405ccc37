"""The look of a report: one HTML file with its style inside, in light and dark, that asks nobody for
anything.

The content policy in its head makes browsers refuse every request. The functions here escape the text that
they are given; `content`, `cells` and `body` are HTML already.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from action_diffusion.files import atomic_path

_STYLE = """
:root { color-scheme: light dark; --page: #f6f8fa; --card: #ffffff; --ink: #1f2328; --soft: #59636e;
  --line: #d8dee4; --first: #0969da; --second: #bc4c00; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --card: #151b23; --ink: #e6edf3;
  --soft: #9198a1; --line: #30363d; --first: #58a6ff; --second: #f0883e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 36px 20px 64px; }
h1 { font-size: 27px; line-height: 1.25; letter-spacing: -0.01em; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 36px 0 10px; }
p { margin: 12px 0; max-width: 84ch; }
.subtitle { margin: 0 0 20px; }
.soft, figcaption, th { color: var(--soft); }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); }
.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px;
  margin: 0; min-width: 0; }
.label { font-size: 13px; color: var(--soft); }
.value { font-size: 30px; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card h3 { font-size: 13.5px; margin: 0 0 8px; }
figcaption { margin-top: 8px; font-size: 13.5px; }
.film { position: relative; margin-bottom: 76px; }
.film video { position: absolute; top: 0; width: 100%; height: calc(100% + 72px); object-fit: contain;
  object-position: top; border-radius: 6px; background: #1f2328; }
video::-webkit-media-controls-panel { background-image: none !important; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
table { border-collapse: collapse; font-size: 13.5px; width: 100%; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
th { font-weight: 500; }
.numbers td, .numbers th { text-align: right; font-variant-numeric: tabular-nums; }
.numbers th:first-child, .numbers td:first-child { text-align: left; min-width: 9em; }
.broad svg { min-width: 620px; }
.numbers td:not(:first-child) { white-space: nowrap; }
.words td, .words th { overflow-wrap: break-word; }
.verdict { font-weight: 600; border-left: 4px solid var(--first); padding: 2px 0 2px 12px; overflow-wrap: anywhere; }
.warning { border-color: var(--second); }
tr:last-child td, tr:last-child th { border-bottom: 0; }
.scroll { overflow-x: auto; }
details { margin-top: 12px; }
summary { cursor: pointer; font-weight: 600; padding: 2px 0; }
details > .card { margin-top: 10px; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data: file: 'self'"


def card(label: str, value: str, below: str) -> str:
    """A headline number between what it is and how sure it is."""
    return (
        f'<div class="card"><div class="label">{escape(label)}</div><div class="value">{escape(value)}</div>'
        f'<div class="label">{escape(below)}</div></div>'
    )


def figure(content: str, *, title: str = "", caption: str = "", shape: str = "") -> str:
    """A picture or video on a card, with a line above it and one below. shape: "broad" ones scroll where there is no
    room."""
    above = f"<h3>{escape(title)}</h3>" if title else ""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    content = f'<div class="scroll {shape}">{content}</div>' if shape else content
    return f'<figure class="card">{above}{content}{below}</figure>'


def grid(cells: Iterable[str], *, wide: bool = False) -> str:
    """Cards side by side, as many as fit; `wide` for pictures."""
    return f'<div class="grid{" wide" if wide else ""}">{"".join(cells)}</div>'


def note(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def verdict(text: str, *, warning: bool = False) -> str:
    """What the numbers say, or what they do not, in a sentence that is not overlooked."""
    return f'<p class="verdict{" warning" if warning else ""}">{escape(text)}</p>'


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def folded(title: str, content: str) -> str:
    """Content that opens when its title is clicked."""
    return f'<details><summary>{escape(title)}</summary><div class="card scroll">{content}</div></details>'


def number_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of numbers under `heads`; the first column names the row."""
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="numbers"><tr>{top}</tr>{body}</table>'


def word_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same with words in it."""
    return number_table(heads, rows).replace('class="numbers"', 'class="words"', 1)


def setting_table(settings: Mapping[str, Any]) -> str:
    """Nested settings, a row each, named as Hydra writes them ("train.max_steps")."""
    rows = (f"<tr><th>{escape(key)}</th><td>{escape(str(value))}</td></tr>" for key, value in _flat(settings))
    return f"<table>{''.join(rows)}</table>"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def write_page(path: Path, *, title: str, subtitle: str, body: Iterable[str]) -> None:
    """Write the page; it appears only when it is complete."""
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="soft subtitle">{escape(subtitle)}</p>'
        f"{''.join(body)}</main></body></html>\n"
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
