"""`action-diffusion info`: what this machine has, which code runs on it, and why.

Every operation of a policy that can be done in several ways was measured here when it was first met (`choice`); the
table says what each way takes and which is taken. Where nothing was measured yet, a training step and a chunk of the
default policies are, first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from rich.console import Console
from rich.table import Table

from action_diffusion import __version__, choice, native
from action_diffusion.datasets.batches import pixels
from action_diffusion.errors import InputError, unknown
from action_diffusion.policy.kernels import cpu_unet, layers, winograd
from action_diffusion.policy.model.denoisers.unet import ConditionalUnet1d
from action_diffusion.policy.model.encoders.encoder import ObservationEncoder
from action_diffusion.progress import progress
from action_diffusion.terminal import parted, width

HELP = """\
action-diffusion info [measure=true|false|again]     what this machine has, which code runs on it, and why

Each operation of a policy is done in the way that was the fastest here, measured at its first use and kept in the
user's cache folder. ACTION_DIFFUSION_KERNELS=off takes torch's operations only, =on this package's code in C wherever
it can be used, =auto (the default) the fastest.

Options
  measure=true                  where nothing was measured yet, measure the default policies' operations, in seconds
  measure=again                 forget what was measured, such as on a busy machine, and measure
"""
LIBRARIES = {"convolutions": winograd.library, "denoising step": cpu_unet.library, "pixels": pixels.library}


def run(words: Sequence[str]) -> int:
    """Print it; returns the exit code. Raises `InputError` for options that do not exist."""
    if any(word in ("-h", "--help") for word in words):
        from action_diffusion.commands.help import fitted

        print(fitted(HELP))
        return 0
    given = dict(word.partition("=")[::2] for word in words)
    for name in given:
        if name != "measure":
            raise unknown("option of info", name, ["measure"])
    if (measure := given.get("measure", "true")) not in ("true", "false", "again"):
        raise InputError(f"measure={measure}: expected true, false or again")
    if measure == "again":
        choice.table().clear()
    if measure != "false" and not choice.table().seconds and choice.mode() == "auto":
        measure_defaults()
    console = Console(highlight=False, soft_wrap=True)
    for name, value in about().items():
        console.print(f"[bold]{name}[/]: {value}")
    console.print(_table(choice.table().seconds))
    return 0


def about() -> dict[str, str]:
    """Name → what there is, for people."""
    machine = choice.machine()
    restricted = [f"{name}={os.environ[name]}" for name in choice.RESTRICTIONS if name in os.environ]
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "action-diffusion": f"{__version__}, torch {torch.__version__}",
        "processor": f"{machine['processor']}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in use",
        "GPU": ", ".join(gpus) or "none",
        "code in C": ", ".join(f"{name} {_set(load())}" for name, load in LIBRARIES.items()),
        "kernels": f"{choice.mode()} (ACTION_DIFFUSION_KERNELS)" + "".join(f", {word}" for word in restricted),
        "measurements": str(choice.table_path()),
    }


def _set(library: native.Library | None) -> str:
    return "not compiled (pip install again where there is gcc)" if library is None else library.instruction_set


def measure_defaults() -> None:
    """Meet the operations of the default policies once: a training step from states and from images, and a chunk."""
    torch.manual_seed(0)
    unet = ConditionalUnet1d(action_dim=2, condition_dim=64)
    encoder = ObservationEncoder(
        image_keys=["image"],
        image_shapes={"image": (96, 96, 3)},
        state_dims={},
        n_obs_steps=2,
        width=0.25,
        stages=3,
    )
    frames = {"image": torch.zeros(32, 2, 96, 96, 3, dtype=torch.uint8)}
    works = (
        lambda: _step(unet, 256).backward(),
        lambda: encoder(frames).sum().backward(),
        lambda: _chunk(unet),
    )
    layers.install(unet, keep=True)
    layers.install(encoder, keep=True)
    with progress("measuring", len(works)) as advance:
        for work in works:
            work()
            advance(1)


def _step(unet: ConditionalUnet1d, batch: int) -> torch.Tensor:
    film = unet.prepare(torch.randn(batch, 64), torch.rand(batch))
    result: torch.Tensor = unet(torch.randn(batch, 16, 2), film.steps + film.condition).square().mean()
    return result


@torch.no_grad()
def _chunk(unet: ConditionalUnet1d) -> None:
    layers.put(cpu_unet.CpuUnet(unet.eval()))
    unet(torch.randn(1, 16, 2), unet.prepare(torch.randn(1, 64), torch.rand(1)).at(0))


def _table(seconds: Mapping[str, Mapping[str, float]]) -> Table:
    """A line an operation: what each way takes, and the one that is taken."""
    table = Table(box=None, pad_edge=False, show_edge=False)
    for heading in ("operation", "size", "threads", "taken", "ms"):
        table.add_column(heading, justify="right" if heading == "threads" else "left", no_wrap=heading != "ms")
    for key in sorted(seconds):
        operation, size, threads = key.rsplit(" ", 2)
        ways = sorted(seconds[key].items(), key=lambda item: item[1])
        others = ", ".join(f"{name} {1e3 * value:.3g}" for name, value in ways[1:])
        taken, least = ways[0]
        table.add_row(
            operation,
            parted(size, max(20, width() - 60)),
            threads.partition("=")[2],
            taken,
            f"{1e3 * least:.3g} ({others})",
        )
    return table
