"""Anything that lerobot films with through its `Camera` classes, its own and installed plugins: lerobot_camera_NAME.

lerobot gives frames no times: they count as exposed when they arrive, and calibration measures how late that is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from action_diffusion.deploy.drivers.images import fitted, image_shape
from action_diffusion.deploy.drivers.lerobot import INSTALL, configuration
from action_diffusion.deploy.drivers.vendor import above_zero, attempt, library, one_line
from action_diffusion.deploy.hardware.protocols import Frame
from action_diffusion.errors import InputError


class LeRobotCamera:
    """Frames of `image_size` [height, width] from the middle of what the camera gives, RGB.

    Args:
        type: lerobot's name of the camera: "opencv", …
        config: what its configuration takes; width, height and fps (px, Hz) are needed.
        plugin: the package that brings the type, where it is not lerobot's own; "": lerobot_camera_TYPE.
        image_size: [height, width] (px); null: as the camera gives them.
    """

    def __init__(
        self, *, type: str, config: Mapping[str, Any], plugin: str = "", image_size: Sequence[int] | None = None
    ) -> None:
        wanted = {name: config.get(name) for name in ("width", "height", "fps")}
        for name, value in wanted.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(f"camera lerobot: config.{name} is missing: say how many are wanted, as a number")
        above_zero("camera lerobot", **{name: float(value) for name, value in wanted.items() if value is not None})
        self._given = (int(config["height"]), int(config["width"]), 3)
        self.shape, self.rate = image_shape(image_size, *self._given[:2]), float(config["fps"])
        self._type, self._config, self._plugin = type, dict(config), plugin
        self._camera: Any = None
        self._cv2: Any = None

    def connect(self) -> None:
        cameras = library("lerobot.cameras", "lerobot", INSTALL)
        make = library("lerobot.cameras.utils", "lerobot", INSTALL).make_cameras_from_configs
        self._cv2 = library("cv2", "cameras")
        try:
            settings = configuration(cameras, cameras.CameraConfig, self._type, self._config, self._plugin)
            self._camera = make({self._type: settings})[self._type]
            self._camera.connect()
            self.read()
        except Exception as error:
            self.close()
            raise InputError(f"lerobot's camera {self._type}: {one_line(error)}") from error

    def read(self) -> Frame:
        """The next frame. Raises `TimeoutError` where none came for two periods or a second."""
        image = np.asarray(self._camera.async_read(timeout_ms=max(1000.0, 2e3 / self.rate)))
        now = time.monotonic()
        if image.shape != self._given or image.dtype != np.uint8:
            raise ConnectionError(f"it gives {image.dtype} {list(image.shape)}, config asks for {list(self._given)}")
        return Frame(now, fitted(self._cv2, image, self.shape))

    def close(self) -> None:
        camera, self._camera = self._camera, None
        if camera is not None:
            attempt(camera.disconnect, 3.0)
