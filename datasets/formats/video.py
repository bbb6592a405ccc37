"""Images as video, a frame a row: encoded without look-ahead or reordering, decoded forwards and counted.

H.264 in full colour resolution (4:4:4), because halving that alone leaves PushT's images at 39 dB, and at one quantiser
for all frames, because a constant rate factor leaves noise at 31 dB; with 10 every frame of noise has 40 dB, and the
smoother more. `lossless` is H.264 too, of red, green and blue as they are.

Frame i is shown at i / rate. A video where that is not so had frames dropped, and is refused, because its rows would no
longer be those of the data beside it.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import av
import numpy as np

from action_diffusion.datasets.formats.columns import Piece, PiecewiseColumn
from action_diffusion.datasets.formats.contract import Quality
from action_diffusion.datasets.store import reading
from action_diffusion.errors import InputError

_ENCODERS: dict[str, tuple[str, str, dict[str, str]]] = {
    "high": ("libx264", "yuv444p", {"qp": "10"}),
    "lossless": ("libx264rgb", "rgb24", {"qp": "0"}),
}
_OPTIONS = {"preset": "veryfast", "bf": "0"}
PIXELS = {"high": "yuv444p", "lossless": "gbrp"}
"""What a decoder calls the pixels of each quality."""


class VideoWriter:
    """An MP4 file of RGB frames. rate: Hz; keyframe_every: how many frames a reader decodes for a random one."""

    def __init__(
        self, path: Path, size: tuple[int, int], *, rate: float, quality: Quality, keyframe_every: int
    ) -> None:
        encoder, pixels, options = _ENCODERS[quality]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(path), "w")
        options = {**_OPTIONS, **options, "g": str(keyframe_every)}
        stream: Any = self._container.add_stream(encoder, rate=as_fraction(rate), options=options)
        stream.height, stream.width = size
        stream.pix_fmt = pixels
        self._stream, self._count, self._time_base = stream, 0, 1 / as_fraction(rate)

    def add(self, images: np.ndarray) -> None:
        """images: uint8 [n, H, W, 3]."""
        for image in images:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = self._count
            frame.time_base = self._time_base
            self._container.mux(self._stream.encode(frame))
            self._count += 1

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self._container.mux(self._stream.encode())
        self._container.close()


class VideoInfo(NamedTuple):
    """size: height and width."""

    frames: int
    size: tuple[int, int]
    rate: float


def video_info(path: Path) -> VideoInfo:
    """Counted without decoding. Raises `InputError` for a file that is missing, cut off, or no video."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with reading(str(path)), av.open(str(path)) as container:
        if not container.streams.video:
            raise InputError(f"{path}: holds no video")
        stream = container.streams.video[0]
        frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        return VideoInfo(frames, (stream.height, stream.width), float(stream.average_rate or 0))


class Part(NamedTuple):
    """Frames `first` to `end` of a file."""

    path: Path
    first: int
    end: int


class Videos:
    """Frames of parts of video files, one part after the other. One file is open at a time."""

    def __init__(self, parts: list[Part], *, rate: float | None) -> None:
        """rate: Hz that the frames' times must have; None: any."""
        self._parts, self._rate = parts, rate
        self._decoder: _Decoder | None = None

    def read(self, piece: Piece) -> np.ndarray:
        """uint8 [n, H, W, 3]."""
        part = self._parts[piece.number]
        first, end = part.first + piece.first, part.first + piece.end
        if self._decoder is None or self._decoder.path != part.path or self._decoder.next > first:
            if self._decoder is not None:
                self._decoder.close()
            self._decoder = _Decoder(part.path, self._rate)
        return self._decoder.frames(first, end)


def video_column(parts: list[Part], size: tuple[int, int], ends: np.ndarray, *, rate: float | None) -> PiecewiseColumn:
    """uint8 [N, H, W, 3]; ends: the row after each part."""
    return PiecewiseColumn((*size, 3), np.dtype(np.uint8), ends, Videos(parts, rate=rate).read)


class _Decoder:
    """A file, decoded forwards. next: the frame that comes next."""

    def __init__(self, path: Path, rate: float | None) -> None:
        self.path, self.next = path, 0
        with reading(str(path)):
            self._container = av.open(str(path))
            stream: Any = self._container.streams.video[0]
            self._rate = rate
            self._decoded = self._container.decode(stream)
        self._start: float | None = None

    def frames(self, first: int, end: int) -> np.ndarray:
        images = []
        with reading(str(self.path)):
            while self.next < end:
                frame = next(self._decoded, None)
                if frame is None:
                    raise InputError(f"{self.path}: ends after {self.next} frames, expected {end} or more")
                self._check_time(frame.time)
                if self.next >= first:
                    images.append(frame.to_ndarray(format="rgb24"))
                self.next += 1
        return np.stack(images)

    def _check_time(self, time: float | None) -> None:
        if time is None or self._rate is None:
            return
        self._start = time if self._start is None else self._start
        shift = (time - self._start) * self._rate - self.next
        if abs(shift) > 0.5:
            raise InputError(
                f"{self.path}: frame {self.next} is {abs(shift):.1f} frames {'late' if shift > 0 else 'early'} for "
                f"{self._rate:g} Hz: frames are missing or the rate is another"
            )

    def close(self) -> None:
        self._container.close()


def as_fraction(rate: float) -> Fraction:
    return Fraction(rate).limit_denominator(1001)
