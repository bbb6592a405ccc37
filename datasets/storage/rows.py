"""What all columns that read on demand share: rows as in numpy, whatever they are read from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np


class Rows(ABC):
    """A `store.Column` of which only `_take` is left to write."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abstractmethod
    def _take(self, index: Any, rows: np.ndarray) -> Any:
        """What `index` asks for: the rows numbered `rows`; where these are 0-dimensional, one row without its axis."""

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def __getitem__(self, index: Any, /) -> Any:
        """Rows as in numpy: an integer, a slice, an array of integers; further axes are cut after reading."""
        if isinstance(index, tuple):
            if index and isinstance(index[0], slice):
                return self[index[0]][(slice(None), *index[1:])]
            return self[:][index]
        if index is Ellipsis:
            return self[:]
        if isinstance(index, slice):
            return self._take(index, np.arange(*index.indices(len(self))))
        return self._take(index, np.arange(len(self))[index])
