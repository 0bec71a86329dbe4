"""Arrow batches on their way between processes.

Ray pickles a record batch column by column, with the column's buffers beside the pickle: no row becomes a Python
object, and the reader maps the buffers where they are. A *slice* is the exception: its pickle carries the whole buffers
of the batch that it was cut from (https://github.com/apache/arrow/issues/26685). So what is sent is made `compact`.
"""

from __future__ import annotations

import pyarrow as pa

SLACK_BYTES = 4096
"""More bytes than its rows need, by which a batch is taken for a slice; alignment and validity bitmaps need some."""


def compact(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same rows, holding no bytes but their own: the batch itself, or a copy where it is a slice of a larger."""
    if batch.get_total_buffer_size() <= batch.nbytes + batch.nbytes // 8 + SLACK_BYTES:
        return batch
    # The IPC format writes the rows of a slice only.
    compacted: pa.RecordBatch = pa.ipc.read_record_batch(pa.ipc.read_message(batch.serialize()), batch.schema)
    return compacted
