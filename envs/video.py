"""Episodes as MP4 files that play in every browser: H.264, yuv420p, the index in front (faststart)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from action_diffusion.datasets.images.video import Encoding, VideoWriter
from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path

# One thread: the file is the same on every machine, and other processes keep their cores.
ENCODING = Encoding("libx264", "yuv420p", {"preset": "veryfast", "crf": "23", "threads": "1"}, "faststart")


def write_video(path: str | Path, frames: Iterable[np.ndarray], *, fps: float) -> None:
    """Encode `frames` into the MP4 file `path`, which appears only when it is complete.

    Frames are taken one at a time, so an iterator keeps a single one in memory.

    Args:
        frames: uint8 [T, H, W, 3], RGB, or any iterable of T such pictures. H and W are even, because yuv420p
            halves both.
        fps: pictures per second (> 0).

    Raises:
        InputError: for no frames, another shape or dtype, odd sizes, a rate that is not positive, or a disk
            that does not take the file.
    """
    path = Path(path)
    if not fps > 0:
        raise InputError(f"the video's rate is {fps} pictures per second; it must be positive")
    remaining = iter(frames)
    first = next(remaining, None)
    if first is None:
        raise InputError(f"no frames for the video {path.name}")
    with atomic_path(path) as temporary:
        _encode(temporary, chain([first], remaining), np.asarray(first).shape, fps)


def _encode(path: Path, frames: Iterable[np.ndarray], shape: tuple[int, ...], fps: float) -> None:
    if len(shape) != 3 or shape[2] != 3 or shape[0] % 2 or shape[1] % 2:
        raise InputError(f"a video frame has shape {list(shape)}; it must be [H, W, 3] with even H and W")
    with VideoWriter(path, (shape[0], shape[1]), rate=fps, encoding=ENCODING) as video:
        video.add(_checked(frames, shape))


def _checked(frames: Iterable[np.ndarray], shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    for frame in map(np.asarray, frames):
        if frame.dtype != np.uint8 or frame.shape != shape:
            raise InputError(f"a video frame is {frame.dtype} {list(frame.shape)}; it must be uint8 {list(shape)}")
        yield frame
