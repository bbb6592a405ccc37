"""Pictures as H.264 in MP4: one writer, and the video that can be read while it is written.

    videos/<key>/episode_000007.mp4      frame i is row i of episode 7
    attributes: videos                   key → {"shape": [H, W, 3], "rate": Hz}

Such a video is in RGB, so that colours are not averaged over pixels as 4:2:0 does. A key frame a second, no frames that
look ahead: frame i is packet i, and needs only those since the last key frame. Every frame is a fragment of its own, so
that a file that was cut off anywhere has all frames up to there but one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from action_diffusion.disk import Disk, GrowingFile

FRAGMENTS = "frag_every_frame+empty_moov+default_base_moof"


class Encoding(NamedTuple):
    """How pictures become a file.

    codec: libx264, or libx264rgb for colours as they are. pixels: what it is given, in FFmpeg's words. options: x264's,
    among them the quality. movflags: how the MP4 file is laid out, in FFmpeg's words.
    """

    codec: str
    pixels: str
    options: Mapping[str, str]
    movflags: str = ""


GROWING = Encoding(
    "libx264rgb",
    "rgb24",
    # crf: on PushT's pictures the PSNR is 50 dB at least. One thread, as other processes need their cores; no frame
    # waits for a later one.
    {"preset": "ultrafast", "tune": "zerolatency", "bf": "0", "crf": "18", "threads": "1"},
    FRAGMENTS,
)


def video_path(buffer: Path, key: str, episode: int) -> Path:
    return buffer / "videos" / key / f"episode_{episode:06d}.mp4"


def keyframe_every(rate: float) -> int:
    """Frames from one key frame of a video that grows to the next: a second, of `rate` Hz."""
    return max(1, int(rate))


class Pixels:
    """Frames of one video as uint8 [H, W, 3]. What converts them is made once: making it takes longer than decoding."""

    def __init__(self) -> None:
        self._converter = VideoReformatter()

    def of(self, frame: av.VideoFrame) -> np.ndarray:
        if frame.format.name == "gbrp":  # these colours already, in planes
            return np.ascontiguousarray(frame.to_ndarray())
        return np.asarray(self._converter.reformat(frame, format="rgb24").to_ndarray())


def as_fraction(rate: float) -> Fraction:
    """Hz as MP4 keeps them: 29.97… is 30000/1001."""
    return Fraction(rate).limit_denominator(1001)


class VideoWriter:
    """An MP4 file of RGB frames, whole once it is closed.

    Args:
        file: a path, or a file that is open; one that is there is replaced.
        size: height and width.
        rate: frames per second: frame i is shown at i / rate.
        encoding: how.
        keyframe_every: how many frames a reader decodes for a random one. None: as x264 likes it.
    """

    def __init__(
        self,
        file: Path | GrowingFile,
        size: tuple[int, int],
        *,
        rate: float,
        encoding: Encoding,
        keyframe_every: int | None = None,
    ) -> None:
        layout = {"movflags": encoding.movflags} if encoding.movflags else {}
        self._container = av.open(str(file) if isinstance(file, Path) else file, "w", format="mp4", options=layout)
        options = {**encoding.options, **({} if keyframe_every is None else {"g": str(keyframe_every)})}
        stream: Any = self._container.add_stream(encoding.codec, rate=as_fraction(rate), options=options)
        stream.height, stream.width = size
        stream.pix_fmt = encoding.pixels
        self._stream, self._time_base = stream, 1 / as_fraction(rate)
        self.n_frames = 0

    def add(self, frames: Iterable[np.ndarray]) -> None:
        """The next frames, uint8 [H, W, 3] each."""
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = self.n_frames, self._time_base
            self._container.mux(self._stream.encode(picture))
            self.n_frames += 1

    def close(self) -> None:
        """All frames are in the file."""
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._container.close()


class GrowingVideo(VideoWriter):
    """The frames of one episode, in a file on the disk of a recording that can be read at any time."""

    def __init__(self, disk: Disk, path: Path, *, shape: Sequence[int], rate: float) -> None:
        disk.make(path.parent)
        self._file = disk.create(path)
        size = shape[0], shape[1]
        super().__init__(self._file, size, rate=rate, encoding=GROWING, keyframe_every=keyframe_every(rate))

    def flush(self) -> int:
        """What is in the file survives a power cut. Returns its number of frames."""
        self._file.sync()
        return max(0, self.n_frames - 1)  # the last one is written with the next

    def close(self) -> None:
        """All frames are in the file, and survive a power cut."""
        super().close()
        self._file.sync()
        self._file.close()

    def abandon(self) -> None:
        """Let go of the file, which nobody needs."""
        with suppress(Exception):  # it writes what is left, to a disk that may have refused before
            self._container.close()
        with suppress(OSError):
            self._file.close()
