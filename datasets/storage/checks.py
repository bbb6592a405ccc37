"""What a replay buffer must be before anything learns from it. A wrong file stops here, with one line.

Nothing is repaired: a value that is not finite, an image that is not [H, W, 3] in 0..255, or episodes
that do not tile the rows are errors of whoever wrote the file, and training on them would hide that.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from action_diffusion.errors import InputError


def check_episode_ends(ends: np.ndarray, where: str) -> np.ndarray:
    """`ends` [E] as int64: the row after each episode. Raises `InputError` unless they tile the rows."""
    ends = np.asarray(ends)
    if ends.dtype.kind == "f" and np.isfinite(ends).all() and (ends == np.rint(ends)).all() and (ends < 2**53).all():
        ends = ends.astype(np.int64)  # as some write them; nothing is lost
    if ends.ndim != 1 or ends.dtype.kind not in "iu":
        raise InputError(f"{where}: episode_ends must be a list of whole numbers, got {ends.dtype} {list(ends.shape)}")
    if len(ends) == 0:
        raise InputError(f"{where}: holds no episodes (episode_ends is empty)")
    ends = ends.astype(np.int64)
    lengths = np.diff(ends, prepend=0)
    if (lengths <= 0).any():
        episode = int(np.argmax(lengths <= 0))
        start = int(ends[episode - 1]) if episode else 0
        problem = "is empty" if lengths[episode] == 0 else "ends before it starts"
        raise InputError(
            f"{where}: episode {episode} {problem} (rows {start} to {ends[episode]}): episode_ends must increase"
        )
    return ends


def check_lengths(lengths: Mapping[str, int], n_steps: int, where: str, *, allow_longer: bool = False) -> None:
    """Every array has one row a step. `allow_longer`: rows that an interrupted append left are tolerated."""
    if not lengths:
        raise InputError(f"{where}: holds no arrays under data/")
    shortest, longest = min(lengths.values()), max(lengths.values())
    if shortest == longest == n_steps or (allow_longer and shortest >= n_steps):
        return
    if shortest != longest:
        rows = ", ".join(f"{key} {rows}" for key, rows in lengths.items())
        raise InputError(f"{where}: arrays of unequal length ({rows} rows); episode_ends says {n_steps}")
    problem = "stops at" if n_steps < longest else "goes up to"
    raise InputError(f"{where}: episode_ends {problem} row {n_steps}, but the arrays have {longest} rows")


def check_key(key: str, where: str) -> None:
    """A key is the name of a folder in data/. Raises `InputError` for what is none."""
    if not key or key[0] == "." or not key.isprintable() or any(sign in key for sign in "/\\") or len(key) > 200:
        raise InputError(f"{where}: {key[:200]!r} is no key: expected printable signs without / and no dot in front")


def check_dtype(dtype: np.dtype, key: str, where: str) -> None:
    """Only booleans, whole numbers and floats are data; objects and strings are refused."""
    if dtype.kind not in "biuf":
        raise InputError(f"{where}: data/{key} holds {dtype} values; only numbers can be used")


def check_finite(values: np.ndarray, key: str, where: str, first_row: int = 0) -> None:
    """Raises `InputError` with key and row of the first NaN or infinite value in `values` [N, ...]."""
    if values.dtype.kind != "f":
        return
    finite = np.isfinite(values)
    if finite.all():
        return
    row, *rest = (int(i) for i in np.argwhere(~finite)[0])
    place = f"row {first_row + row}" + (f", column {', '.join(map(str, rest))}" if rest else "")
    value = "NaN" if np.isnan(values[row][tuple(rest)]) else "infinite"
    count = int((~finite.reshape(len(finite), -1).all(axis=1)).sum())
    more = f" ({count} such rows)" if count > 1 else ""
    raise InputError(f"{where}: data/{key} is {value} at {place}{more}; values must be finite")


def images_to_uint8(images: np.ndarray, key: str, where: str, first_row: int = 0) -> np.ndarray:
    """`images` [n, H, W, 3] of any numeric type as uint8, provided that this loses nothing.

    Raises `InputError` that names the row of the first value that is not a whole number from 0 to 255.
    """
    if images.dtype == np.uint8:
        return images
    with np.errstate(invalid="ignore"):  # NaN and out-of-range values show up in the comparison
        converted = images.astype(np.uint8)
    if np.array_equal(converted, images):
        return converted
    check_finite(images, key, where, first_row)
    bad = images[(converted != images).reshape(len(images), -1).any(axis=1)][0]
    row = first_row + int(np.argmax((converted != images).reshape(len(images), -1).any(axis=1)))
    low, high = float(bad.min()), float(bad.max())
    hint = "; this looks like 0..1: multiply by 255" if low >= 0 and high <= 1 else ""
    hint = "; this looks like 16 bits a colour: divide by 257" if images.dtype == np.uint16 else hint
    hint = "; this looks like -1..1: scale to 0..255" if -1 <= low < 0 and high <= 1 else hint
    raise InputError(
        f"{where}: data/{key} row {row} has values {low:g} to {high:g} that are not whole numbers from 0 to 255{hint}"
    )
