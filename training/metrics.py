"""Where the numbers of a run go: `metrics.jsonl` always, TensorBoard and Weights & Biases when asked."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from action_diffusion.errors import InputError


class MetricsLog:
    """Appends a JSON object a line, each with "step"; whole lines only, so that a kill leaves a readable file."""

    def __init__(self, output_dir: Path, *, tensorboard: bool = False, wandb: str | None = None, run_name: str = ""):
        output_dir.mkdir(parents=True, exist_ok=True)
        self.path = output_dir / "metrics.jsonl"
        _end_line(self.path)
        self._file = self.path.open("a", buffering=1)
        self._board: Any = None
        self._wandb: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(output_dir / "tensorboard"))
        if wandb is not None:
            try:
                import wandb as client
            except ImportError:
                raise InputError(
                    "train.wandb=true needs the package wandb: pip install 'action-diffusion[wandb]'"
                ) from None
            self._wandb = client.init(project=wandb, name=run_name, dir=str(output_dir))

    def write(self, step: int, **values: Any) -> None:
        """Record values at an optimiser step. Not finite numbers are written as null, which JSON can say."""
        row = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self._file.write(json.dumps({"step": step, **row, "time": round(time.time(), 3)}) + "\n")
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _end_line(path: Path) -> None:
    """A kill may have cut the last line: end it, so that what follows starts on its own."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
