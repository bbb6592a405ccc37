"""What a training run shows while it runs: a bar with the time left, or a line now and then without a terminal."""

from __future__ import annotations

import statistics
import time
from collections import deque
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 30.0
"""Between two lines where there is no terminal."""
LONG_SECONDS = 4 * 3600.0
"""From here on it is said what takes less."""
RECENT = 9
"""Updates of whose seconds a step the median tells the time left: a computer is busy now and then."""


class TrainingBar:
    """A bar on stderr that fills with the share of the budget; lines where stderr is not a terminal.

    The second `update` also says how long a step takes here, and how many there will be.
    """

    def __init__(self, *, enabled: bool = True, console: Console | None = None):
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._enabled = enabled
        self._updates, self._line = 0, time.monotonic()
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn(
                "step {task.fields[step]}  loss {task.fields[loss]}  {task.fields[rate]}/s  {task.fields[status]}"
            ),
            console=self._console,
            disable=not (enabled and self._console.is_terminal),
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("training", total=1.0, step=0, loss="…", rate="…", status="")

    def __enter__(self) -> TrainingBar:
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def update(self, *, share: float, step: int, loss: float, rate: float, step_seconds: float) -> None:
        """Show where the run stands. share: 0 to 1 of the budget; rate: samples per second."""
        self._updates += 1
        self._bar.update(self._task, completed=share, step=step, loss=f"{loss:.4f}", rate=f"{rate:,.0f}")
        steps = max(step, step / max(share, 1e-9))  # a budget of time ends a little late
        self._recent.append(step_seconds)
        usual = statistics.median(self._recent)
        left = spoken((steps - step) * usual)
        if self._enabled and self._updates == 2:  # the first steps also choose the fastest kernels
            said = f"{usual:.2g} s a step: about {steps:,.0f} steps in all, {left} left"
            if (steps - step) * usual > LONG_SECONDS:
                said += "; for less, train.max_steps=N, denoiser=unet_small or with cameras encoder=resnet18_small"
            self._console.print(said, highlight=False)
        elif self._enabled and not self._console.is_terminal and time.monotonic() - self._line > LINE_SECONDS:
            self._line = time.monotonic()
            self._console.print(f"step {step:,} of about {steps:,.0f}, loss {loss:.4f}, {left} left", highlight=False)

    def status(self, text: str) -> None:
        """Say what is going on besides steps, such as a validation."""
        self._bar.update(self._task, status=text, refresh=True)


def spoken(seconds: float) -> str:
    """A duration for people: 40 s, 7 min, 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
