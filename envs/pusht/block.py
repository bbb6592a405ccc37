"""The T as something to push: where a finger can touch it, how it moves then, and the ways round it.

Everything here is in the block's own frame, about its centre of gravity, y along the stem (px):

        -60           60
    -45  ┌─────────────┐         the finger is a disc of radius 15; it touches a face when its centre is
    -15  └───┐  c  ┌───┘         15 px in front of it
             │     │
     75      └─────┘             c = (0, 0)

The simulated block has no momentum (all velocity is damped away) and its faces no friction. A finger that
pushes a face by a distance d along its inward normal n, with lever arm l = r x n, therefore moves it like a
single-axle vehicle: s = d / (1 + l^2 / G2) along n, turning l / G2 for every px of s, where G2 = inertia / mass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

FINGER = 15.0
GRAVITY = np.array([0.0, 45.0])  # the centre of gravity from the block's origin
GYRATION2 = 3000.0  # inertia / mass, px^2
PARTS = np.array([[-60.0, -45.0, 60.0, -15.0], [-15.0, -15.0, 15.0, 75.0]])  # bar, stem: x0, y0, x1, y1
CORNERS = np.array([(-60, -45), (60, -45), (60, -15), (15, 75), (-15, 75), (-60, -15)], dtype=np.float64)
_OUTWARD = np.array([(-1, -1), (1, -1), (1, 1), (1, 1), (-1, 1), (-1, 1)], dtype=np.float64)
_RING_DISTANCE = 27.0
_MARGIN = 19.0
FAR = 1e4  # the length of a way that does not exist

# Per face: the first and the last place of the finger's centre, and the direction in which it pushes.
FACES = np.array(
    [
        [(-56, -60), (56, -60), (0, 1)],  # top of the bar
        [(-56, 0), (-31, 0), (0, -1)],  # underside of the bar, left of the stem
        [(31, 0), (56, 0), (0, -1)],  # and right of it
        [(-75, -42), (-75, -18), (1, 0)],  # left end of the bar
        [(75, -42), (75, -18), (-1, 0)],  # right end
        [(-30, 0.5), (-30, 70), (1, 0)],  # left of the stem
        [(30, 0.5), (30, 70), (-1, 0)],  # right of it
        [(-12, 90), (12, 90), (0, -1)],  # foot of the stem
    ],
    dtype=np.float64,
)


def rotated(points: np.ndarray, angle: np.ndarray | float) -> np.ndarray:
    """`points` [..., 2] turned by `angle` [...] rad."""
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = points[..., 0], points[..., 1]
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1)


class BlockPose(NamedTuple):
    """Where the block is: centre of gravity [..., 2] (px) and angle [...] (rad)."""

    centre: np.ndarray
    angle: np.ndarray | float

    @classmethod
    def of(cls, state: np.ndarray) -> BlockPose:
        """From a state [5]: agent x, y, block x, y, angle."""
        return cls(state[2:4] + rotated(GRAVITY, state[4]), float(state[4]))

    def to_world(self, points: np.ndarray) -> np.ndarray:
        """`points` [..., 2] of the block's frame, in the world's."""
        result: np.ndarray = self.centre + rotated(points, self.angle)
        return result

    def to_block(self, points: np.ndarray) -> np.ndarray:
        """`points` [..., 2] of the world, in the block's frame."""
        return rotated(points - self.centre, -np.asarray(self.angle))


@dataclass(frozen=True)
class Contacts:
    """Places from which to push: the finger's centre [..., 2], its direction [..., 2], and the face [...]."""

    at: np.ndarray
    push: np.ndarray
    face: np.ndarray

    @property
    def lever(self) -> np.ndarray:
        """Lever arms r x n [...], px; positive ones turn the block by positive angles."""
        result: np.ndarray = self.at[..., 0] * self.push[..., 1] - self.at[..., 1] * self.push[..., 0]
        return result

    def __getitem__(self, index: Any) -> Contacts:
        return Contacts(self.at[index], self.push[index], self.face[index])


def on_face(face: int, along: np.ndarray) -> Contacts:
    """Contacts [K] on `face`, `along` [K] px from its first place; places beyond an end are moved to it."""
    first, last, push = FACES[face]
    length = float(np.linalg.norm(last - first))
    at = first + np.clip(along, 0, length)[:, None] * (last - first) / length
    return Contacts(at, np.broadcast_to(push, at.shape), np.full(len(at), face))


def all_contacts(spacing: float) -> Contacts:
    """Contacts on all faces, about `spacing` px apart."""
    parts = []
    for face, (first, last, _) in enumerate(FACES):
        length = float(np.linalg.norm(last - first))
        parts.append(on_face(face, np.linspace(0, length, round(length / spacing) + 1)))
    return Contacts(
        at=np.concatenate([part.at for part in parts]),
        push=np.concatenate([part.push for part in parts]),
        face=np.concatenate([part.face for part in parts]),
    )


