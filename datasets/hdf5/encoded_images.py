"""Images that HDF5 files hold as JPEG or PNG, one a row: as bytes, or as uint8 padded with zeros to one length.

They are decoded to what the file says: red, green, blue. Who wrote RGB arrays by `cv2.imencode`, which takes them for
BGR, stored pictures with red and blue exchanged, and any viewer shows them so.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from action_diffusion.errors import InputError

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
_MOST_BYTES = 64 << 20
_MODES = {"RGB": (3, np.uint8), "L": (1, np.uint8), "I;16": (1, np.uint16), "I": (1, np.uint16)}
"""Pillow's names, channels and types; "I" is what older versions call a PNG of 16 bits."""


def image_shape(dataset: Any, where: str) -> tuple[tuple[int, int, int], np.dtype] | None:
    """(H, W, C) and type of the images in `dataset` [T] or [T, P], told from the first; None where it holds no images.

    Raises `InputError` for an image that is damaged, or of other colours.
    """
    if not _can_hold_images(dataset):
        return None
    content = _row(dataset, 0)
    if not content.startswith(_SIGNATURES):
        return None
    with _opened(content, f"{where} row 0") as image:
        return _shape(image)


def decoded(dataset: Any, first: int, end: int, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Rows `first` to `end` [n, H, W, C], uint8 or uint16. Raises `InputError` where one is not of `shape`."""
    return np.stack([_decode(_row(dataset, index), shape, f"{where} row {index}") for index in range(first, end)])


def decoded_image(content: bytes, where: str) -> np.ndarray:
    """A JPEG or PNG file as [H, W, C], uint8 or uint16. Raises `InputError` for another or a damaged one."""
    with _opened(content, where) as image:
        shape, dtype = _shape(image)
        return np.asarray(image).astype(dtype, copy=False).reshape(shape)


def _can_hold_images(dataset: Any) -> bool:
    import h5py

    dtype, shape = dataset.dtype, dataset.shape
    if len(shape) == 2:
        return bool(dtype == np.uint8 and shape[0] and len(_SIGNATURES[1]) <= shape[1] <= _MOST_BYTES)
    text = h5py.check_string_dtype(dtype) is not None or h5py.check_vlen_dtype(dtype) == np.uint8
    return bool(len(shape) == 1 and shape[0] and text and dtype.itemsize <= _MOST_BYTES)


def _row(dataset: Any, index: int) -> bytes:
    value = dataset[index]
    return value.tobytes() if isinstance(value, np.ndarray) else bytes(value)


@contextmanager
def _opened(content: bytes, where: str) -> Iterator[Any]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            if image.mode not in _MODES:
                raise InputError(f"{where}: an image of mode {image.mode}; {', '.join(_MODES)} are read")
            yield image
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{where}: an image that cannot be decoded: {' '.join(str(error).split())}") from None


def _shape(image: Any) -> tuple[tuple[int, int, int], np.dtype]:
    channels, dtype = _MODES[image.mode]
    return (image.height, image.width, channels), np.dtype(dtype)


def _decode(content: bytes, shape: tuple[int, ...], where: str) -> np.ndarray:
    with _opened(content, where) as image:
        found, dtype = _shape(image)
        if found != shape:  # looked at before it is unpacked
            raise InputError(f"{where}: an image {list(found)}, the first is {list(shape)}")
        return np.asarray(image).astype(dtype, copy=False).reshape(found)
