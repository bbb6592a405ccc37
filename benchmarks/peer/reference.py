"""Batches as most training code makes them: one window sliced at a time, behind a PyTorch `DataLoader`.

The arrays, windows, crops and results are the same as ours; only the frames that a policy sees are touched, which not
every such code takes care of.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from action_diffusion.datasets.batches.windows import Windows, make_windows
from benchmarks.peer.ours import about
from benchmarks.peer.peers.serving import Say, Work, serve

WORKERS = (0, 2)


class SlicedWindows(Dataset[dict[str, Tensor]]):
    """Windows of arrays in memory, cut out one by one: {image [To, 3, h, w] in [0, 1], action [H, A]}."""

    def __init__(self, arrays: dict[str, np.ndarray], windows: Windows, corners: np.ndarray, crop: list[int]) -> None:
        self._arrays, self._windows, self._corners, self._crop = arrays, windows, corners, crop

    def __len__(self) -> int:
        return len(self._windows)

    def _slice(self, key: str, index: int, length: int) -> np.ndarray:
        """The first `length` rows of a window, the first and last row of the episode repeated beyond its ends."""
        start, first, end = (int(x[index]) for x in (self._windows.start, self._windows.first, self._windows.end))
        inside = self._arrays[key][max(start, first) : min(start + length, end)]
        before, after = max(first - start, 0), max(start + length - end, 0)
        if not before and not after:
            return inside
        return np.concatenate([inside[:1].repeat(before, 0), inside, inside[-1:].repeat(after, 0)])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        top, left = self._corners[index]
        frames = self._slice("image", index, self._windows.n_obs_steps)
        frames = frames[:, top : top + self._crop[0], left : left + self._crop[1]]
        image = np.moveaxis(frames, -1, 1).astype(np.float32) / 255
        action = self._slice("action", index, self._windows.horizon).astype(np.float32)
        return {"image": torch.from_numpy(image), "action": torch.from_numpy(action)}


class Gather(Work):
    """Batches of `SlicedWindows`, with the number of workers of `WORKERS` that is faster here."""

    AHEAD = 2 * 2  # batches that two workers have ready after a pause
    least = 8

    def __init__(self, settings: dict[str, Any], folder: Path, say: Say) -> None:
        data = Path(settings["data"])
        arrays = {name: np.load(data / f"{name}.npy") for name in ("image", "action")}
        sizes = {name: settings[name] for name in ("horizon", "n_obs_steps")}
        windows = make_windows(np.load(data / "episode_ends.npy"), n_action_steps=8, **sizes)
        self._inputs = load_file(folder / "inputs.safetensors")
        self._now = windows.now(np.arange(len(windows)))
        self._dataset = SlicedWindows(arrays, windows, self._inputs["corners"].numpy(), settings["crop"])
        self.units = settings["batch"]
        rates = {}
        for workers in WORKERS:
            self._start(workers)
            self.time(self.least)
            rates[workers] = self.least / self.time(self.least)
        best = max(rates, key=lambda workers: rates[workers])
        others = [f"{workers}: {rate / rates[best]:.2f} of its rate" for workers, rate in rates.items()]
        self.note = f"DataLoader with {best} workers ({', '.join(o for o in others if not o.startswith(f'{best}:'))})"
        self._start(best)

    def _start(self, workers: int) -> None:
        self._workers = workers
        order = torch.randint(len(self._dataset), (1_000_000,), generator=torch.Generator().manual_seed(0))
        self._batches = self._loader(order.tolist(), workers)

    def _loader(self, order: list[int], workers: int) -> Iterator[dict[str, Tensor]]:
        ahead = 2 if workers else None
        return iter(
            DataLoader(self._dataset, batch_size=self.units, sampler=order, num_workers=workers, prefetch_factor=ahead)
        )

    def outputs(self) -> dict[str, Tensor]:
        """Frames and actions of the windows `checked`."""
        windows = np.searchsorted(self._now, self._inputs["checked"].numpy())
        return next(self._loader(windows.tolist(), 0))

    def time(self, calls: int) -> float:
        """Seconds for `calls` batches, beside those that were read ahead while nobody asked."""
        for _ in range(self.AHEAD if self._workers else 0):
            next(self._batches)
        began = time.perf_counter()
        for _ in range(calls):
            next(self._batches)
        return time.perf_counter() - began

    def close(self) -> None:
        self._batches = iter(())  # ends the loader's processes


if __name__ == "__main__":
    serve({"gather": Gather}, about)
