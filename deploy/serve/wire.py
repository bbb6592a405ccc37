"""Messages between policy server and client: msgpack with arrays, as `openpi-client` writes and reads them.

    {"state": {b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [5]}, "prompt": "…", …}

Decoding executes nothing and trusts nothing: a few numeric dtypes, shapes that fit their bytes, a bounded number of
parts. What nobody asks for is not turned into an array at all.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from types import ModuleType

import numpy as np

from action_diffusion.errors import InputError

EXTRA = "action_diffusion"
"""The key of a message under which `RemotePolicy` sends what the protocol of openpi has no word for."""
MAX_PARTS = 1000
"""Maps and lists in a message."""
MAX_LENGTH = 4096
"""Entries of a map or list."""
MAX_AXES = 8
DTYPES = frozenset(("|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8"))


def require(module: str) -> ModuleType:
    """A module of the extra `[serve]`, or an `InputError` that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.partition(".")[0]
        raise InputError(f"{name} is not installed: pip install 'action-diffusion[serve]'") from None


def pack(message: Mapping[str, object]) -> bytes:
    """Plain data and numpy arrays as bytes."""
    packed: bytes = require("msgpack").packb(message, default=_plain)
    return packed


def unpack(data: bytes | str) -> dict[str, object]:
    """The map that a message is; arrays in it are still encoded: see `decode_array`.

    Raises `InputError` for anything else: no msgpack, no map, keys that are no words, too many parts.
    """
    msgpack = require("msgpack")
    parts = 0

    def count(part: object) -> object:
        nonlocal parts
        parts += 1
        if parts > MAX_PARTS:
            raise ValueError(f"more than {MAX_PARTS} maps and lists")
        return part

    limits = {"max_array_len": MAX_LENGTH, "max_map_len": MAX_LENGTH}
    try:
        message = msgpack.unpackb(data, object_hook=count, list_hook=count, **limits)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        reason = str(error).strip() or type(error).__name__
        raise InputError(f"the message cannot be read as msgpack: {shortened(reason)}") from None
    if not isinstance(message, dict):
        raise InputError(f"the message is {shortened(message)}, not a map of observations")
    return {key: value for key, value in message.items() if isinstance(key, str)}


def decode_array(value: object, what: str) -> np.ndarray:
    """An array from its encoded form, read-only. `what` names it in the `InputError` for anything that is none."""
    if not isinstance(value, dict) or b"__ndarray__" not in value:
        raise InputError(f"{what} is {shortened(value)}, not a numpy array")
    dtype, shape, data = (value.get(name) for name in (b"dtype", b"shape", b"data"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{what} has dtype {shortened(dtype)}: only whole and floating-point numbers are taken")
    sizes: list[int] = shape if isinstance(shape, list) else [0]
    if len(sizes) > MAX_AXES or not all(type(n) is int and n > 0 for n in sizes):
        raise InputError(f"{what} has shape {shortened(shape)}, which is none")
    n_bytes = math.prod(sizes) * np.dtype(dtype).itemsize
    if not isinstance(data, bytes) or len(data) != n_bytes:
        given = f"{len(data)} bytes" if isinstance(data, bytes) else shortened(data)
        raise InputError(
            f"{what}: shape {shortened(shape)} and dtype {dtype} need {shortened(n_bytes)} bytes, not {given}"
        )
    return np.frombuffer(data, np.dtype(dtype)).reshape(sizes)


def shortened(value: object, most: int = 80) -> str:
    """`value` in one line of at most `most` characters, whatever it is."""
    if isinstance(value, list) and len(value) <= MAX_AXES and all(type(n) is int for n in value):
        text = str(value)
    elif isinstance(value, str):
        text = " ".join(value[: 2 * most].split())
    elif isinstance(value, float | bool | None) or (isinstance(value, int) and abs(value) < 10**40):
        text = str(value)
    elif isinstance(value, int):  # Python refuses to write out the longest ones
        text = "a number of over 40 digits"
    else:
        text = f"a {type(value).__name__}" + (f" of length {len(value)}" if hasattr(value, "__len__") else "")
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _plain(value: object) -> object:
    """What msgpack has no type for."""
    if isinstance(value, np.ndarray) and value.dtype.str in DTYPES:
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": list(value.shape)}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be sent")
