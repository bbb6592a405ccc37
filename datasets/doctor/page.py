"""The findings with a picture of each, as one HTML file: rather a look than a reading."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.doctor.finding import Finding
from action_diffusion.datasets.doctor.survey import is_image
from action_diffusion.datasets.images.pictures import preview
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.files import atomic_path
from action_diffusion.progress import progress

PICTURES = 100
"""Findings with a picture: the first ones."""
AROUND = 15
"""Rows shown before and after."""
_FRAMES = 8
_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
section { border-top: 1px solid #ccc; padding: .6rem 0; } h2 { font-size: 1rem; margin: 0; } p { margin: .2rem 0; }
img { max-width: 100%; } .advice { color: #555; }
"""


def write_page(buffer: ReplayBuffer, findings: Sequence[Finding], path: Path) -> None:
    """Self-contained. Of each of the first `PICTURES` findings the rows around it, its own shaded."""
    parts = []
    with progress("drawing", min(len(findings), PICTURES)) as advance:
        for number, finding in enumerate(findings):
            parts.append(_section(finding, _picture(buffer, finding) if number < PICTURES else ""))
            advance(1)
    title = html.escape(f"{buffer.name}: {len(findings)} findings")
    body = f"<h1>{title}</h1>\n" + "\n".join(parts)
    text = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>{body}'
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _section(finding: Finding, picture: str) -> str:
    episode = "all episodes" if finding.episode is None else f"episode {finding.episode}"
    heading = f"{finding.kind}: {finding.key}, {episode}, rows {finding.first} to {finding.last}"
    lines = [f"<h2>{html.escape(heading)}</h2>", f"<p>{html.escape(finding.how_bad)}</p>"]
    lines.append(f'<p class="advice">{html.escape(finding.advice)}</p>{picture}')
    return f"<section>{''.join(lines)}</section>"


def _picture(buffer: ReplayBuffer, finding: Finding) -> str:
    """Of what has no key of its own, the first one that moves is shown."""
    if finding.episode is None:
        return ""
    first_of = int(buffer.episode_ends[finding.episode - 1]) if finding.episode else 0
    first = max(first_of, finding.first - AROUND)
    stop = min(int(buffer.episode_ends[finding.episode]), finding.last + AROUND + 1)
    low = [key for key in buffer.keys if not is_image(buffer[key])]
    key = finding.key if finding.key in buffer.keys else (low or buffer.keys)[-1]

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if is_image(buffer[key]):
        figure = _frames(pyplot, buffer, key, finding, first, stop)
    else:
        figure = _curves(pyplot, buffer, key, finding, first, stop)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=80)
    pyplot.close(figure)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}">'


def _curves(pyplot: Any, buffer: ReplayBuffer, key: str, finding: Finding, first: int, stop: int) -> Any:
    values = np.asarray(buffer[key][first:stop]).reshape(stop - first, -1)
    figure, axis = pyplot.subplots(figsize=(9, 2.2), layout="constrained")
    for d in list(finding.dimensions or range(values.shape[1]))[:8]:
        axis.plot(np.arange(first, stop), values[:, d], ".-", markersize=3, linewidth=1, label=str(d))
    axis.axvspan(finding.first - 0.5, finding.last + 0.5, color="tab:red", alpha=0.15)
    axis.legend(fontsize=7, title=key, title_fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.set_xlabel("row", fontsize=8)
    return figure


def _frames(pyplot: Any, buffer: ReplayBuffer, key: str, finding: Finding, first: int, stop: int) -> Any:
    """Frames around where the finding begins, its own with a red title."""
    middle = int(np.clip(finding.first - _FRAMES // 2, first, max(first, stop - _FRAMES)))
    rows = range(middle, min(stop, middle + _FRAMES))
    figure, axes = pyplot.subplots(1, len(rows), figsize=(9, 1.6), squeeze=False, layout="constrained")
    for axis, row in zip(axes[0], rows, strict=True):
        frame = np.nan_to_num(np.asarray(buffer[key][row], np.float32))
        if frame.ndim == 2 and buffer[key].dtype != np.uint8:
            frame = preview(frame).astype(np.float32)
        scale = 255 if buffer[key].dtype.kind in "iu" or frame.max() > 2 else 1
        axis.imshow(np.clip(frame / scale, 0, 1).squeeze(), cmap="gray")
        axis.set_title(str(row), fontsize=8, color="tab:red" if finding.first <= row <= finding.last else "black")
        axis.axis("off")
    return figure
