"""Success and score against control steps and against minutes, as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from action_diffusion.files import atomic_path


def draw(log: Path, picture: Path) -> None:
    """Draw what `finetune` has written to `log`, progress.jsonl, so far."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, x, label in zip(panels, ("env_steps", "minutes"), ("control steps", "minutes"), strict=True):
        for name, words in (("success", "success"), ("score", "score"), ("tried", "success of the last trials")):
            known = [row for row in rows if name in row]
            axes.plot([row[x] for row in known], [row[name] for row in known], marker=".", label=words)
        axes.set(xlabel=label, ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    with atomic_path(picture) as partial:
        figure.savefig(partial, format="png", dpi=110)
