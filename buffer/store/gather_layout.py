"""How the columns of a table are gathered: which ones are repeated, which stand in the records of its rows."""

from __future__ import annotations

from collections.abc import Iterable, Set
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from buffer.store.gather_frame import GatherFrame
from buffer.store.gather_source import (
    VIEW_LANES,
    Leaf,
    constant,
    describe_leaf,
    describe_runs,
    fits_records,
    is_fixed,
    leaves,
)

Int32 = npt.NDArray[np.int32]

_FRAMES = 32
"""Sizes of gathers to be quick with: where there are several shards, the share of each varies."""


class GatherLayout:
    """A partition of the columns that suits every batch that was shown to it.

    runs: columns of lists and text; fixed: of fixed width (both as records hold them, see `gather_source`). rest:
    columns that records cannot hold. All other columns have one value in all rows. A column never goes back to those,
    nor from the rest to the records, so that records are made anew a few times at most.
    """

    def __init__(self, schema: pa.Schema, first: pa.RecordBatch, varying: Set[str]) -> None:
        """schema: of what is gathered; the batches, of which `first` is one, may have more columns. varying: columns
        that are never taken for ones of one value."""
        self.schema = schema
        self.runs: tuple[str, ...] = ()
        self.fixed: tuple[str, ...] = ()
        self.rest: tuple[str, ...] = ()
        self._leaves: dict[str, tuple[Leaf, ...]] = {}
        self._nullable: set[str] = set()
        self._unfit: set[str] = set()
        found = {name: _constant(first.column(name)) for name in schema.names if name not in varying}
        self._constants = {name: value for name, value in found.items() if value is not None}
        self._repeated = {name: first.column(name).take(pa.array([0])) for name in self._constants}
        self._arrange()
        self.cover([first])

    def cover(self, batches: Iterable[pa.RecordBatch]) -> bool:
        """Have the layout suit these batches, which have its columns, too. True if that changed it."""
        before = len(self._constants), len(self._unfit), len(self._nullable)
        for batch in batches:
            for name in self.schema.names:
                column = batch.column(name)
                if name in self._constants and _constant(column) != self._constants[name]:
                    del self._constants[name], self._repeated[name]
                if name not in self._unfit and not fits_records(column):
                    self._unfit.add(name)
                if column.null_count:
                    self._nullable.add(name)
        has_changed = before != (len(self._constants), len(self._unfit), len(self._nullable))
        if has_changed:
            self._arrange()
        return has_changed

    @property
    def num_lanes(self) -> int:
        """Of a record."""
        fixed_lanes = sum(leaf.lanes for each in self._leaves.values() for leaf in each)
        return VIEW_LANES * len(self.runs) + fixed_lanes

    def describe(self, batch: pa.RecordBatch, records: Int32, content: pa.Buffer, windows: Int32) -> None:
        """Fill the records [n, lanes] of a batch that the layout suits. content, windows: see `describe_runs`."""
        lane = VIEW_LANES * len(self.runs)
        views = records[:, :lane].reshape(batch.num_rows, len(self.runs), VIEW_LANES)
        describe_runs([batch.column(name) for name in self.runs], views, content, windows)
        for name, own in self._leaves.items():
            for leaf in own:
                describe_leaf(batch.column(name), leaf, records[:, lane : lane + leaf.lanes])
                lane += leaf.lanes

    def frame(self, num_rows: int) -> GatherFrame:
        """Of a batch without the columns of `rest`; kept, since draws are of the same size nearly always."""
        return self._frame(num_rows)

    def _arrange(self) -> None:
        types = {field.name: field.type for field in self.schema if field.name not in self._constants}
        self.rest = tuple(name for name in types if name in self._unfit)
        self.fixed = tuple(name for name in types if name not in self._unfit and is_fixed(types[name]))
        self.runs = tuple(name for name in types if name not in self._unfit and name not in self.fixed)
        self._leaves = {name: leaves(types[name], name in self._nullable) for name in self.fixed}
        fields = [field for field in self.schema if field.name not in self.rest]
        self._frame = lru_cache(_FRAMES)(
            partial(
                GatherFrame,
                pa.schema(fields, self.schema.metadata),
                self.runs,
                self.fixed,
                frozenset(self._nullable.intersection((*self.runs, *self.fixed))),
                dict(self._repeated),
            )
        )


def _constant(column: pa.Array) -> object:
    """See `constant`; a number is expected to vary."""
    is_number = is_fixed(column.type) and not pa.types.is_struct(column.type)
    return None if is_number and column.null_count < len(column) else constant(column)
