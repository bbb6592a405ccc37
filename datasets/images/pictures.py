"""How pictures lie in an array, told by its shape and type, and how they become what a policy sees: [H, W, 3].

a row                              kind      seen as
[H, W, 3]                          colour    it is
[3, H, W]                          colour    the same with its axes moved
[H, W, 4], [4, H, W]               colour    the same without the fourth channel (alpha)
[H, W], [H, W, 1], [1, H, W]       grey      three equal colours
the same of another type           depth     not at all: uint8 holds no distances
two long axes and others           unknown   not at all
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

LONG = 8
"""Values along an axis of a picture, at least; what is smaller is a matrix, or some vectors. uint8 may be shorter."""


class Picture(NamedTuple):
    """channels: the axis of a row that holds them, None where there is none. size: height and width."""

    kind: Literal["colour", "grey", "depth", "unknown"]
    size: tuple[int, int] = (0, 0)
    channels: int | None = None
    n_channels: int = 1

    @property
    def seen(self) -> bool:
        """Whether a policy can see it."""
        return self.kind in ("colour", "grey")

    @property
    def change(self) -> str:
        """What is done to the pixels, in words; empty for nothing."""
        if self.kind == "grey":
            return "grey, as three equal colours"
        moved = ["colours moved to the last axis"] if self.channels == 0 else []
        return " and ".join(moved + (["the fourth channel left out"] if self.n_channels == 4 else []))

    def pixels(self, rows: np.ndarray) -> np.ndarray:
        """Rows as they are stored as [n, H, W, 3], in their type."""
        rows = rows[..., None] if self.channels is None else np.moveaxis(rows, 1 + self.channels, -1)[..., :3]
        return np.broadcast_to(rows, (*rows.shape[:3], 3))


def preview(depth: np.ndarray) -> np.ndarray:
    """Depth [H, W] in any unit, 0 or not finite where it is unknown, for people: uint8 [H, W, 3], grey.

    What is near is dark, what is farthest white, and what is unknown black.
    """
    known = np.nan_to_num(np.asarray(depth, np.float32), posinf=0.0, neginf=0.0)
    grey = (known * (255 / max(float(known.max(initial=0)), 1e-12))).clip(0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def picture(shape: tuple[int, ...], dtype: np.dtype) -> Picture | None:
    """What an array [N, …] shows; None where it is no picture."""
    row = shape[1:]
    uint8 = dtype == np.uint8
    if len(row) < 2 or 0 in row or (sum(side >= LONG for side in row) < 2 and not (uint8 and len(row) == 3)):
        return None
    if len(row) == 2:
        return Picture("grey" if uint8 else "depth", (row[0], row[1]))
    for n_channels, axis in ((3, 2), (3, 0), (4, 2), (4, 0), (1, 2), (1, 0)) if len(row) == 3 else ():
        size = row[:2] if axis == 2 else row[1:]
        if row[axis] == n_channels and (uint8 or min(size) >= LONG):
            kind: Literal["colour", "grey", "depth"] = "colour" if n_channels > 1 else "grey" if uint8 else "depth"
            return Picture(kind, (size[0], size[1]), axis, n_channels)
    return Picture("unknown")
