"""Which columns are rotations, as a buffer's attributes say: `{"rotations": {"eef_quat": "quaternion_xyzw"}}`.

A column may hold other things too (`"action": "rotation_vector@3"`: its values 3 to 5), and several rotations (a list).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError, unknown
from action_diffusion.rotations import RotationColumns, parse_rotations

ROTATIONS = "rotations"


def declared_rotations(
    buffer: ReplayBuffer, given: Mapping[str, Any] | None = None
) -> dict[str, tuple[RotationColumns, ...]]:
    """Those of each column; what is `given` stands for what the buffer says of it.

    Raises `InputError` where one cannot be, and for a given column that is not there.
    """
    for key in given or {}:
        if key not in buffer.keys:
            raise unknown("column of the buffer for a rotation", key, buffer.keys, buffer.name)
    said = buffer.attrs.get(ROTATIONS) or {}
    if not isinstance(said, Mapping):
        raise InputError(f"{buffer.name}: the attribute {ROTATIONS} is no mapping from columns to rotations")
    found = {}
    for key, texts in {**said, **(given or {})}.items():
        where = f"{buffer.name}: {ROTATIONS}.{key}"
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{where}: expected words, such as quaternion_xyzw or rotation_vector@3")
        if key in buffer.keys:
            found[key] = parse_rotations(texts, math.prod(buffer[key].shape[1:]), where)
    return found


def as_attribute(rotations: Mapping[str, Sequence[RotationColumns]]) -> dict[str, list[str]]:
    """What `declared_rotations` reads."""
    return {key: [f"{one.representation}@{one.first}" for one in own] for key, own in rotations.items() if own}
