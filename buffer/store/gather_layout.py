"""How the columns of a table are gathered: which ones are repeated, which stand in the records of its batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from buffer.store.gather_source import GatherSource, is_number, item_bytes


class RunColumn(NamedTuple):
    """A column of lists or of text. items: type of a list's items, None of text; item_shift: they have 2^k bytes;
    is_nullable: it has a null somewhere."""

    name: str
    type: pa.DataType
    items: pa.DataType | None
    item_shift: int
    is_nullable: bool


class GatherLayout:
    """A partition of the columns that suits every batch that was shown to it.

    runs, numbers: what the records hold, see `GatherSource`; runs of wide items come first, so that each column begins
    at a multiple of its items' width where their bytes follow one another. rest: columns of other types, and numbers
    with nulls. All other columns have one value in all rows. A column never goes back to those, nor from the rest to
    the records, so that records are made anew a few times at most.
    """

    def __init__(self, schema: pa.Schema, first: GatherSource) -> None:
        """schema: of what is gathered; the batches may have more columns."""
        self.schema = schema
        self.names: tuple[str, ...] = tuple(schema.names)
        self.runs: tuple[str, ...] = ()
        self.numbers: tuple[str, ...] = ()
        self.rest: tuple[str, ...] = ()
        self.run_columns: tuple[RunColumn, ...] = ()
        self.item_shifts: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        """Of `run_columns`."""
        self._nullable: set[str] = set()
        self._unfit = {name for name in self.names if not first.fits_records(name)}
        """Columns that records cannot hold for some batch."""
        found = {name: first.constant(name) for name in self.names}
        self._constants = {name: value for name, value in found.items() if value is not None}
        self._repeated = {name: first.batch.column(name).take(pa.array([0])) for name in self._constants}
        self._repeated_last: tuple[int, dict[str, pa.Array]] = (0, {})
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
        self.runs = tuple(sorted(runs, key=lambda name: -item_bytes(types[name])))
        self.numbers = tuple(name for name in types if name not in self._unfit and is_number(types[name]))
        self.rest = tuple(name for name in types if name in self._unfit)
        self.run_columns = tuple(self._run_column(name) for name in self.runs)
        self.item_shifts = np.array([column.item_shift for column in self.run_columns], dtype=np.int64)
        self._repeated_last = (0, {})

    def repeated(self, count: int) -> dict[str, pa.Array]:
        """The columns of one value, [count] each."""
        if self._repeated_last[0] != count:
            for name, longest in self._repeated.items():
                if len(longest) < count:
                    self._repeated[name] = longest.take(pa.array(np.zeros(count, dtype=np.int64)))
            self._repeated_last = (count, {name: each.slice(0, count) for name, each in self._repeated.items()})
        return dict(self._repeated_last[1])

    def _run_column(self, name: str) -> RunColumn:
        type_ = self.schema.field(name).type
        items = None if pa.types.is_string(type_) else type_.value_type
        return RunColumn(name, type_, items, item_bytes(type_).bit_length() - 1, name in self._nullable)