def pushed(pose: BlockPose, contacts: Contacts, travel: np.ndarray) -> BlockPose:
    """Where `pose` gets to, [...], when the finger at `contacts` [...] moves the face by `travel` [...] px.

    The finger keeps its place on the block, so that the block moves on an arc.
    """
    lever = contacts.lever
    along = travel / (1 + lever**2 / GYRATION2)
    turn = along * lever / GYRATION2
    safe = np.where(np.abs(turn) < 1e-6, 1e-6, turn)
    sideways = np.stack([-contacts.push[..., 1], contacts.push[..., 0]], axis=-1)
    chord = (np.sin(safe) / safe)[..., None] * contacts.push + ((1 - np.cos(safe)) / safe)[..., None] * sideways
    return BlockPose(pose.centre + rotated(along[..., None] * chord, pose.angle), pose.angle + turn)


def _offsets(points: np.ndarray) -> np.ndarray:
    """From the nearest point of each part to `points` [..., 2]: [..., 2 parts, 2]."""
    points = points[..., None, :]
    result: np.ndarray = points - np.clip(points, PARTS[:, :2], PARTS[:, 2:])
    return result


def room(points: np.ndarray) -> np.ndarray:
    """How far a square round each of `points` [..., 2] may reach to every side without touching the T, px."""
    result: np.ndarray = np.abs(_offsets(points)).max(axis=-1).min(axis=-1)
    return result


def backed_off(point: np.ndarray, distance: float) -> np.ndarray:
    """`point` [2] moved straight away from the T until it is `distance` px from both of its parts."""
    for part in range(len(PARTS)):
        offset = _offsets(point)[part]
        length = float(np.linalg.norm(offset))
        if 0 < length < distance:
            point = point + offset * (distance / length - 1)
    return point


def crosses(start: np.ndarray, end: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """Whether the straight way from `start` to `end` [..., 2] comes within `margin` [...] px of the T, bool [...].

    The slab test: a segment is inside a box while it is inside of its extent in x and in y.
    """
    start, step = start[..., None, :], (end - start)[..., None, :]
    step = np.where(np.abs(step) < 1e-9, 1e-9, step)
    margin = np.asarray(margin)[..., None, None]
    low, high = (PARTS[:, :2] - margin - start) / step, (PARTS[:, 2:] + margin - start) / step
    enters = np.minimum(low, high).max(axis=-1)
    leaves = np.maximum(low, high).min(axis=-1)
    result: np.ndarray = (np.maximum(enters, 0) < np.minimum(leaves, 1)).any(axis=-1)
    return result


def _lengths(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Lengths [...] of straight legs; one that comes nearer to the T than 19 px, or than its ends, is FAR longer."""
    margin = np.minimum(_MARGIN, np.minimum(room(start), room(end)) - 0.5)
    result: np.ndarray = np.linalg.norm(end - start, axis=-1) + FAR * crosses(start, end, margin)
    return result


def _walks(edges: np.ndarray) -> np.ndarray:
    """From the lengths [C] of a ring's edges, those of the walks [2 senses, first corner, last corner]."""
    reached = np.cumsum(edges) - edges
    rising = (reached[None] - reached[:, None]) % edges.sum()
    return np.stack([rising, rising.T])


class Ways:
    """The ways of a finger round the T to `targets` [N, 2], both ways round, in the block's frame.

    A ring of six corners, 27 px outside of the T's, is what it walks on; where a straight way is free it is taken.
    Corners that would leave the arena are moved to its edge, where the T leaves room. No leg comes nearer to the T
    than 19 px, or than its own ends.

    Attributes:
        lengths: float64 [3, N] px: straight, round by rising corner numbers, round by falling ones; 10,000 and
            more where there is no such way.
    """

    def __init__(
        self,
        *,
        start: np.ndarray,
        targets: np.ndarray,
        pose: BlockPose,
        arena: tuple[float, float],
    ) -> None:
        outside = np.clip(pose.to_world(CORNERS + _RING_DISTANCE * _OUTWARD), *arena)
        self._start, self._targets, self._ring = start, targets, pose.to_block(outside)
        passable = np.where(room(self._ring) > FINGER + 0.6, 0.0, FAR)
        straight = _lengths(start, targets)
        onto = _lengths(start, self._ring) + passable
        off = _lengths(targets[:, None], self._ring)
        edges = _lengths(self._ring, np.roll(self._ring, -1, axis=0)) + passable
        around = onto[:, None] + _walks(edges) + off[:, None, None, :]  # [N, 2, first corner, last corner]
        around = around.reshape(len(targets), 2, -1)
        self._corners = np.stack(np.divmod(around.argmin(axis=-1), len(CORNERS)), axis=-1)  # [N, 2, 2]
        self.lengths = np.concatenate([straight[None], around.min(axis=-1).T])

    def path(self, target: int, way: int) -> np.ndarray:
        """The points [K, 2] passed on `way` (row of `lengths`) to `target`, which is the last.

        A first corner counts as passed within 20 px, and where the path would turn back at it by more than 120
        degrees: a carrot on such a path would stand still. The leg past it may brush the T's corner.
        """
        if way == 0:
            return self._targets[[target]]
        corner, last = (int(index) for index in self._corners[target, way - 1])
        sense = 1 if way == 1 else -1
        order = [(corner + sense * k) % len(CORNERS) for k in range((sense * (last - corner)) % len(CORNERS) + 1)]
        points = np.concatenate([self._ring[order], self._targets[[target]]])
        here, onward = points[0] - self._start, points[1] - points[0]
        near, along = np.linalg.norm(here), np.linalg.norm(onward)
        passed = near < 20.0 or here @ onward < -0.5 * near * along
        return points[int(passed) :]
