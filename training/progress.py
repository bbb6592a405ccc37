"""The progress bar of a training run: loss, samples per second, time left."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainingBar:
    """A bar on stderr that fills with the share of the budget; silent where stderr is not a terminal."""

    def __init__(self, *, enabled: bool = True):
        console = Console(stderr=True)
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
            console=console,
            disable=not (enabled and console.is_terminal),
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("training", total=1.0, step=0, loss="…", rate="…", status="")

    def __enter__(self) -> TrainingBar:
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def update(self, *, share: float, step: int, loss: float, rate: float) -> None:
        """Show where the run stands. share: 0 to 1 of the budget; rate: samples per second."""
        self._bar.update(self._task, completed=share, step=step, loss=f"{loss:.4f}", rate=f"{rate:,.0f}")

    def status(self, text: str) -> None:
        """Say what is going on besides steps, such as a validation."""
        self._bar.update(self._task, status=text, refresh=True)
