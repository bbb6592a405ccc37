"""How long it takes to convert a buffer to each format and back, and how much memory.

    python -m benchmarks.speed.convert data=pusht.zarr.zip [formats=lerobot,umi] [folder=DIR]

Each conversion is a process of its own, as `action-diffusion data convert` is, on a folder that is emptied before. A
row: seconds of the clock and of the processor, the most memory resident, the size on disk, and how alike images are.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from action_diffusion.datasets.formats.registry import NAMES
from action_diffusion.errors import InputError, unknown
from benchmarks.command import command, options

_OPTIONS = {"data": "", "formats": ",".join((*NAMES, "lerobot:lossless")), "folder": ""}
_ENDINGS = {"zarr": ".zarr", "zarr2": ".zarr.zip", "umi": ".zarr.zip", "robomimic": ".hdf5"}
_COMMAND = """
import sys
from action_diffusion.cli import main
code = main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""
"""The command, and the most memory it had, which `getrusage` mixes with that of the process that started it."""


class Run(NamedTuple):
    """seconds: of the clock; busy: of the processor; peak: bytes; output: what the command printed."""

    seconds: float
    busy: float
    peak: int
    output: str


@command
def main(words: Sequence[str]) -> int:
    given = options(words, _OPTIONS)
    source = Path(given["data"]).expanduser()
    if not given["data"] or not source.exists():
        raise InputError(f"data={given['data']}: expected a path to a buffer")
    names = given["formats"].split(",")
    for name in names:
        if name.partition(":")[0] not in NAMES:
            raise unknown("format", name, NAMES)
    print(f"{'format':18} {'there':>17} {'back':>17} {'memory':>9} {'size':>9}  images")
    with tempfile.TemporaryDirectory(dir=given["folder"] or None) as folder:
        for name in names:
            _row(source, name, Path(folder))
    return 0


def _row(source: Path, name: str, folder: Path) -> None:
    kind, _, quality = name.partition(":")
    there, back = folder / f"there{name}{_ENDINGS.get(kind, '')}", folder / f"back{name}.zarr"
    video = [f"video={quality}"] if quality else []
    runs = [_convert(source, there, f"format={kind}", *video), _convert(there, back)]
    times = " ".join(f"{run.seconds:7.1f} s {run.busy:5.1f} s" for run in runs)
    images = re.search(r"video, (.*)", runs[0].output)
    size = sum(file.stat().st_size for file in (there, *there.rglob("*")) if file.is_file())
    peak = max(run.peak for run in runs) / 1e6
    print(f"{name:18} {times} {peak:6.0f} MB {size / 1e6:6.1f} MB  {images[1] if images else 'identical'}", flush=True)


def _convert(source: Path, output: Path, *words: str) -> Run:
    started = time.perf_counter()
    given = ["data", "convert", f"in={source}", f"out={output}", *words]
    process = subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *given], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise InputError(f"{' '.join(given)} failed: exit code {process.returncode}")
    peak = int(text.split()[-2]) * 1024
    return Run(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, peak, text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
