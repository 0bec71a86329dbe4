"""How the columns of a table are gathered: which ones are repeated, which stand in the records of its batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from buffer.store.gather_source import GatherSource


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
        self._constants = {name: value for name, value in first.constants.items() if name in self.names}
        self._repeated = {name: first.batch.column(name).take(pa.array([0])) for name in self._constants}
        self._repeated_last: tuple[int, dict[str, pa.Array]] = (0, {})
        self._not_in_records: set[str] = set()
        self.cover([first])

    def cover(self, sources: Sequence[GatherSource]) -> None:
        """Have the layout suit these batches of its schema, too."""
        new = [source for source in sources if source.covered_by is not self]
        for source in new:
            found = source.constants
            for name in [*self._constants]:
                if name not in found or found[name] != self._constants[name]:
                    del self._constants[name], self._repeated[name]
            self._not_in_records |= set(self.names) - source.runs.keys() - source.numbers.keys()
            self._nullable |= {name for name, runs in source.runs.items() if runs.valid is not None}
            source.covered_by = self
        if new:
            self._repeated_last = (0, {})
            varied = [name for name in self.names if name not in self._constants]
            gathered = [name for name in varied if name not in self._not_in_records]
            runs = [name for name in gathered if name in new[0].runs]
            self.runs = tuple(sorted(runs, key=lambda name: -new[0].runs[name].item_bytes))
            self.numbers = tuple(name for name in gathered if name in new[0].numbers)
            self.rest = tuple(name for name in varied if name in self._not_in_records)
            self.run_columns = tuple(self._run_column(name, new[0].runs[name].item_bytes) for name in self.runs)
            self.item_shifts = np.array([column.item_shift for column in self.run_columns], dtype=np.int64)

    def repeated(self, count: int) -> dict[str, pa.Array]:
        """The columns of one value, [count] each."""
        if self._repeated_last[0] != count:
            for name, longest in self._repeated.items():
                if len(longest) < count:
                    self._repeated[name] = longest.take(pa.array(np.zeros(count, dtype=np.int64)))
            self._repeated_last = (count, {name: each.slice(0, count) for name, each in self._repeated.items()})
        return dict(self._repeated_last[1])

    def _run_column(self, name: str, item_bytes: int) -> RunColumn:
        type_ = self.schema.field(name).type
        items = None if pa.types.is_string(type_) else type_.value_type
        return RunColumn(name, type_, items, item_bytes.bit_length() - 1, name in self._nullable)
