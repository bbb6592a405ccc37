"""Images as video, a frame a row: encoded without look-ahead or reordering, decoded forwards and counted.

H.264 in full colour resolution (4:4:4), because halving that alone leaves PushT's images at 39 dB, and at one quantiser
for all frames, because a constant rate factor leaves noise at 31 dB; with 10 every frame of noise has 40 dB, and the
smoother more. `lossless` is H.264 too, of red, green and blue as they are.

Frame i is shown at i / rate. A video where that is not so had frames dropped, and is refused, because its rows would no
longer be those of the data beside it.

Depth is grey of more than 8 bits, and comes as the codes that are stored, uint16.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from action_diffusion.datasets.formats.columns import PiecewiseColumn, RowRange
from action_diffusion.datasets.formats.contract import Quality
from action_diffusion.datasets.formats.folder.images import MOST_PIXELS
from action_diffusion.datasets.images.video import Encoding, Pixels, VideoWriter
from action_diffusion.datasets.storage.store import reading
from action_diffusion.errors import InputError

_ENCODINGS = {
    "high": Encoding("libx264", "yuv444p", {"preset": "veryfast", "bf": "0", "qp": "10"}),
    "lossless": Encoding("libx264rgb", "rgb24", {"preset": "veryfast", "bf": "0", "qp": "0"}),
}
PIXELS = {"high": "yuv444p", "lossless": "gbrp"}
"""What a decoder calls the pixels of each quality."""
TOLERANCE = 0.1
"""Of the time between two rows: how far a frame may be from its row. LeRobot allows 1e-4 s."""
_OPEN = 4
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"


class EncodedVideoWriter(VideoWriter):
    """An MP4 file of some quality, in a folder that is made for it. The rest is as in `VideoWriter`."""

    def __init__(
        self, path: Path, size: tuple[int, int], *, rate: float, quality: Quality, keyframe_every: int
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(path, size, rate=rate, encoding=_ENCODINGS[quality], keyframe_every=keyframe_every)


class VideoInfo(NamedTuple):
    """size: height and width. times: of each frame, s; NaN where the file does not say. kind: how pixels are read.

    stamps: when each frame is shown, in the file's own unit, increasing; None where it does not say. keys: the numbers
    of the frames that are decoded by themselves, from 0.
    """

    frames: int
    size: tuple[int, int]
    rate: float
    times: np.ndarray
    kind: VideoKind
    stamps: np.ndarray | None
    keys: np.ndarray


class VideoKind(NamedTuple):
    """shape: of a frame, [H, W, 3] or [H, W] of depth. alpha: there is one, which is not read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    alpha: bool = False


def video_info(path: Path, *, colours: bool = True) -> VideoInfo:
    """Counted without decoding. colours: grey of 8 bits stands for three equal colours.

    Raises `InputError` for a file that is cut off or no video, and for pixels that 8 bits (depth: 16) do not hold.
    """
    with reading(str(path)), _open(path) as container:
        stream = _stream(container, path)
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        times = [math.nan if packet.pts is None else float(packet.pts * packet.time_base) for packet in packets]
        size = (stream.height, stream.width)
        if stream.height * stream.width > MOST_PIXELS:
            raise InputError(f"{path}: frames of {stream.width} x {stream.height}, more than is read")
        rate = float(stream.average_rate or 0)
        kind = _kind(stream.format, size, path, colours)
        return VideoInfo(len(packets), size, rate, np.sort(times), kind, *_seekable(packets))


def _seekable(packets: list[Any]) -> tuple[np.ndarray | None, np.ndarray]:
    """`VideoInfo.stamps` and `keys` of the packets, which come in the order of decoding."""
    if any(packet.pts is None for packet in packets):
        return None, np.zeros(1, np.int64)
    stamps = np.array([packet.pts for packet in packets], np.int64)
    order = np.argsort(stamps, kind="stable")
    keys = np.flatnonzero(np.array([packet.is_keyframe for packet in packets], bool)[order])
    return stamps[order], np.unique(np.concatenate([np.zeros(1, np.int64), keys]))


def _open(path: Path) -> Any:
    """Containers only, no playlists, which name other files."""
    return av.open(str(path), options={"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"})


def _stream(container: Any, path: Path) -> Any:
    if not container.streams.video:
        raise InputError(f"{path}: holds no video")
    stream = container.streams.video[0]
    if stream.format is None:
        raise InputError(f"{path}: holds a video that cannot be decoded")
    return stream


def _kind(format: Any, size: tuple[int, int], path: Path, colours: bool) -> VideoKind:
    """Grey of more than 8 bits is depth, and read as its codes."""
    pixels = [part for part in format.components if not part.is_alpha]
    alpha, bits = len(pixels) < len(format.components), max(part.bits for part in pixels)
    grey = format.name.startswith("gray")
    if grey and 8 < bits <= 16:
        return VideoKind(size, np.dtype(np.uint16), alpha)
    if bits > 8:
        raise InputError(
            f"{path}: pixels of {bits} bits ({format.name}), of which 8 would be kept: encode it with "
            "-pix_fmt yuv444p, or depth with gray16le"
        )
    return VideoKind(size if grey and not colours else (*size, 3), np.dtype(np.uint8), alpha)


