"""JPEG XL as UMI's files name it, so that Zarr finds the codec when it meets one.

UMI compresses each image of `camera0_rgb` by itself, with a codec that its own code registers under the name that
`imagecodecs` has for it. What was written with any settings is read; what we write is lossless.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numcodecs.abc import Codec
from numcodecs.registry import register_codec

from action_diffusion.errors import InputError

_EFFORT = 2
"""Of 1 to 9. On PushT's images 1 takes two thirds of the time and half as much room again, 3 takes longer and more."""


class JpegXl(Codec):
    """One image [H, W, 3] uint8 a chunk. settings: as in the file, such as lossless, effort, distance, level."""

    codec_id = "imagecodecs_jpegxl"

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def encode(self, buf: Any) -> bytes:
        image = np.asarray(buf)
        settings = {key: self.settings.get(key) for key in ("effort", "distance", "lossless", "level")}
        return bytes(_imagecodecs().jpegxl_encode(image.reshape(image.shape[-3:]), numthreads=1, **settings))

    def decode(self, buf: Any, out: Any = None) -> Any:
        image = _imagecodecs().jpegxl_decode(bytes(buf), numthreads=1)
        if out is None:
            return image
        out[...] = image.reshape(out.shape)
        return out

    def get_config(self) -> dict[str, Any]:
        return {"id": self.codec_id, **self.settings}


def lossless() -> JpegXl:
    """What we write. The settings have the names that UMI's own class takes."""
    return JpegXl(level=None, effort=_EFFORT, distance=None, lossless=True, decodingspeed=None, numthreads=1)


def _imagecodecs() -> Any:
    try:
        import imagecodecs
    except ImportError:
        raise InputError("images in JPEG XL need imagecodecs: pip install 'action-diffusion[umi]'") from None
    return imagecodecs


def register_jpegxl() -> None:
    """From now on Zarr finds it. Costs nothing where it is not met."""
    register_codec(JpegXl)
