"""JPEG XL and JPEG 2000 as the files of UMI and of Diffusion Policy name them, so that Zarr finds the codecs.

Both compress each image by itself, with codecs that their own code registers under the names that `imagecodecs` has for
them. What was written with any settings is read; what we write is lossless JPEG XL.
"""

from __future__ import annotations

import struct
from contextvars import ContextVar
from typing import Any

import numpy as np
from numcodecs.abc import Codec

from action_diffusion.errors import InputError

_EFFORT = 2
"""Of 1 to 9. On PushT's images 1 takes two thirds of the time and half as much room again, 3 takes longer and more."""
CHUNK_SHAPE: ContextVar[tuple[int, ...] | None] = ContextVar("CHUNK_SHAPE", default=None)
"""Of what is being decoded, where that is known: an image of another size is refused before there is room for it."""


# Not imagecodecs.numcodecs': Zarr calls decode without `out`, and theirs then makes room for whatever a chunk claims.
class JpegXl(Codec):  # type: ignore[misc]
    """One image [H, W, 3] uint8 a chunk. settings: as in the file, such as lossless, effort, distance, level."""

    codec_id = "imagecodecs_jpegxl"

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def encode(self, buf: Any) -> bytes:
        image = np.asarray(buf)
        settings = {key: self.settings.get(key) for key in ("effort", "distance", "lossless", "level")}
        return bytes(_imagecodecs("XL").jpegxl_encode(image.reshape(image.shape[-3:]), numthreads=1, **settings))

    def decode(self, buf: Any, out: Any = None) -> Any:
        image = _imagecodecs("XL").jpegxl_decode(bytes(buf), numthreads=1, out=_room())
        return _placed(image, out)

    def get_config(self) -> dict[str, Any]:
        return {"id": self.codec_id, **self.settings}


class Jpeg2000(Codec):  # type: ignore[misc]
    """One image [H, W, 3] uint8 a chunk, only to be read. settings: as in the file, such as level, codecformat."""

    codec_id = "imagecodecs_jpeg2k"

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def encode(self, buf: Any) -> bytes:
        raise InputError("images are not written as JPEG 2000")

    def decode(self, buf: Any, out: Any = None) -> Any:
        room, packed = _room(), bytes(buf)
        place = packed.find(b"\xff\x4f\xff\x51")  # the beginning of its header, which says the size
        if room is not None and place >= 0:
            width, height, left, top = struct.unpack_from(">4I", packed, place + 8)
            if (height - top, width - left) != room.shape[:2]:
                raise ValueError(f"an image of {width - left} × {height - top} pixels where {list(room.shape)} belong")
        return _placed(_imagecodecs("2000").jpeg2k_decode(packed, out=room), out)

    def get_config(self) -> dict[str, Any]:
        return {"id": self.codec_id, **self.settings}


def lossless() -> JpegXl:
    """What we write. The settings have the names that UMI's own class takes."""
    return JpegXl(level=None, effort=_EFFORT, distance=None, lossless=True, decodingspeed=None, numthreads=1)


def _room() -> np.ndarray | None:
    """Where the image is decoded to."""
    shape = CHUNK_SHAPE.get()
    return None if shape is None else np.empty([size for size in shape[:-3] if size > 1] + list(shape[-3:]), np.uint8)


def _placed(image: np.ndarray, out: Any) -> Any:
    if out is None:
        return image
    out[...] = image.reshape(out.shape)
    return out


def _imagecodecs(kind: str) -> Any:
    try:
        import imagecodecs
    except ImportError:
        raise InputError(f"images in JPEG {kind} need imagecodecs: pip install 'action-diffusion[umi]'") from None
    return imagecodecs
