"""How fast image batches are gathered, and how much memory that takes.

    python -m benchmarks.speed.gather data=PATH [batch_size=64] [crop=84] [seconds=5] [memory_gb=0.2] [device=cuda]

Windows of To = 2, H = 16, Ta = 8 of the buffer's first image key and its actions, in random order, cropped at
random. Two figures: uint8 batches, and batches converted to float32 [B, To, 3, crop, crop].
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from action_diffusion.datasets.batches import pixels
from action_diffusion.datasets.batches.loader import BatchSource, ObsKey, random_crop_offsets
from action_diffusion.datasets.batches.sources import open_data
from action_diffusion.datasets.batches.windows import batch_indices, make_windows
from action_diffusion.errors import InputError
from benchmarks.command import command, options, positive, whole

_OPTIONS = {
    "data": "pusht_human",
    "batch_size": "64",
    "crop": "84",
    "seconds": "5",
    "memory_gb": "",
    "device": "cpu",
}


@command
def main(words: Sequence[str]) -> int:
    given = options(words, _OPTIONS)
    batch_size, crop = whole("batch_size", given["batch_size"]), whole("crop", given["crop"])
    seconds = positive("seconds", given["seconds"])

    started = time.perf_counter()
    source = _open(given)
    print(f"{source.mode}: {source.n_bytes / 1e9:.2f} GB loaded in {time.perf_counter() - started:.1f} s")
    image = next(iter(source.frame_sizes))
    rng = np.random.default_rng(0)

    def gather(step: int) -> torch.Tensor:
        offsets = random_crop_offsets(batch_size, source.frame_sizes[image], (crop, crop), rng)
        indices = batch_indices(len(source), batch_size, 0, step)
        return source.gather(indices, crop=(crop, crop), offsets=offsets).obs[image]

    print(f"uint8    {_rate(gather, seconds) * batch_size:10,.0f} samples/s")
    print(f"float32  {_rate(lambda step: pixels.to_float(gather(step)), seconds) * batch_size:10,.0f} samples/s")
    print(f"resident {_most_resident() / 1e9:10.2f} GB at most")
    return 0


def _open(given: dict[str, str]) -> BatchSource:
    buffer = open_data(given["data"])
    images = [key for key in buffer.keys if len(buffer[key].shape) == 4]
    if not images:
        raise InputError(f"{buffer.name} holds no images [N, H, W, 3]")
    return BatchSource(
        buffer=buffer,
        windows=make_windows(buffer.episode_ends, horizon=16, n_obs_steps=2, n_action_steps=8),
        observations={images[0]: ObsKey(images[0], None, "image")},
        action_key="action",
        n_obs_steps=2,
        device=given["device"],
        memory_gb=float(given["memory_gb"]) if given["memory_gb"] else None,
    )


def _most_resident() -> int:
    """Bytes. `getrusage` would also count what the process that started this one held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _rate(work: Callable[[int], torch.Tensor], seconds: float) -> float:
    """Calls a second."""
    work(0)
    started, step = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        step += 1
        result = work(step)
    if result.is_cuda:
        torch.cuda.synchronize()
    return step / (time.perf_counter() - started)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
