"""Arrays that grow at the end, and one that finds its smallest values without a scan."""

from __future__ import annotations

import math
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
ScalarT = TypeVar("ScalarT", np.bool_, np.int32, np.int64, np.float64)

_FIRST_CAPACITY = 64
_BLOCK = 1024


class Column(Generic[ScalarT]):
    """A vector that grows at the end at amortised constant cost."""

    def __init__(self, dtype: type[ScalarT]) -> None:
        self._data: npt.NDArray[ScalarT] = np.empty(_FIRST_CAPACITY, dtype=dtype)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def values(self) -> npt.NDArray[ScalarT]:
        """[n] a view, to read and to write; good until the next `append` or `keep`."""
        return self._data[: self._size]

    def append(self, values: npt.NDArray[ScalarT]) -> None:
        """Add values at the end."""
        size = self._size + len(values)
        if size > len(self._data):
            data = np.empty(max(size, 2 * self._size), dtype=self._data.dtype)
            data[: self._size] = self.values
            self._data = data
        self._data[self._size : size] = values
        self._size = size

    def cut(self, size: int) -> None:
        """Keep the first `size` values."""
        assert size <= self._size, "a column is cut at a value that it has"
        self._size = size

    def keep(self, slots: Int64) -> None:
        """Keep the values at these places, in this order, and forget the others."""
        kept = self.values[slots]
        self._data = np.empty(max(_FIRST_CAPACITY, 2 * len(kept)), dtype=self._data.dtype)
        self._data[: len(kept)] = kept
        self._size = len(kept)


class BlockMinima:
    """A column with a lower bound per block of 1,024 values, so that few blocks are read to find small values, and one
    of all values, so that mostly none is.

    Values are float64, which holds whole numbers up to 2^53. A value is taken out by `clear`, which puts infinity in
    its place; bounds become exact again when they are looked behind.
    """

    def __init__(self) -> None:
        self._column = Column(np.float64)
        self._bounds = Column(np.float64)
        self._bound = math.inf  # no value is smaller

    @property
    def values(self) -> Float64:
        """[n] a view to read."""
        return self._column.values

    def append(self, values: npt.NDArray[np.float32] | Float64 | Int64) -> None:
        """Add values at the end."""
        if not len(values):
            return
        begin = len(self._column)
        self._column.append(values.astype(np.float64))
        num_blocks = -(-len(self._column) // _BLOCK)
        smallest = float(values.min())
        if num_blocks == len(self._bounds):  # all of them are in the last block
            self._bounds.values[-1] = min(self._bounds.values[-1], smallest)
        else:
            self._bounds.append(np.full(num_blocks - len(self._bounds), np.inf))
            self._tighten(begin // _BLOCK, num_blocks)
        self._bound = min(self._bound, smallest)

    def put(self, slots: Int64, values: npt.NDArray[np.float32]) -> None:
        """Replace the values at these places."""
        self._column.values[slots] = values
        np.minimum.at(self._bounds.values, slots // _BLOCK, values)
        self._bound = min(self._bound, float(values.min(initial=math.inf)))

    def clear(self, slots: Int64) -> None:
        """Take out the values at these places."""
        self._column.values[slots] = np.inf

    def keep(self, slots: Int64) -> None:
        """Keep the values at these places, in this order, and forget the others."""
        kept = self.values[slots]
        self._column, self._bounds, self._bound = Column(np.float64), Column(np.float64), math.inf
        self.append(kept)

    def below(self, limit: float) -> Int64:
        """[k] places of the values smaller than `limit`, ascending. Looks into blocks that may hold one only."""
        if limit <= self._bound:
            return np.empty(0, dtype=np.int64)
        found = []
        for block in np.flatnonzero(self._bounds.values < limit).tolist():
            self._tighten(block, block + 1)
            values = self.values[block * _BLOCK : (block + 1) * _BLOCK]
            found.append(block * _BLOCK + np.flatnonzero(values < limit))
        self._bound = float(self._bounds.values.min(initial=math.inf))
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def smallest(self) -> float:
        """The smallest value; infinity where there is none."""
        bounds = self._bounds.values
        while len(bounds):
            block = int(bounds.argmin())
            bound = float(bounds[block])
            self._tighten(block, block + 1)
            if bounds[block] == bound:
                return bound
        return math.inf

    def _tighten(self, begin_block: int, end_block: int) -> None:
        """Make the bounds of these blocks exact."""
        values = self.values[begin_block * _BLOCK : end_block * _BLOCK]
        if len(values):
            starts = np.arange(0, len(values), _BLOCK)
            self._bounds.values[begin_block:end_block] = np.minimum.reduceat(values, starts)
