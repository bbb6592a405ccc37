"""What decoding images when they are needed costs, beside images in memory: samples a second at batch 64.

    python -m benchmarks.speed.decode [batch_size=64] [size=small] [steps=4] [rounds=3] [of=jpegxl,h264,zstd]

4,000 frames of 96 x 96 that move: in chunks of JPEG XL, one a frame, as the recorder's H.264, a key frame a second
of 10 Hz, and in chunks of Zstandard of a megabyte. Memory for decoded frames is a fifth of what they take, so most are
decoded anew. Two rates, each the median of rounds that take turns: batches that are only gathered, and batches that the
image policy is trained on, which is what a user waits for. The bar, half of the rate from memory, is of the latter.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from action_diffusion.datasets.batches.loader import Batch, BatchSource, ObsKey
from action_diffusion.datasets.batches.windows import make_windows
from action_diffusion.datasets.formats.contract import Settings
from action_diffusion.datasets.formats.conversion import convert
from action_diffusion.datasets.formats.registry import named
from action_diffusion.datasets.formats.zarr_buffer import ZARR
from action_diffusion.datasets.record.recorder import Recorder
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.memory import Mode
from action_diffusion.options import TrainSettings
from action_diffusion.training.data import StepBatches
from benchmarks.command import command, options, whole
from benchmarks.speed.gpu import CROP, HORIZON, Steps, policy_of

_OPTIONS = {"batch_size": "64", "size": "small", "steps": "4", "rounds": "3", "of": "jpegxl,h264,zstd"}
EPISODES, LENGTH, RATE, MEMORY, BAR = 40, 100, 10.0, 0.2, 0.5
_GATHERED = 10
"""Batches for each of the steps that are trained."""


def frames() -> np.ndarray:
    """uint8 [N, 96, 96, 3]: blocks of few colours on white, as PushT's."""
    pictures = np.full((EPISODES * LENGTH, 96, 96, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        x, y = 8 + number % 60, 8 + 3 * number % 50
        picture[y : y + 12, x : x + 30] = (119, 136, 153)
        picture[y : y + 30, x + 10 : x + 20] = (119, 136, 153)
        picture[60:72, 80 - x : 92 - x] = (65, 105, 225)
    return pictures


def written(kind: str, folder: Path) -> Path:
    """The demonstrations, with their images as `kind`."""
    random = np.random.default_rng(0)
    vectors = {
        key: random.uniform(0, 512, (EPISODES * LENGTH, 2)).astype(np.float32) for key in ("agent_pos", "action")
    }
    arrays, ends = {"image": frames(), **vectors}, np.arange(1, EPISODES + 1) * LENGTH
    path = folder / f"{kind}.zarr"
    if kind == "h264":
        fields = {"image": ("u1", (96, 96, 3)), "agent_pos": ("f4", (2,)), "action": ("f4", (2,))}
        with Recorder.open(path, fields, {"control_rate": RATE}, video=["image"]) as recorder:
            for row in range(EPISODES * LENGTH):
                recorder.add({key: values[row] for key, values in arrays.items()})
                if (row + 1) % LENGTH == 0:
                    recorder.keep()
        return path
    ReplayBuffer.from_arrays(arrays, ends, {"control_rate": RATE}).save(path)
    if kind == "jpegxl":
        convert(ZARR.open(path), folder / "umi.zarr.zip", named("umi"), Settings(RATE))
        return folder / "umi.zarr.zip"
    return path


def batches(path: Path, mode: Mode, batch_size: int) -> StepBatches:
    buffer = ReplayBuffer.open(path)
    source = BatchSource(
        buffer=buffer,
        windows=make_windows(buffer.episode_ends, horizon=HORIZON, n_obs_steps=2, n_action_steps=8),
        observations={"image": ObsKey("image", None, "image"), "agent_pos": ObsKey("agent_pos", None, "state")},
        action_key="action",
        n_obs_steps=2,
        mode=mode,
        memory_gb=MEMORY * frames().nbytes / 1e9,
    )
    return StepBatches(source, seed=0, crop=CROP)


def _alternately(works: Sequence[Callable[[], float]], rounds: int) -> list[float]:
    """The median of what each measures."""
    for work in works:
        work()
    return [
        statistics.median(found) for found in zip(*([work() for work in works] for _ in range(rounds)), strict=True)
    ]


class Gathering:
    """Calling gives seconds of `n` more batches that are only gathered."""

    def __init__(self, source: StepBatches, batch_size: int, n: int) -> None:
        self._source, self._batch_size, self._n, self._step = source, batch_size, n, 0

    def __call__(self) -> float:
        began = time.perf_counter()
        for _ in range(self._n):
            self._source.batch(self._step, self._batch_size, torch.Generator())
            self._step += 1
        return time.perf_counter() - began


class Either:
    """A `trainer.StepSource` of one of several, so that one network is trained on all: two are not equally fast."""

    def __init__(self, sources: Sequence[StepBatches]) -> None:
        self.sources, self.current = sources, sources[0]

    def __len__(self) -> int:
        return len(self.current)

    def batch(self, step: int, batch_size: int, generator: torch.Generator) -> Batch:
        return self.current.batch(step, batch_size, generator)


class Training:
    """Calling gives seconds of `n` more steps on one of the sources of `either`."""

    def __init__(self, trainer: Steps, either: Either, source: StepBatches, n: int) -> None:
        self._trainer, self._either, self._source, self._n = trainer, either, source, n

    def __call__(self) -> float:
        self._either.current = self._source
        return self._trainer.time(self._n)


def _trainer(source: Either, size: str, batch_size: int, folder: Path) -> Steps:
    torch.manual_seed(0)
    return Steps(
        policy=policy_of(size, torch.device("cpu")),
        source=source,
        settings=TrainSettings(max_steps=1, batch_size=batch_size, checkpoint_every=0, rollout_every=0),
        accelerator=Accelerator(cpu=True),
        output_dir=folder,
        seed=0,
        metrics=None,
        write_bundle=lambda path, weights: None,
        show_progress=False,
    )


@command
def main(words: Sequence[str]) -> int:
    given = options(words, _OPTIONS)
    batch_size, steps, rounds = (whole(name, given[name]) for name in ("batch_size", "steps", "rounds"))
    modes: tuple[Mode, Mode] = ("memory", "decode")
    missed = 0
    print(f"{'':8}  {'gathered, samples/s':>30}  {'trained, samples/s':>30}")
    with tempfile.TemporaryDirectory() as folder:
        for kind in given["of"].split(","):
            path = written(kind, Path(folder))
            sources = [batches(path, mode, batch_size) for mode in modes]
            n = _GATHERED * steps
            gathered = _alternately([Gathering(source, batch_size, n) for source in sources], rounds)
            either = Either(sources)
            trainer = _trainer(either, given["size"], batch_size, Path(folder))
            trained = _alternately([Training(trainer, either, source, steps) for source in sources], rounds)
            cells = [
                f"{count * batch_size / memory:10,.0f} {count * batch_size / decode:10,.0f} {memory / decode:7.2f}"
                for count, (memory, decode) in ((n, gathered), (steps, trained))
            ]
            print(f"{kind:8}  {cells[0]:>30}  {cells[1]:>30}")
            missed += trained[0] / trained[1] < BAR
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