class Part(NamedTuple):
    """Frames `first` to `end` of a file."""

    path: Path
    first: int
    end: int


def check_times(info: VideoInfo, part: Part, start: float, rate: float, episode: int) -> None:
    """Raises `InputError` where a frame is more than `TOLERANCE` of a row off `start` (s) and its number by `rate`."""
    frames = np.arange(part.first, part.end)
    shifts = (info.times[part.first : part.end] - start) * rate - (frames - part.first)
    bad = ~(np.abs(shifts) <= TOLERANCE)
    if bad.any():
        shift = float(shifts[np.argmax(bad)])
        off = f"{abs(shift):.1f} frames {'late' if shift > 0 else 'early'}"
        raise InputError(
            f"{part.path}: frame {frames[np.argmax(bad)]} is {off} "
            f"for {rate:g} Hz in episode {episode}: frames are missing, or the rate or the episode's time is another"
        )


class Videos:
    """Frames of parts of video files, in any order; those from one key frame to the next are best read together.

    infos: of each file. Several threads may read at once; each keeps `_OPEN` files open.
    """

    def __init__(self, parts: list[Part], kind: VideoKind, infos: Mapping[Path, VideoInfo]) -> None:
        self._parts, self._kind, self._infos = parts, kind, infos
        self._local = threading.local()

    def read(self, piece: RowRange) -> np.ndarray:
        """[n, H, W, 3], or [n, H, W] of depth."""
        part = self._parts[piece.number]
        return self._decoder(part.path).frames(part.first + piece.first, part.first + piece.end)

    def _decoder(self, path: Path) -> _Decoder:
        decoders: dict[Path, _Decoder] = self._local.__dict__.setdefault("decoders", {})
        decoder = decoders.pop(path, None) or _Decoder(path, self._kind, self._infos[path])
        decoders[path] = decoder  # the one that was used last comes last
        if len(decoders) > _OPEN:
            decoders.pop(next(iter(decoders))).close()
        return decoder

    def units(self) -> np.ndarray:
        """See `store.InUnits`."""
        found, row = [], 0
        for part in self._parts:
            keys = self._infos[part.path].keys
            inside = keys[(keys > part.first) & (keys < part.end)] - part.first
            found.append(row + np.concatenate([np.zeros(1, np.int64), inside]))
            row += part.end - part.first
        return np.concatenate(found)


class VideoFilesColumn(PiecewiseColumn):
    """Frames as rows; ends: the row after each part. infos: of each file."""

    def __init__(self, parts: list[Part], kind: VideoKind, ends: np.ndarray, infos: Mapping[Path, VideoInfo]) -> None:
        self._videos = Videos(parts, kind, infos)
        super().__init__(kind.shape, kind.dtype, ends, self._videos.read)

    def units(self) -> np.ndarray:
        """See `store.InUnits`."""
        return self._videos.units()


class _Decoder:
    """A file, decoded forwards from any key frame. next: the frame that comes next."""

    def __init__(self, path: Path, kind: VideoKind, info: VideoInfo) -> None:
        self.path, self._kind, self._info = path, kind, info
        self._colours = Pixels()
        with reading(str(path)):
            self._open()

    def _open(self) -> None:
        self._container = _open(self.path)
        self._stream = _stream(self._container, self.path)
        self.next, self._decoded = 0, self._container.decode(self._stream)

    def frames(self, first: int, end: int) -> np.ndarray:
        images = []
        with reading(str(self.path)):
            self._approach(first)
            while self.next < end:
                frame = next(self._decoded, None)
                if frame is None:
                    raise InputError(f"{self.path}: ends after {self.next} frames, expected {end} or more")
                if self.next >= first:
                    images.append(self._pixels(frame))
                self.next += 1
        return np.stack(images)

    def _approach(self, frame: int) -> None:
        """What comes next is `frame`, or one before it from which it can be reached."""
        key = int(self._info.keys[np.searchsorted(self._info.keys, frame, side="right") - 1])
        if key <= self.next <= frame:
            return
        if key and self._info.stamps is not None:
            stamp = int(self._info.stamps[key])
            self._container.seek(stamp, stream=self._stream)
            decoded = self._container.decode(self._stream)
            # Frames that are shown before the key frame may come after it, and need what was not decoded.
            found = next((one for one in decoded if one.pts is None or one.pts >= stamp), None)
            if found is not None and found.pts == stamp:
                self.next, self._decoded = key, chain([found], decoded)
                return
        self._container.close()
        self._open()

    def _pixels(self, frame: Any) -> np.ndarray:
        size = self._kind.shape[:2]
        if (frame.height, frame.width) != size:
            raise InputError(f"{self.path}: frame {self.next} is {frame.height} x {frame.width}, expected {list(size)}")
        if len(self._kind.shape) == 3:
            return self._colours.of(frame)
        plane, dtype = frame.planes[0], self._kind.dtype
        stored = np.frombuffer(plane, dtype.newbyteorder(">" if frame.format.is_big_endian else "<"))
        return stored.reshape(-1, plane.line_size // dtype.itemsize)[: size[0], : size[1]].astype(dtype)

    def close(self) -> None:
        self._container.close()
