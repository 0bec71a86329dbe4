"""Gathering rows that lie scattered over many record batches into one batch.

Nearly all bytes of a trajectory stand in lists of numbers, the rest mostly in text. Arrow's `take` moves lists element
by element, and joins batches first. Here the records of all rows are brought together, 16 bytes per list or text, and
one cast of the binary views in them copies run by run, whatever batches the bytes come from. Draws of a few hundred
rows are the rule, so what counts is the number of steps: hardly any of them is done per column or per batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from buffer.store.gather_layout import GatherLayout
from buffer.store.gather_source import INLINE_BYTES, VIEW_LANES, GatherSource, Records

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]

SLICED_ROWS = 20
"""With fewer rows per batch, slicing them out one by one costs less than one `take`."""


class Part(NamedTuple):
    """Rows that come from one batch. local: [k] their places there, ascending; at: [k] their places in the result."""

    source: GatherSource
    local: Int64
    at: Int64


def gather(layout: GatherLayout, parts: Sequence[Part], num_rows: int) -> pa.RecordBatch:
    """Copy of the rows of all parts, which fill the places 0 to `num_rows` - 1; at least one row.

    layout: of the table that the batches belong to.

    Raises:
        ValueError: a column of lists would hold more elements than Arrow can count in a batch.
    """
    layout.cover([part.source for part in parts])
    found = [part.source.records(layout.runs, layout.numbers) for part in parts]
    taken = [each.lanes.take(part.local, axis=0) for each, part in zip(found, parts, strict=True)]
    if len(parts) == 1:
        places, records, windows = parts[0].at, taken[0], found[0].windows
    else:
        places, records = np.concatenate([part.at for part in parts]), np.concatenate(taken)
        windows = [window for each in found for window in each.windows]
        _count_on(records[:, : VIEW_LANES * len(layout.runs)], found, [len(part.at) for part in parts])
    batch = layout.frame(num_rows).fill(records, places, windows)
    if not layout.rest:
        return batch
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    columns |= dict(zip(layout.rest, _gather_rest(layout.rest, parts, num_rows, places).columns, strict=True))
    return pa.RecordBatch.from_arrays([columns[name] for name in layout.names], schema=layout.schema)


def _count_on(views: Int32, found: Sequence[Records], part_rows: Sequence[int]) -> None:
    """Have the windows of each part come after those of the parts before.

    views: [n, lanes] of the rows, part by part. part_rows: of each part.
    """
    num_before = np.array(list(accumulate((len(each.windows) for each in found[:-1]), initial=0)), dtype=np.int32)
    # Short runs have themselves where the others have their window.
    is_long = views[:, ::VIEW_LANES] > INLINE_BYTES
    views[:, 2::VIEW_LANES] += is_long * num_before.repeat(part_rows)[:, None]


def _gather_rest(names: tuple[str, ...], parts: Sequence[Part], num_rows: int, places: Int64) -> pa.RecordBatch:
    """The columns that records do not hold."""
    if num_rows < SLICED_ROWS * len(parts):
        slices = [part.source.select(names).slice(row, 1) for part in parts for row in part.local.tolist()]
        return pa.concat_batches([slices[index] for index in np.argsort(places).tolist()])
    taken = pa.concat_batches([part.source.select(names).take(pa.array(part.local)) for part in parts])
    return taken.take(pa.array(np.argsort(places)))
