"""USB cameras through OpenCV's Video4Linux backend.

    camera ── exposure ── USB ──▶ kernel: buffer stamped by the monotonic clock ──▶ grabbing thread ──▶ read

The kernel's stamp is the time of a frame: on Linux `time.monotonic` is the same clock. Where a driver gives none, or
one of another clock, it is the time at which the frame arrived.

https://docs.opencv.org: VideoCapture; Linux media documentation: V4L2_BUF_FLAG_TIMESTAMP_MONOTONIC.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from action_diffusion.deploy.drivers.images import fitted, image_shape
from action_diffusion.deploy.drivers.vendor import above_zero, attempt, library
from action_diffusion.deploy.hardware.protocols import Frame
from action_diffusion.errors import InputError

OLDEST = 1.0
"""A stamp that says that a frame is older than this (s) is of another clock."""


class UsbCamera:
    """Frames of `image_size` [height, width] from the middle of what the camera sends, RGB.

    Args:
        device: /dev/v4l/by-id/… or by-path/…, which stay the same when cables are moved; or a number.
        width, height, rate: what the camera is asked for (px, Hz). One that does otherwise is refused.
        image_size: [height, width] (px); null: as the camera sends them.
        format: four letters: MJPG, or YUYV where the bus has room for it.
        exposure: in the camera's units, which fixes it, and with it a frame's delay and rate; null: automatic.
    """

    def __init__(
        self,
        *,
        device: str | int,
        width: int = 640,
        height: int = 480,
        rate: float = 30.0,
        image_size: Sequence[int] | None = None,
        format: str = "MJPG",
        exposure: float | None = None,
    ) -> None:
        above_zero("camera usb", width=width, height=height, rate=rate)
        if len(format) != 4:
            raise InputError(f"camera usb: format={format} must be four letters, such as MJPG")
        self.shape, self.rate = image_shape(image_size, height, width), float(rate)
        self._device, self._size, self._format, self._exposure = device, (height, width), format, exposure
        self._cv2: Any = None
        self._capture: Any = None
        self._thread: threading.Thread | None = None
        self._ended, self._arrived = threading.Event(), threading.Condition()
        self._newest: tuple[float, np.ndarray] | None = None
        self._failed = ""
        self._last = 0.0

    def connect(self) -> None:
        self._cv2 = cv2 = library("cv2", "cameras")
        self._capture = cv2.VideoCapture(self._device, cv2.CAP_V4L2)
        if not self._capture.isOpened():
            self.close()
            raise InputError(f"camera usb: {self._device} cannot be opened: is it plugged in, free, and yours to read?")
        self._capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*self._format))
        height, width = self._size
        wanted = {cv2.CAP_PROP_FRAME_WIDTH: width, cv2.CAP_PROP_FRAME_HEIGHT: height, cv2.CAP_PROP_FPS: self.rate}
        for name, value in wanted.items():
            self._capture.set(name, value)
        self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
        if self._exposure is not None:
            self._capture.set(cv2.CAP_PROP_AUTO_EXPOSURE, 1)  # V4L2_EXPOSURE_MANUAL
            self._capture.set(cv2.CAP_PROP_EXPOSURE, self._exposure)
        got = [self._capture.get(name) for name in wanted]
        if any(abs(value - other) > 0.5 for value, other in zip(wanted.values(), got, strict=True)):
            self.close()
            raise InputError(
                f"camera usb: {self._device} does not do {width} x {height} at {self.rate:g} Hz as {self._format}, "
                f"but {got[0]:g} x {got[1]:g} at {got[2]:g} Hz: v4l2-ctl --list-formats-ext shows what it does"
            )
        self._thread = threading.Thread(target=self._grab, daemon=True, name="camera")
        self._thread.start()

    def _grab(self) -> None:
        """A thread of its own, since OpenCV waits up to 10 s for a frame."""
        while not self._ended.is_set():
            try:
                taken, image = self._capture.read()
                stamp = self._capture.get(self._cv2.CAP_PROP_POS_MSEC) / 1e3
            except Exception as error:
                taken, image, self._failed = False, None, f": {error}"
            with self._arrived:
                if not taken:
                    self._failed = f"the camera sends no more{self._failed}"
                    self._arrived.notify()
                    return
                self._newest = (stamp, image)
                self._arrived.notify()

    def read(self) -> Frame:
        """The next frame. Raises `TimeoutError` where none came for two periods, `InputError` where none will."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._newest is not None or self._failed != "", timeout=2 / self.rate)
            newest, self._newest = self._newest, None
            if newest is None and self._failed:
                raise InputError(f"camera usb: {self._device}: {self._failed}")
        if newest is None:
            raise TimeoutError(f"no frame for {2 / self.rate:g} s")
        stamp, image = newest
        now = time.monotonic()
        self._last = max(self._last, stamp if now - OLDEST < stamp <= now else now)
        rgb = np.asarray(image)[:, :, ::-1]
        return Frame(self._last, fitted(self._cv2, rgb, self.shape))

    def close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(1.0)
        if self._capture is not None and not (self._thread is not None and self._thread.is_alive()):
            attempt(self._capture.release)
        self._capture = None
