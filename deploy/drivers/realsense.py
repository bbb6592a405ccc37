"""RealSense cameras through `pyrealsense2`: their color stream, or their depth.

The time of a frame is what the camera measured. librealsense gives it in one of three ways (`timestamp_domain`):

    global_time      the camera's clock, brought to the computer's clock of the day by librealsense
    system_time      when the frame arrived, by the computer's clock of the day
    hardware_clock   the camera's own clock, which `RemoteClock` brings to ours

https://github.com/IntelRealSense/librealsense: pipeline, frame_metadata.md.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from action_diffusion.deploy.drivers.images import fitted, image_shape
from action_diffusion.deploy.drivers.vendor import RemoteClock, above_zero, attempt, library, one_line
from action_diffusion.deploy.hardware.protocols import Frame
from action_diffusion.errors import InputError, unknown

STREAMS = ("color", "depth")


class RealSenseCamera:
    """Frames of `image_size` [height, width] from the middle of a stream: RGB, or depth in mm, 0 where it is unknown.

    Args:
        stream: "color" or "depth". Both of one device at once, as two cameras of a cell, are untried.
        serial: the camera's serial number; "": the only one there is.
        width, height, rate: of the stream (px, Hz).
        image_size: [height, width] (px); null: as the stream has them.
        exposure: in units of 100 µs for most color sensors; fixes it, and with it a frame's delay; null: automatic.
    """

    def __init__(
        self,
        *,
        stream: str = "color",
        serial: str = "",
        width: int = 640,
        height: int = 480,
        rate: int = 30,
        image_size: Sequence[int] | None = None,
        exposure: float | None = None,
    ) -> None:
        above_zero("camera realsense", width=width, height=height, rate=rate)
        if stream not in STREAMS:
            raise unknown("stream", stream, STREAMS, "camera realsense")
        shape = image_shape(image_size, height, width)
        self._is_depth, self._unit = stream == "depth", 1e-3
        self.shape: tuple[int, ...] = shape[:2] if self._is_depth else shape
        self.rate = float(rate)
        self._serial, self._size, self._exposure = str(serial), (int(width), int(height), int(rate)), exposure
        self._rs: Any = None
        self._cv2: Any = None
        self._pipeline: Any = None
        self._clock, self._last = RemoteClock(), 0.0

    def connect(self) -> None:
        self._rs = rs = library("pyrealsense2", "realsense")
        self._cv2 = library("cv2", "cameras")
        config = rs.config()
        if self._serial:
            config.enable_device(self._serial)
        width, height, rate = self._size
        stream, form = (rs.stream.depth, rs.format.z16) if self._is_depth else (rs.stream.color, rs.format.rgb8)
        config.enable_stream(stream, width, height, form, rate)
        pipeline = rs.pipeline()
        try:
            config.resolve(rs.pipeline_wrapper(pipeline))  # `start` waits 15 s for a camera that is not there
            profile = pipeline.start(config)
            self._pipeline = pipeline
            device = profile.get_device()
            sensor = device.first_depth_sensor() if self._is_depth else device.first_color_sensor()
            if self._is_depth:
                self._unit = sensor.get_depth_scale()
            if sensor.supports(rs.option.global_time_enabled):
                sensor.set_option(rs.option.global_time_enabled, 1.0)
            if self._exposure is not None:
                sensor.set_option(rs.option.enable_auto_exposure, 0.0)
                sensor.set_option(rs.option.exposure, float(self._exposure))
        except RuntimeError as error:
            self.close()
            which = self._serial or "the first one"
            raise InputError(
                f"camera realsense: {which} at {width} x {height}, {rate} Hz: {one_line(error)}"
            ) from error

    def read(self) -> Frame:
        """The next frame. Raises `TimeoutError` where none came for two periods."""
        came, frames = self._pipeline.try_wait_for_frames(int(2e3 / self.rate) + 1)
        took = (frames.get_depth_frame if self._is_depth else frames.get_color_frame) if came else None
        frame = took() if took is not None else None
        if not frame:
            raise TimeoutError(f"no frame for {2 / self.rate:g} s")
        self._last = max(self._last, self._exposed(frame, time.monotonic()))
        # A copy: the frame's memory is the camera's.
        image = self._in_mm(frame) if self._is_depth else np.array(frame.get_data(), dtype=np.uint8)
        return Frame(self._last, fitted(self._cv2, image, self.shape))

    def _in_mm(self, frame: Any) -> np.ndarray:
        """uint16 [h, w]; what is farther than 65.535 m is unknown."""
        mm = np.round(np.asarray(frame.get_data(), np.float32) * np.float32(1e3 * self._unit))
        return np.where(mm <= np.iinfo(np.uint16).max, mm, 0).astype(np.uint16)

    def _exposed(self, frame: Any, now: float) -> float:
        """When (monotonic s); never later than `now`."""
        stamp, domain = frame.get_timestamp() / 1e3, frame.get_frame_timestamp_domain()
        if domain == self._rs.timestamp_domain.hardware_clock:
            return self._clock(stamp, now)
        age = time.time() - stamp
        return now - age if 0 <= age < 1 else now

    def close(self) -> None:
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            attempt(pipeline.stop)
