"""Pictures as bytes (PNG, JPEG, …), read as they are stored: colours as uint8 [H, W, 3], grey and depth as [H, W].

A depth camera's millimetres are a 16-bit PNG, which conversion to colours would cut off at 255. What has more bits
than can be kept is refused. Alpha is dropped, which is said.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any, NamedTuple

import numpy as np

from action_diffusion.datasets.storage.store import reading
from action_diffusion.errors import InputError

MOST_PIXELS = 1 << 25
"""Of a picture: 8K video has fewer, and a bomb more."""
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")
_PNG = b"\x89PNG\r\n\x1a\n"
_ALPHA = {"RGBA": "RGB", "LA": "L", "PA": "RGB"}
_PLAIN = {"RGB": "RGB", "P": "RGB", "L": "L", "1": "L"}


class ImageFile(NamedTuple):
    """shape: [H, W, 3], or [H, W] of grey and depth. alpha: it had one, which is not read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    alpha: bool


def picture(content: bytes, where: str, *, colours: bool) -> ImageFile:
    """What the bytes hold, told from their head. colours: grey of 8 bits stands for three equal colours.

    Raises `InputError` for what is no picture, too large, or cannot be read as it is stored.
    """
    with reading(where):
        return _picture(_opened(content, where), content, where, colours)


def decoded(content: bytes, expected: ImageFile, where: str, *, colours: bool) -> np.ndarray:
    """The pixels. Raises `InputError` where they are not of the expected shape and type."""
    with reading(where):
        image = _opened(content, where)
        found = _picture(image, content, where, colours)
        if found != expected:
            raise InputError(f"{where}: a picture is {_words(found)}, the first is {_words(expected)}")
        if len(found.shape) == 3:
            return np.asarray(image.convert("RGB"))
        pixels = np.asarray(image.convert("L") if found.dtype == np.uint8 else image)
        return pixels.astype(found.dtype, copy=False)


def _opened(content: bytes, where: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError:
        raise InputError(f"{where}: holds no picture in {', '.join(_FORMATS)}") from None
    if image.width * image.height > MOST_PIXELS or getattr(image, "n_frames", 1) > 1:
        raise InputError(
            f"{where}: {image.width} x {image.height} pixels, or several pictures: expected one, of a camera"
        )
    return image


def _picture(image: Any, content: bytes, where: str, colours: bool) -> ImageFile:
    size, mode = (image.height, image.width), image.mode
    deep = content.startswith(_PNG) and content[24] == 16  # bits a channel, which PIL cuts to 8 in colours
    if deep and content[25] != 0:  # grey
        raise InputError(f"{where}: colours of 16 bits, which are not read: store 8 bits a colour")
    if mode.startswith("I;16") or (deep and mode == "I"):
        return ImageFile(size, np.dtype(np.uint16), False)
    if mode in ("I", "F"):
        return ImageFile(size, np.dtype(np.int32 if mode == "I" else np.float32), False)
    plain = _ALPHA.get(mode) or _PLAIN.get(mode)
    if plain is None:
        raise InputError(f"{where}: a picture in {mode}, expected colours (RGB), grey, or depth of 16 bits")
    shape = (*size, 3) if plain == "RGB" or colours else size
    return ImageFile(shape, np.dtype(np.uint8), mode in _ALPHA or "transparency" in image.info)


def _words(found: ImageFile) -> str:
    return f"{found.dtype} {list(found.shape)}{' with alpha' if found.alpha else ''}"
