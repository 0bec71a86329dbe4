"""Writing many small batches as one, without bringing their bytes together in memory first.

Pages that are touched for the first time cost several times what copying costs: of the 64 MiB of a full segment, most
of what sealing took.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from buffer.store.batch_message import BatchMessage
from buffer.store.gather_source import is_list_of_numbers, run_bytes


def merged_message(batches: Sequence[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.Buffer]:
    """The message of one batch with the rows of all `batches`, piece by piece: at least one row, of `schema`.

    The lists of a column have fewer than 2^31 items in all.
    """
    columns = {name: [batch.column(name) for batch in batches] for name in schema.names}
    runs = [name for name, parts in columns.items() if _are_runs(parts)]
    nullable = {name for name in runs if any(part.null_count for part in columns[name])}
    others = {name: pa.concat_arrays(parts) for name, parts in columns.items() if name not in runs}
    num_rows = sum(batch.num_rows for batch in batches)
    message = BatchMessage(schema, runs, nullable, others, num_rows)
    found = [[run_bytes(part) for part in columns[name]] for name in runs]
    sizes = np.zeros(len(runs), dtype=np.int64)
    for index, (name, ends) in enumerate(zip(runs, message.ends, strict=True)):
        row = num_items = 0
        for offsets, _ in found[index]:
            count = len(offsets) - 1
            np.add(offsets[1:], num_items - offsets[0], out=ends[row : row + count])
            row, num_items = row + count, num_items + int(offsets[-1] - offsets[0])
        sizes[index] = num_items << int(message.shifts[index])
        if name in nullable:
            is_valid = [part.is_valid().to_numpy(zero_copy_only=False) for part in columns[name]]
            message.put_validity(index, np.concatenate(is_valid))
    fill = message.place_runs(sizes).tolist()
    yield pa.py_buffer(message.content)
    for parts, shift, fill_bytes in zip(found, message.shifts.tolist(), fill, strict=True):
        for offsets, content in parts:
            yield pa.py_buffer(content[int(offsets[0]) << shift : int(offsets[-1]) << shift])
        yield pa.py_buffer(bytes(fill_bytes))


def _are_runs(parts: Sequence[pa.Array]) -> bool:
    """Whether all that is in the parts of a column is bytes that follow one another, and something is."""
    if all(part.null_count == len(part) for part in parts):
        return False
    if pa.types.is_string(parts[0].type):
        return True
    return is_list_of_numbers(parts[0].type) and not any(part.values.null_count for part in parts)
