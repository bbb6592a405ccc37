"""How long a chunk and a training step must at least take on this machine, and how much longer they do.

    python -m benchmarks.speed.floors [sizes=small,medium,paper] [output=FILE.json] [seconds=5]

Two floors, measured and counted here:

    reading    bytes of the weights over the bandwidth of memory: a chunk at batch 1 reads the denoiser in every step
    computing  floating-point operations over the rate of the best large matrix product

The bound of a work is the larger of its floors, step by step. Memory is read by a sum over more than caches hold.
Operations are those of convolutions and linear layers, zero padding included, which some of our paths skip.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from action_diffusion.errors import unknown
from action_diffusion.files import atomic_path
from action_diffusion.policy.model.conv import Product
from action_diffusion.policy.model.denoisers.unet import ConditionalUnet1d
from action_diffusion.policy.policy import DiffusionPolicy
from benchmarks.command import command, options, positive
from benchmarks.peer.ours import Chunk, Train, load_inputs
from benchmarks.peer.rows import MEDIUM, PAPER, SMALL, Row, write_inputs
from benchmarks.report import machine

SIZES = {"small": SMALL, "medium": MEDIUM, "paper": PAPER}
DEFAULTS = {"sizes": ",".join(SIZES), "output": "", "seconds": "5"}
BACKWARD = 3
"""A training step computes each product three times: forward, for the input's gradient, and for the weight's."""


@dataclass(frozen=True)
class Machine:
    """bandwidth in bytes/s, peak in operations/s."""

    bandwidth: float
    peak: float


@dataclass(frozen=True)
class Floor:
    """A work: what it reads and computes, both floors, and what it takes, in ms."""

    name: str
    megabytes: float
    gflop: float
    reading_ms: float
    computing_ms: float
    measured_ms: float

    @property
    def share(self) -> float:
        """The larger floor as a share of what it takes, in (0, 1]."""
        return max(self.reading_ms, self.computing_ms) / self.measured_ms


def measure_machine(seconds: float) -> Machine:
    """Best of many: what the machine can do, not what it usually does."""
    large = torch.ones(2**27)  # 512 MiB
    a = torch.rand(2048, 2048)
    reading, computing = _best(large.sum, seconds / 2), _best(lambda: a @ a, seconds / 2)
    return Machine(bandwidth=large.nbytes / reading, peak=2 * 2048**3 / computing)


def _best(work: Callable[[], Any], seconds: float) -> float:
    work()
    return min(_times(work, seconds))


def _times(work: Callable[[], Any], seconds: float) -> list[float]:
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


class _Rows:
    """Counts the rows that every layer of the denoiser gets, where `FlopCounterMode` does not see its products."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.operations = 0
        self._layers = [layer for layer in denoiser.modules() if isinstance(layer, Product)]
        self.bytes = sum(layer.weight.nbytes for layer in self._layers)
        self._hooks = [layer.register_forward_hook(self._count) for layer in self._layers]

    def _count(self, layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        assert isinstance(layer, Product)
        rows = out.shape[0] * out.shape[1] // layer.n_matrices  # of a product; `Double` has two for twice the rows
        self.operations += 2 * rows * layer.weight.numel()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _encoder_operations(policy: DiffusionPolicy, obs: dict[str, Tensor]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        policy.encode(obs)
    return int(counter.get_total_flops())


def chunk(size: str, on: Machine, folder: Path, seconds: float) -> list[Floor]:
    """Encoder, denoising step and chunk (DDIM 10) of an image policy at batch 1."""
    settings: dict[str, Any] = {"image": True, "channels": SIZES[size], "steps": 10, "batch": 1, "precisions": ["fp32"]}
    work = Chunk(_prepared(settings, folder), folder, lambda _: None)
    policy = work._policy
    obs, given = load_inputs(policy, folder)
    with torch.no_grad():
        condition = policy.encode(obs)
        film = policy.denoiser.prepare(condition, torch.tensor([50.0])).at(0)
        rows = _Rows(policy.denoiser)
        ConditionalUnet1d.forward(policy.denoiser, given["noise"], film)
        rows.remove()
        encoder = sum(parameter.nbytes for parameter in policy.encoder.parameters())
        operations = _encoder_operations(policy, obs)
        parts = [
            (f"encoder, 2 frames ({size})", encoder, operations, lambda: policy.encode(obs)),
            (f"denoising step, {size}", rows.bytes, rows.operations, lambda: policy.denoiser(given["noise"], film)),
        ]
        found = [_found(name, size, flop, on, _median(call, seconds)) for name, size, flop, call in parts]
        whole = found[0], *[found[1]] * settings["steps"]
        megabytes, gflop = (sum(getattr(part, field) for part in whole) for field in ("megabytes", "gflop"))
        # Each part is bound by its larger floor, whichever that is; here both columns hold their sum.
        bound = sum(max(part.reading_ms, part.computing_ms) for part in whole)
        measured = 1e3 * _median(work.call, seconds)
        found.append(Floor(f"chunk, DDIM 10, {size}", megabytes, gflop, bound, bound, measured))
    return found


def training(name: str, settings: dict[str, Any], on: Machine, folder: Path, seconds: float) -> Floor:
    """A training step of a state or image policy."""
    work = Train(_prepared(settings, folder), folder, lambda _: None)
    policy = work._policy.eval()
    obs, given = load_inputs(policy, folder)
    with torch.no_grad():
        operations = _encoder_operations(policy, obs)
        film = policy.denoiser.prepare(policy.encode(obs), torch.full((len(given["noise"]),), 50.0))
        rows = _Rows(policy.denoiser)
        ConditionalUnet1d.forward(policy.denoiser, given["noise"], film.steps + film.condition)
        rows.remove()
    read = sum(parameter.nbytes for parameter in policy.parameters())
    return _found(name, read, BACKWARD * (operations + rows.operations), on, _median(work.call, seconds))


def _prepared(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`settings`, with inputs in `folder` for them. No weights are copied from a peer, so ours has its own."""
    write_inputs(Row("floor", "", "chunk", "ms", None, settings, {}), folder)
    return settings | {"activation": "silu"}


def _median(work: Callable[[], Any], seconds: float) -> float:
    work()
    return statistics.median(_times(work, seconds))


def _found(name: str, read: int, operations: int, on: Machine, seconds: float) -> Floor:
    return Floor(
        name, read / 1e6, operations / 1e9, 1e3 * read / on.bandwidth, 1e3 * operations / on.peak, 1e3 * seconds
    )


def show(on: Machine, found: Sequence[Floor]) -> None:
    print(
        f"memory {on.bandwidth / 1e9:.1f} GB/s, products {on.peak / 1e9:.0f} GFLOP/s, {torch.get_num_threads()} threads"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("work")
    for heading in ("MB", "GFLOP", "reading ms", "computing ms", "takes ms", "floor"):
        table.add_column(heading, justify="right")
    for work in found:
        figures = [work.megabytes, work.gflop, work.reading_ms, work.computing_ms, work.measured_ms]
        table.add_row(work.name, *(f"{figure:,.1f}" for figure in figures), f"{work.share:.0%}")
    Console(highlight=False).print(table)


def measure(sizes: Sequence[str], seconds: float) -> tuple[Machine, list[Floor]]:
    """Chunks of these sizes and two training steps, one after the other."""
    found: list[Floor] = []
    with tempfile.TemporaryDirectory() as name:
        folder, on = Path(name), measure_machine(seconds)
        for size in sizes:
            found += chunk(size, on, folder, seconds)
        for size, batch, image in (("small", 256, False), ("small", 64, True)):
            settings = {"image": image, "channels": SIZES[size], "batch": batch}
            what = f"training step, {'image' if image else 'state'} policy, {size}, batch {batch}"
            found.append(training(what, settings, on, folder, seconds))
    return on, found


@command
def main(words: Sequence[str]) -> int:
    """Measure, show, write; returns the exit code."""
    given = options(words, DEFAULTS)
    sizes, seconds = given["sizes"].split(","), positive("seconds", given["seconds"])
    for size in sizes:
        if size not in SIZES:
            raise unknown("sizes", size, SIZES)
    on, found = measure(sizes, seconds)
    show(on, found)
    if given["output"]:
        rows = [asdict(work) | {"share": work.share} for work in found]
        content = {"machine": machine() | asdict(on), "rows": rows}
        with atomic_path(Path(given["output"])) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
