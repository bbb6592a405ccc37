"""`action-diffusion data report`: a data set on one page that stands by itself."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from action_diffusion.datasets.doctor.finding import Finding
    from action_diffusion.datasets.edit.inspection import Inspection
    from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer

HELP = """\
action-diffusion data report PATH [out=FILE.html]     a data set on one page, to look at and to pass on

  action-diffusion data report demos.zarr
  action-diffusion data report pusht_human out=pusht.html     a data set by its name works too

Episodes with their lengths, first frames and tasks in words, ranges of every column, what the doctor finds with its
rows, and an episode over time. The page holds its pictures, and loads nothing from elsewhere.

Options
  out=FILE.html     default: NAME.report.html in this folder
"""

MOST_EPISODES = 200
"""With first frames."""
MOST_ROWS = 5000
"""Of a table."""


def run(options: Mapping[str, Any]) -> Mapping[str, Any]:
    from action_diffusion.datasets.batches.sources import open_data
    from action_diffusion.datasets.doctor.examine import examine
    from action_diffusion.datasets.edit.inspection import inspect
    from action_diffusion.report_page import write_page

    buffer = open_data(options["path"])
    name = Path(buffer.name).name
    stem = name.removesuffix(".zip").removesuffix(".zarr")
    output = Path(options.get("out", f"{stem}.report.html")).expanduser()
    found, findings = inspect(buffer), examine(buffer)
    minutes = (
        "" if found.rate is None else f", {found.lengths.sum() / found.rate / 60:.1f} minutes at {found.rate:g} Hz"
    )
    subtitle = f"{buffer.n_episodes} episodes, {buffer.n_steps} steps{minutes}"
    write_page(output, title=name, subtitle=subtitle, body=_body(buffer, found, findings))
    return {"output": str(output), "episodes": buffer.n_episodes, "findings": len(findings)}


def _body(buffer: ReplayBuffer, found: Inspection, findings: Sequence[Finding]) -> Iterator[str]:
    from action_diffusion.datasets.edit.inspection import ranges_of, shaped
    from action_diffusion.datasets.edit.plotting import drawn
    from action_diffusion.memory import sized
    from action_diffusion.report_page import card, figure, grid, note, number_table, section, setting_table

    lengths = found.lengths
    size = sum(key.n_bytes for key in found.keys) if found.n_bytes is None else found.n_bytes
    yield grid(
        [
            card("episodes", f"{len(lengths)}", f"of {lengths.min()} to {lengths.max()} steps"),
            card("steps", f"{lengths.sum():,}", f"{lengths.mean():.0f} an episode"),
            card("findings", f"{len(findings)}", "of the doctor"),
            card("size", sized(size), "unpacked" if found.n_bytes is None else "on disk"),
        ]
    )
    if found.tasks:
        rows = [(words, f"{len(episodes)}") for words, episodes in found.tasks.items()]
        yield section("Tasks", _table(("in words", "episodes"), rows))
    yield section("Findings", _findings(findings))
    columns = [(key.name, shaped(key), key.dtype, *cells) for key in found.keys for cells in ranges_of(key)]
    heads = ("column", "shape", "type", "dimension", "least", "most", "mean", "median step")
    yield section("Columns", number_table(heads, columns))
    picture = _image(drawn(buffer, found, 0))
    yield section("An episode over time", figure(picture, caption="Left the first episode, right the whole buffer."))
    yield section("Episodes", _episodes(buffer, found, findings))
    if found.attrs:
        yield section("Attributes", setting_table(found.attrs))
    if buffer.n_episodes > MOST_EPISODES:
        yield note(f"First frames are those of the first {MOST_EPISODES} episodes.")


def _findings(findings: Sequence[Finding]) -> str:
    from action_diffusion.datasets.doctor.finding import grouped, rows_of
    from action_diffusion.report_page import folded, note

    if not findings:
        return note("Nothing found.")
    groups = grouped(findings)
    rows = [(g.kind, g.key, f"{len(g.findings)}", g.episodes, g.worst.how_bad, g.worst.advice) for g in groups]
    each = [
        (f.kind, f.key, "all" if f.episode is None else f"{f.episode}", rows_of(f), f.how_bad)
        for group in groups
        for f in group.findings
    ]
    table = _table(("kind", "column", "episode", "rows", "how bad"), each[:MOST_ROWS])
    title = "each of them" if len(each) <= MOST_ROWS else f"the first {MOST_ROWS} of {len(each)}"
    return _table(("kind", "column", "found", "episodes", "the worst", "what to do"), rows) + folded(title, table)


def _episodes(buffer: ReplayBuffer, found: Inspection, findings: Sequence[Finding]) -> str:
    """First frames side by side, and a table."""
    from action_diffusion.datasets.edit.plotting import small_png
    from action_diffusion.datasets.storage.tasks import episode_tasks
    from action_diffusion.progress import progress
    from action_diffusion.report_page import figure, folded, grid

    counts = Counter(finding.episode for finding in findings)
    starts = buffer.episode_ends - found.lengths
    rows = [
        (
            f"{episode}",
            f"{start}-{end - 1}",
            f"{end - start}",
            "" if found.rate is None else f"{(end - start) / found.rate:.1f} s",
            f"{counts[episode]}",
            words or "",
        )
        for episode, (start, end, words) in enumerate(
            zip(starts, buffer.episode_ends, episode_tasks(buffer), strict=True)
        )
    ]
    cameras = [key.name for key in found.keys if key.image]
    shown = rows[:MOST_EPISODES] if cameras else []
    cards = []
    with progress("first frames", len(shown)) as advance:
        for episode, _, steps, seconds, _, words in shown:
            frames = (small_png(buffer[key], int(starts[int(episode)])) for key in cameras)
            pictures = "".join(_image(frame) for frame in frames if frame)
            cards.append(
                figure(pictures, caption=", ".join(filter(None, (f"{episode}: {steps} steps", seconds, words))))
            )
            advance(1)
    heads = ("episode", "rows", "steps", "length", "findings", "task")
    return grid(cards) + folded("all episodes", _table(heads, rows[:MOST_ROWS]))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Words under `heads`; `number_table` is for numbers."""
    top = "".join(f'<th style="min-width:5.5em">{escape(head)}</th>' for head in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _image(png: bytes) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="" style="width:100%;image-rendering:pixelated" src="data:image/png;base64,{data}">'
