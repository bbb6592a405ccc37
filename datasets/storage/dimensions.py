"""What the dimensions of columns are called: the attribute `names`, {"action": ["shoulder", "elbow"]}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = "names"
"""The attribute."""


def are_names(names: Any, size: int) -> bool:
    """Whether these are `size` different words."""
    return isinstance(names, list) and all(isinstance(n, str) for n in names) and len({*names}) == len(names) == size


def dimension_names(attrs: Mapping[str, Any], key: str, size: int) -> list[str] | None:
    """Of the `size` dimensions of column `key`; None where the attributes do not name each."""
    given = attrs.get(NAMES)
    names = given.get(key) if isinstance(given, Mapping) else None
    return names if are_names(names, size) else None
