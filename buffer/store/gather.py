"""Gathering rows that lie scattered over many record batches into one batch.

Nearly all bytes of a trajectory stand in lists of numbers, the rest mostly in text. Arrow's `take` moves lists element
by element, and joins batches first. Here the records of all rows are brought together, 16 bytes per list or text, and
one cast of the binary views in them copies run by run, whatever batches the bytes come from. Draws of a few hundred
rows are the rule, so what counts is the number of steps: hardly any of them is done per column or per batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from buffer.store.gather_layout import GatherLayout
from buffer.store.gather_source import INLINE_BYTES, NULL_MARK, VIEW_LANES, GatherSource

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]

SLICED_ROWS = 20
"""With fewer rows per batch, slicing them out one by one costs less than one `take`."""


_VIEWS = pa.binary_view()
_CONTENT = pa.large_binary()
_MOST_ITEMS = 2**31 - 1


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
    places = parts[0].at if len(parts) == 1 else np.concatenate([part.at for part in parts])
    found = [part.source.records(layout.runs, layout.numbers) for part in parts]
    taken = [each.lanes.take(part.local, axis=0) for each, part in zip(found, parts, strict=True)]
    records = taken[0] if len(taken) == 1 else np.concatenate(taken)
    columns = layout.repeated(num_rows)
    lane = VIEW_LANES * len(layout.runs)
    if layout.runs:
        windows = [each.windows for each in found]
        columns |= _copy_runs(layout, records[:, :lane], windows, [len(part.at) for part in parts], places)
    for name in layout.numbers:
        type_ = layout.schema.field(name).type
        lanes = type_.bit_width // 32
        numbers = np.empty((num_rows, lanes), dtype=np.int32)
        numbers[places] = records[:, lane : lane + lanes]
        columns[name] = pa.Array.from_buffers(type_, num_rows, [None, pa.py_buffer(numbers)], 0)
        lane += lanes
    if layout.rest:
        columns |= dict(zip(layout.rest, _gather_rest(layout.rest, parts, num_rows, places).columns, strict=True))
    return pa.RecordBatch.from_arrays([columns[name] for name in layout.names], schema=layout.schema)


def _copy_runs(
    layout: GatherLayout,
    records: Int32,
    windows: Sequence[Sequence[pa.Buffer]],
    part_rows: Sequence[int],
    places: Int64,
) -> dict[str, pa.Array]:
    """The columns of lists and of text.

    records: [n, lanes] of the views, part by part. windows, part_rows: of each part. places: [n] in the result.
    """
    num_rows, num_columns = len(places), len(layout.runs)
    by_row = records.reshape(num_rows, num_columns, VIEW_LANES)
    if len(windows) > 1:
        num_before = np.cumsum([0, *(len(each) for each in windows[:-1])], dtype=np.int32)
        # Short runs have themselves where the others have their window.
        by_row[:, :, 2] += np.repeat(num_before, part_rows)[:, None] * (by_row[:, :, 0] > INLINE_BYTES)
    views = np.empty((num_columns, num_rows, VIEW_LANES), dtype=np.int32)
    views[:, places] = by_row.swapaxes(0, 1)
    all_windows = [window for each in windows for window in each]
    described = pa.Array.from_buffers(_VIEWS, num_columns * num_rows, [None, pa.py_buffer(views), *all_windows], 0)
    _, bounds, content = pc.cast(described, _CONTENT).buffers()
    ends = np.frombuffer(bounds, dtype=np.int64)  # in bytes, over all columns
    begins = ends[:-1:num_rows]
    num_items = ((ends[num_rows::num_rows] - begins) >> layout.item_shifts).tolist()
    if max(num_items) > _MOST_ITEMS:
        raise ValueError(f"{num_rows} rows with {max(num_items)} elements are too many for a batch: draw fewer at once")
    offsets = np.zeros((num_columns, num_rows + 1), dtype=np.int32)
    offsets[:, 1:] = (ends[1:].reshape(num_columns, num_rows) - begins[:, None]) >> layout.item_shifts[:, None]
    all_offsets, width = pa.py_buffer(offsets), 4 * (num_rows + 1)
    columns: dict[str, pa.Array] = {}
    for index, (column, begin, count) in enumerate(zip(layout.run_columns, begins.tolist(), num_items, strict=True)):
        validity, null_count = None, 0
        if column.is_nullable:
            is_null = (views[index, :, 0] == 0) & (views[index, :, 1] == NULL_MARK)
            validity, null_count = pa.array(~is_null).buffers()[1], int(np.count_nonzero(is_null))
        buffers = [validity, all_offsets.slice(index * width, width)]
        own = content.slice(begin, count << column.item_shift)
        if column.items is None:
            values = pa.Array.from_buffers(column.type, num_rows, [*buffers, own], null_count)
        else:
            items = pa.Array.from_buffers(column.items, count, [None, own], 0)
            values = pa.Array.from_buffers(column.type, num_rows, buffers, null_count, children=[items])
        columns[column.name] = values
    return columns


def _gather_rest(names: tuple[str, ...], parts: Sequence[Part], num_rows: int, places: Int64) -> pa.RecordBatch:
    """The columns that records do not hold."""
    if num_rows < SLICED_ROWS * len(parts):
        slices = [part.source.select(names).slice(row, 1) for part in parts for row in part.local.tolist()]
        return pa.concat_batches([slices[index] for index in np.argsort(places).tolist()])
    taken = pa.concat_batches([part.source.select(names).take(pa.array(part.local)) for part in parts])
    return taken.take(pa.array(np.argsort(places)))
