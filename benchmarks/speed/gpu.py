"""What a GPU makes of this package: the time of a chunk, and samples a second in training, option by option.

    python -m benchmarks.speed.gpu [only=chunk] [device=cuda] [size=paper] [batch=64] [seconds=4] [compile=true]
                             [output=FILE.json]

    chunk      one chunk of the image policy at batch 1, DDIM 10, from uint8 frames on the host to actions in pixels,
               with every option of `policy.load`; error: the largest difference to plain fp32, in normalised actions
    training   the same policy's training step: plain, which is eager fp32 with a PyTorch DataLoader that slices one
               window at a time in as many processes as there are cores; then from batches that stay on the device, in
               bfloat16, captured as a CUDA graph, compiled

Median of what fits into `seconds`, each waited for. The floors are the bytes of the denoiser's weights over the rate of
a large copy, ten times, and the operations of a step over the rate of a large bfloat16 product. `device=cpu size=small`
tries it out. Exit code: 0, 1 where a bound is missed (10 ms a chunk, 3 times plain; on a GPU), 2 for bad input.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from action_diffusion.datasets.batches.loader import Batch, BatchSource, ObsKey
from action_diffusion.datasets.batches.windows import Windows, make_windows
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import unknown
from action_diffusion.files import atomic_path
from action_diffusion.options import TrainSettings
from action_diffusion.parallel import cores
from action_diffusion.policy.bundle import resolve_device, versions
from action_diffusion.policy.kernels import accelerate
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.training.data import StepBatches
from action_diffusion.training.trainer import Trainer
from benchmarks.command import command, options, positive, whole
from benchmarks.peer.ours import build
from benchmarks.report import machine
from benchmarks.speed.floors import SIZES

WORKS = ("chunk", "training")
DEFAULTS = {
    "only": ",".join(WORKS),
    "device": "cuda",
    "size": "paper",
    "batch": "64",
    "seconds": "4",
    "compile": "true",
    "output": "",
}
MOST_MS, LEAST_RATIO = 10.0, 3.0
FRAME, CROP, HORIZON = (96, 96), (84, 84), 16
EPISODES, LENGTH = 100, 100
_CHUNKS: tuple[dict[str, Any], ...] = (
    {},
    {"cuda_graph": True},
    *({"precision": precision} for precision in ("fp32", "bf16", "fp16")),
    *({"precision": precision, "cuda_graph": True} for precision in ("fp32", "bf16", "fp16")),
)
_CHUNKS_COMPILED = (_CHUNKS[-1] | {"compile": True},)
_TRAINING: tuple[dict[str, Any], ...] = (
    {},
    {"mixed_precision": "bf16"},
    {"mixed_precision": "bf16", "cuda_graph": True},
    {"mixed_precision": "bf16", "cuda_graph": True, "compile": True},
)


@dataclass(frozen=True)
class GpuTime:
    """A work with some options: ms of a call, samples/s or None, and the largest error of a chunk or None."""

    work: str
    options: str
    ms: float
    samples_per_second: float | None = None
    error: float | None = None


class SlicedFrames(Dataset[tuple[Tensor, ...]]):
    """Windows cut out one by one: frames uint8 [To, H, W, 3], positions [To, 2], actions [H, 2], mask [H]."""

    def __init__(self, arrays: dict[str, np.ndarray], windows: Windows):
        self._arrays, self._windows = arrays, windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        rows, one = self._windows.rows(np.array([index]))[0], np.array([index])
        seen = rows[: self._windows.n_obs_steps]
        parts = self._arrays["image"][seen], self._arrays["agent_pos"][seen], self._arrays["action"][rows]
        return (*(torch.from_numpy(part) for part in parts), torch.from_numpy(self._windows.mask(one)[0]))


class Loaded:
    """A `trainer.StepSource` of batches from a DataLoader with `workers` processes, copied to the device."""

    def __init__(self, data: SlicedFrames, batch: int, workers: int, device: torch.device):
        self._length, self._device = len(data), device
        self._batches = self._endless(
            DataLoader(
                data,
                batch_size=batch,
                shuffle=True,
                drop_last=True,
                num_workers=workers,
                pin_memory=device.type == "cuda",
            )
        )

    @staticmethod
    def _endless(loader: DataLoader[Any]) -> Iterator[Any]:
        return itertools.chain.from_iterable(itertools.repeat(loader))

    def __len__(self) -> int:
        return self._length

    def batch(self, step: int, batch_size: int, generator: torch.Generator) -> Batch:
        image, agent_pos, action, mask = (part.to(self._device, non_blocking=True) for part in next(self._batches))
        return Batch({"image": image, "agent_pos": agent_pos}, action, mask)


class Steps(Trainer):
    """The training loop without its checkpoint at the end; `time`: seconds of so many steps, all finished."""

    def save(self) -> None:
        pass

    def time(self, steps: int) -> float:
        self.settings.max_steps = self.progress.step + steps
        began = time.perf_counter()
        self.run()
        _finish(self.accelerator.device)
        return time.perf_counter() - began


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(work: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Milliseconds of a call, waited for; the first ones, which prepare, do not count."""
    for _ in range(3):
        work()
    _finish(device)
    times, began = list[float](), time.perf_counter()
    while len(times) < 5 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        work()
        _finish(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def demonstrations() -> tuple[dict[str, np.ndarray], Windows]:
    """Random frames, positions and actions, in pixels: what they show does not matter here."""
    random, n = np.random.default_rng(0), EPISODES * LENGTH
    vectors = {key: random.uniform(0, 512, (n, 2)).astype(np.float32) for key in ("agent_pos", "action")}
    arrays = {"image": random.integers(0, 256, (n, *FRAME, 3), np.uint8), **vectors}
    ends = np.arange(1, EPISODES + 1) * LENGTH
    return arrays, make_windows(ends, horizon=HORIZON, n_obs_steps=2, n_action_steps=8)


def policy_of(size: str, device: torch.device) -> DiffusionPolicy:
    """The image policy of the other benchmarks, with random weights."""
    settings = {"image": True, "channels": SIZES[size], "steps": 10, "activation": "silu"}
    return build(settings, Path(), weights=False).to(device)


def chunks(size: str, device: torch.device, seconds: float, *, compiled: bool) -> Iterator[GpuTime]:
    """A chunk at batch 1 with each set of options."""
    policy = policy_of(size, device).eval()
    arrays, _ = demonstrations()
    obs = {key: arrays[key][:2] for key in policy.spec.observations}
    noise = np.random.default_rng(1).standard_normal((1, HORIZON, 2), np.float32)
    expected: np.ndarray | None = None
    for chosen in (*_CHUNKS, *(_CHUNKS_COMPILED if compiled else ())):
        if device.type != "cuda" and (chosen.get("cuda_graph") or chosen.get("precision") == "bf16"):
            continue  # which every GPU has, and not every CPU
        accelerate(policy, **chosen)
        chunk = policy.predict(obs, noise=noise)["action_pred"] / 256  # pixels from 0 to 512 are 2 when normalised
        expected = chunk if expected is None else expected
        ms = median_ms(lambda: policy.predict(obs, noise=noise), device, seconds)
        yield GpuTime(f"chunk, {size}", _words(chosen), ms, error=float(np.abs(chunk - expected).max()))


def training(size: str, batch: int, device: torch.device, seconds: float, *, compiled: bool) -> Iterator[GpuTime]:
    """A training step, plain and with each set of options."""
    arrays, windows = demonstrations()
    workers = max(1, cores() - 1)
    loaded = Loaded(SlicedFrames(arrays, windows), batch, workers, device)
    yield _training(size, batch, device, seconds, loaded, {}, f"plain: fp32, DataLoader with {workers} workers")
    del loaded
    resident = BatchSource(
        buffer=ReplayBuffer.from_arrays(arrays, np.arange(1, EPISODES + 1) * LENGTH),
        windows=windows,
        observations={"image": ObsKey("image", None, "image"), "agent_pos": ObsKey("agent_pos", None, "state")},
        action_key="action",
        n_obs_steps=2,
        device=device,
    )
    source = StepBatches(resident, seed=0, crop=CROP)
    for chosen in _TRAINING:
        if (chosen.get("cuda_graph") and device.type != "cuda") or (chosen.get("compile") and not compiled):
            continue
        yield _training(size, batch, device, seconds, source, chosen, f"{resident.mode}: {_words(chosen)}")


def _training(
    size: str, batch: int, device: torch.device, seconds: float, source: Any, chosen: dict[str, Any], what: str
) -> GpuTime:
    torch.manual_seed(0)
    settings = TrainSettings(max_steps=1, batch_size=batch, checkpoint_every=0, rollout_every=0, **chosen)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Steps(
            policy=policy_of(size, device),
            source=source,
            settings=settings,
            accelerator=_accelerator(device, settings.mixed_precision),
            output_dir=Path(folder),
            seed=0,
            metrics=None,
            write_bundle=lambda path, weights: None,
            show_progress=False,
        )
        trainer.time(5)
        steps = max(2, min(50, int(seconds / 4 / (trainer.time(2) / 2))))
        ms = 1e3 * statistics.median(trainer.time(steps) / steps for _ in range(5))
    AcceleratorState._reset_state()  # it keeps the precision of a process
    return GpuTime(f"training, {size}, batch {batch}", what, ms, samples_per_second=1e3 * batch / ms)


def _accelerator(device: torch.device, mixed_precision: str) -> Accelerator:
    return Accelerator(cpu=device.type == "cpu", mixed_precision=mixed_precision)


def _words(chosen: dict[str, Any]) -> str:
    return " ".join(f"{name}={str(value).lower()}" for name, value in chosen.items()) or "as it is"


def ceilings(device: torch.device, seconds: float) -> dict[str, float]:
    """Bytes/s of a large copy (read and written), operations/s of a large bfloat16 product: the best of many."""
    n = 2**28 if device.type == "cuda" else 2**24
    source, side = torch.ones(n, device=device), 8192 if device.type == "cuda" else 1024
    target, a = torch.empty_like(source), torch.randn(side, side, device=device, dtype=torch.bfloat16)
    copying = median_ms(lambda: target.copy_(source), device, seconds)
    product = median_ms(lambda: a @ a, device, seconds)
    return {"bandwidth": 2 * source.nbytes / copying * 1e3, "bf16_peak": 2 * side**3 / product * 1e3}


def show(found: Sequence[GpuTime]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("work", "options"):
        table.add_column(heading)
    for heading in ("ms", "samples/s", "error"):
        table.add_column(heading, justify="right")
    for row in found:
        rate = "" if row.samples_per_second is None else f"{row.samples_per_second:,.0f}"
        table.add_row(row.work, row.options, f"{row.ms:.2f}", rate, "" if row.error is None else f"{row.error:.1e}")
    Console(highlight=False, width=None if sys.stdout.isatty() else 140).print(table)


def bounds(found: Sequence[GpuTime]) -> dict[str, bool]:
    """What is asked of a GPU, in words, and whether it is kept."""
    kept: dict[str, bool] = {}
    times = [row.ms for row in found if row.samples_per_second is None]
    if times:
        kept[f"a chunk takes {min(times):.1f} ms; asked: {MOST_MS:g}"] = min(times) <= MOST_MS
    rates = [row.samples_per_second for row in found if row.samples_per_second is not None]
    if len(rates) > 1:
        ratio = max(rates[1:]) / rates[0]
        kept[f"training is {ratio:.1f} times plain; asked: {LEAST_RATIO:g}"] = ratio >= LEAST_RATIO
    return kept


@command
def main(words: Sequence[str]) -> int:
    """Measure, show, write; returns the exit code."""
    given = options(words, DEFAULTS)
    device, seconds = resolve_device(given["device"]), positive("seconds", given["seconds"])
    size, batch = given["size"], whole("batch", given["batch"])
    if size not in SIZES:
        raise unknown("size", size, SIZES)
    only = given["only"].split(",")
    for name in only:
        if name not in WORKS:
            raise unknown("only", name, WORKS)
    if given["compile"] not in ("true", "false"):
        raise unknown("compile", given["compile"], ("true", "false"))
    on, found, compiled = ceilings(device, seconds / 4), list[GpuTime](), given["compile"] == "true"
    works = {
        "chunk": chunks(size, device, seconds, compiled=compiled),
        "training": training(size, batch, device, seconds, compiled=compiled),
    }
    for row in itertools.chain.from_iterable(works[name] for name in only):
        found.append(row)
        print(f"{row.work}, {row.options}: {row.ms:.2f} ms", file=sys.stderr, flush=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine()["processor"]
    print(f"{name}: copies {on['bandwidth'] / 1e9:,.0f} GB/s, bf16 products {on['bf16_peak'] / 1e12:,.1f} TFLOP/s")
    show(found)
    kept = bounds(found)
    for line, good in kept.items():
        print(f"{line}: {'kept' if good else 'MISSED'}" if device.type == "cuda" else line)
    if given["output"]:
        content = {"machine": machine() | on | {"device": name}, "versions": versions()}
        with atomic_path(Path(given["output"])) as temporary:
            temporary.write_text(json.dumps(content | {"rows": [asdict(row) for row in found]}, indent=1) + "\n")
    return 0 if device.type == "cpu" or all(kept.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
