"""How the columns of a table are gathered: which ones are repeated, which stand in the records of its batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import pyarrow as pa

from buffer.store.gather_frame import GatherFrame
from buffer.store.gather_source import GatherSource, is_number

_FRAMES = 32
"""Sizes of gathers to be quick with: where there are several shards, the share of each varies."""


class GatherLayout:
    """A partition of the columns that suits every batch that was shown to it.

    runs, numbers: what the records hold, see `GatherSource`. rest: columns of other types, and numbers with nulls. All
    other columns have one value in all rows. A column never goes back to those, nor from the rest to the records, so
    that records are made anew a few times at most.
    """

    def __init__(self, schema: pa.Schema, first: GatherSource) -> None:
        """schema: of what is gathered; the batches may have more columns."""
        self.schema = schema
        self.names: tuple[str, ...] = tuple(schema.names)
        self.runs: tuple[str, ...] = ()
        self.numbers: tuple[str, ...] = ()
        self.rest: tuple[str, ...] = ()
        self._nullable: set[str] = set()
        self._unfit = {name for name in self.names if not first.fits_records(name)}
        """Columns that records cannot hold for some batch."""
        found = {name: first.constant(name) for name in self.names}
        self._constants = {name: value for name, value in found.items() if value is not None}
        self._repeated = {name: first.batch.column(name).take(pa.array([0])) for name in self._constants}
        self._arrange()
        self.cover([first])

    def cover(self, sources: Sequence[GatherSource]) -> None:
        """Have the layout suit these batches, which have its columns, too."""
        new = [source for source in sources if source.covered_by is not self]
        if not new:
            return
        before = len(self._constants), len(self._unfit), len(self._nullable)
        for source in new:
            for name in [name for name, value in self._constants.items() if source.constant(name) != value]:
                del self._constants[name], self._repeated[name]
            self._unfit |= {name for name in self.names if not source.fits_records(name)}
            self._nullable |= {name for name in self.names if source.batch.column(name).null_count}
            source.covered_by = self
        if before != (len(self._constants), len(self._unfit), len(self._nullable)):
            self._arrange()

    def _arrange(self) -> None:
        types = {field.name: field.type for field in self.schema if field.name not in self._constants}
        runs = [name for name in types if name not in self._unfit and not is_number(types[name])]
        self.runs = tuple(runs)
        self.numbers = tuple(name for name in types if name not in self._unfit and is_number(types[name]))
        self.rest = tuple(name for name in types if name in self._unfit)
        fields = [field for field in self.schema if field.name not in self.rest]
        self._frame = lru_cache(_FRAMES)(
            partial(
                GatherFrame,
                pa.schema(fields, self.schema.metadata),
                self.runs,
                frozenset(self._nullable.intersection(self.runs)),
                self.numbers,
                dict(self._repeated),
            )
        )

    def frame(self, num_rows: int) -> GatherFrame:
        """Of a batch without the columns of `rest`; kept, since draws are of the same size nearly always."""
        return self._frame(num_rows)
