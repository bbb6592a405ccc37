"""Images as video: one MP4 an episode and camera, that can be read while it is written.

    videos/<key>/episode_000007.mp4      frame i is row i of episode 7
    attributes: videos                   key → {"shape": [H, W, 3], "rate": Hz}

H.264 in RGB, so that colours are not averaged over pixels as 4:2:0 does. A key frame a second, no frames that look
ahead: frame i is packet i, and needs only those since the last key frame. Every frame is a fragment of its own, so
that a file that was cut off anywhere has all frames up to there but one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from action_diffusion.disk import Disk

CODEC = "libx264rgb"
QUALITY = "18"
"""The codec's constant rate factor. On PushT's pictures the PSNR is 50 dB at least."""
FRAGMENTS = "frag_every_frame+empty_moov+default_base_moof"


def video_path(buffer: Path, key: str, episode: int) -> Path:
    return buffer / "videos" / key / f"episode_{episode:06d}.mp4"


class VideoWriter:
    """The frames of one episode, in a file that grows.

    Args:
        disk: that of the recording.
        path: of the file; one that is there is replaced.
        shape: [H, W, 3].
        rate: frames per second.
    """

    def __init__(self, disk: Disk, path: Path, *, shape: Sequence[int], rate: float) -> None:
        disk.make(path.parent)
        self._file = disk.create(path)
        self._container = av.open(self._file, "w", format="mp4", options={"movflags": FRAGMENTS})
        stream = self._container.add_stream(CODEC, rate=Fraction(rate).limit_denominator(1000))
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = shape[:2]
        stream.pix_fmt = "rgb24"
        between = str(max(1, int(rate)))  # frames from one key frame to the next: a second at most
        # One thread, as other processes need their cores; no frame waits for a later one.
        fixed = {"preset": "ultrafast", "tune": "zerolatency", "bf": "0", "g": between, "threads": "1"}
        stream.options = {**fixed, "crf": QUALITY}
        self._stream = stream
        self.n_frames = 0

    def add(self, frame: np.ndarray) -> None:
        """The next frame, uint8 [H, W, 3]."""
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture.pts = self.n_frames
        self._container.mux(self._stream.encode(picture))
        self.n_frames += 1

    def flush(self) -> int:
        """What is in the file survives a power cut. Returns its number of frames."""
        self._file.sync()
        return max(0, self.n_frames - 1)  # the last one is written with the next

    def close(self) -> None:
        """All frames are in the file, and survive a power cut."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        self._file.sync()
        self._file.close()

    def abandon(self) -> None:
        """Let go of the file, which nobody needs."""
        with suppress(Exception):  # it writes what is left, to a disk that may have refused before
            self._container.close()
        with suppress(OSError):
            self._file.close()
