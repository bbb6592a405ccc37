"""Images that are decoded when they are needed, from videos and compressed chunks, and not kept as a whole anywhere.

    rows of a batch → units (a chunk, the frames between two key frames) → threads → the units that were used last

Windows see neighbouring rows, which lie in one unit or two. The next batches are known, so their units are decoded
while a step is computed; decoders let other threads run. What comes out is what the column holds, whoever asked first.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from action_diffusion.datasets.storage.rows import Rows
from action_diffusion.datasets.storage.store import Column, row_bytes, units
from action_diffusion.parallel import cores

UNIT_BYTES = 1 << 20
"""Decoded at once of a column that does not say its units."""
_TASK_BYTES = 1 << 20
"""Decoded by one task at least, where there are so many units: a task has a cost of its own."""
_AHEAD_SHARE = 0.25
"""Of the memory for decoded units, what one batch may take to be decoded ahead."""


Unit = Future[np.ndarray]
"""Rows that are decoded together, or will be."""


class Decoders:
    """Threads that decode, and the units that were used last: at most `n_bytes` of them are kept.

    failed: the first error. Nothing is decoded after it, so that a run which ends does not wait for what it began.
    """

    def __init__(self, n_bytes: float) -> None:
        self.n_bytes = n_bytes
        self.pool = ThreadPoolExecutor(max(2, cores()), thread_name_prefix="decoding")
        self.lock = threading.Lock()
        self.failed: BaseException | None = None
        self._kept: OrderedDict[tuple[int, int], tuple[Unit, int]] = OrderedDict()  # (column, unit) → it, its bytes
        self._used = 0

    def get(self, key: tuple[int, int]) -> Unit | None:
        """With `lock` held."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: tuple[int, int], unit: Unit, n_bytes: int) -> None:
        """With `lock` held. The units that were not used for longest go."""
        self._kept[key] = unit, n_bytes
        self._used += n_bytes
        while self._used > self.n_bytes and len(self._kept) > 1:
            _, (_, gone) = self._kept.popitem(last=False)
            self._used -= gone


class DecodedRows(Rows):
    """A column of images, decoded as its rows are asked for.

    Raises `InputError` where what is asked for is damaged or gone, which names the file.
    """

    def __init__(self, column: Column, decoders: Decoders) -> None:
        self.shape, self.dtype = column.shape, column.dtype
        self._column, self._decoders = column, decoders
        starts = units(column)
        self._alone: contextlib.AbstractContextManager[Any] = (
            threading.Lock() if starts is None else contextlib.nullcontext()
        )
        if starts is None:
            starts = np.arange(0, len(self), max(1, UNIT_BYTES // row_bytes(column)))
        self._ends = np.append(starts, len(self))  # unit u is the rows from ends[u] to ends[u + 1]

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """`rows` of any shape: values [*rows.shape, ...]."""
        flat = np.ravel(rows)
        found = np.empty((len(flat), *self.shape[1:]), self.dtype)
        numbers, of_row = np.unique(self._units_of(flat), return_inverse=True)
        for place, unit in enumerate(self._begun(numbers)):
            chosen = np.flatnonzero(of_row == place)
            found[chosen] = unit.result()[flat[chosen] - self._ends[numbers[place]]]
        return found.reshape(*np.shape(rows), *self.shape[1:])

    def prefetch(self, rows: np.ndarray) -> None:
        """Begin to decode what holds `rows`, unless that is too much to be kept until it is asked for."""
        numbers = np.unique(self._units_of(np.ravel(rows)))
        if sum(map(self._bytes, numbers.tolist())) <= _AHEAD_SHARE * self._decoders.n_bytes:
            self._begun(numbers)

    def _take(self, index: Any, rows: np.ndarray) -> Any:
        return self.gather(rows)

    def _units_of(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._ends, rows, side="right") - 1

    def _begun(self, numbers: np.ndarray) -> list[Unit]:
        """The units of these numbers, decoded or about to be."""
        decoders, found = self._decoders, dict[int, Unit]()
        with decoders.lock:
            missing = []
            for number in numbers.tolist():
                unit = decoders.get((id(self), number))
                if unit is None:
                    missing.append(number)
                else:
                    found[number] = unit
            for group in self._groups(missing):
                begun = {number: Unit() for number in group}
                decoders.pool.submit(self._decode, begun)
                for number, unit in begun.items():
                    decoders.put((id(self), number), unit, self._bytes(number))
                found |= begun
        return [found[number] for number in numbers.tolist()]

    def _groups(self, numbers: list[int]) -> list[list[int]]:
        """Units that one task decodes: small ones together."""
        groups, size = list[list[int]](), _TASK_BYTES
        for number in numbers:
            if size >= _TASK_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(number)
            size += self._bytes(number)
        return groups

    def _bytes(self, number: int) -> int:
        return int(self._ends[number + 1] - self._ends[number]) * row_bytes(self._column)

    def _decode(self, begun: Mapping[int, Unit]) -> None:
        """Fill these units."""
        spans = {number: (int(self._ends[number]), int(self._ends[number + 1])) for number in begun}
        try:
            if self._decoders.failed is not None:
                raise self._decoders.failed
            with self._alone:
                if len(begun) == 1:
                    ((first, end),) = spans.values()
                    decoded = np.asarray(self._column[first:end])
                else:
                    decoded = np.asarray(self._column[np.concatenate([np.arange(*span) for span in spans.values()])])
        except BaseException as error:
            self._decoders.failed = error
            for unit in begun.values():
                unit.set_exception(error)
            return
        done = 0
        for number, (first, end) in spans.items():
            rows = decoded[done : done + end - first]
            begun[number].set_result(rows if len(begun) == 1 else rows.copy())  # a view would keep the others, too
            done += end - first
