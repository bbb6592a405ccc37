"""What cameras do to a picture between the sensor and a policy."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np

from action_diffusion.errors import InputError


def image_shape(size: Sequence[int] | None, height: int, width: int) -> tuple[int, int, int]:
    """(H, W, 3) of the pictures that `fitted` makes. Raises `InputError` where it would have to enlarge them."""
    if size is None:
        return height, width, 3
    if len(size) != 2 or not (0 < size[0] <= height and 0 < size[1] <= width):
        raise InputError(f"image_size={list(size)} must be [height, width], at most [{height}, {width}]")
    return int(size[0]), int(size[1]), 3


def fitted(cv2: ModuleType, image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The middle of `image` uint8 [h, w, 3], as much of it as `shape` has the proportions of, averaged down to it.

    Of depth uint16 [h, w] the nearest pixels are taken: the mean over an edge is a distance where nothing is.
    """
    h, w = image.shape[:2]
    height, width = shape[:2]
    scale = min(h / height, w / width)
    inner_h, inner_w = round(height * scale), round(width * scale)
    top, left = (h - inner_h) // 2, (w - inner_w) // 2
    middle = image[top : top + inner_h, left : left + inner_w]
    if middle.shape[:2] == (height, width):
        return np.ascontiguousarray(middle)
    how = cv2.INTER_NEAREST if image.ndim == 2 else cv2.INTER_AREA
    resized: np.ndarray = cv2.resize(middle, (width, height), interpolation=how)
    return resized
