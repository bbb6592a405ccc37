"""A cloud of points out of what a simulator's cameras see, in the world's frame: what a calibrated rig would know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from action_diffusion.datasets.images.points import farthest, from_depth, within
from action_diffusion.errors import InputError

LOW, HIGH = (-0.2, -0.2, 0.805), (0.2, 0.2, 1.1)
"""Above the middle of Lift's table, which is 0.8 m high, m."""


class View(NamedTuple):
    """pixels: uint8 [H, W, 3]. depth: [H, W] in m. intrinsics: [3, 3]. pose: [4, 4], of the camera in the world."""

    pixels: np.ndarray
    depth: np.ndarray
    intrinsics: np.ndarray
    pose: np.ndarray


class PointCloud:
    """cameras: whose depth it is made of. low, high: corners [3] of the box that points are kept in, m. n: how many.
    colours: whether each point has red, green and blue, 0 to 1, behind its position.

    Raises `InputError` for a box without room.
    """

    def __init__(
        self,
        cameras: Sequence[str] | None = None,
        low: Sequence[float] | None = None,
        high: Sequence[float] | None = None,
        n: int = 128,
        colours: bool = True,
    ) -> None:
        self.cameras = tuple(cameras or ("agentview",))
        self.low, self.high = np.array(low or LOW), np.array(high or HIGH)
        self.n, self.colours = n, colours
        if not (self.low < self.high).all():
            raise InputError(f"points: the box from {self.low.tolist()} to {self.high.tolist()} has no room")

    def points(self, views: Sequence[View]) -> np.ndarray:
        """float32 [n, 3 or 6]: those in the box, spread over what is seen."""
        seen = []
        for view in views:
            position = from_depth(view.depth, view.intrinsics, view.pose).reshape(-1, 3)
            seen.append(np.concatenate([position, view.pixels.reshape(-1, 3) / 255], axis=1))
        kept = within(np.concatenate(seen), self.low, self.high)
        return farthest(kept, self.n)[:, : 6 if self.colours else 3].astype(np.float32)
