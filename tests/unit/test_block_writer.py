"""Messages in blocks: their own bytes each, kept by whoever holds them, never more blocks than needed."""

from __future__ import annotations

import gc
import random

import pyarrow as pa

from buffer.schema import stored_schema, with_rows
from buffer.store.block_writer import BlockWriter
from buffer.store.segments import OpenSegment, scan_open
from tests.trajectories import CONTRACT, numbered


def test_messages_never_overlap_whatever_their_sizes():
    schema = pa.schema([pa.field("content", pa.large_binary())])
    writer, sizes = BlockWriter(schema, 2000), random.Random(0).choices([0, 1, 63, 300, 1000, 1300, 5000], k=200)
    messages, expected = [], []
    for number, size_bytes in enumerate(sizes):
        batch = pa.record_batch([pa.array([bytes([number % 256]) * size_bytes], pa.large_binary())], schema=schema)
        messages.append(writer.write(batch, {b"key": b"v" * 250}))
        expected.append(bytes(messages[-1]))
        assert pa.ipc.read_record_batch(pa.ipc.read_message(pa.py_buffer(messages[-1])), schema) == batch
    assert [bytes(message) for message in messages] == expected, "none was written over"
    blocks = {id(message.obj): message.obj for message in messages}
    assert sum(map(len, blocks.values())) < 2 * sum(map(len, messages))


def test_batches_of_a_segment_outlive_it_and_share_blocks(tmp_path):
    batches = [with_rows(numbered(2 * step, 2), pa.array([2 * step, 2 * step + 1]).to_numpy()) for step in range(30)]
    writer = BlockWriter(stored_schema(CONTRACT), 10_000)
    segment = OpenSegment(tmp_path / "open", stored_schema(CONTRACT), sync_each_batch=False, writer=writer)
    views = [segment.append(batch) for batch in batches]
    segment.delete()
    del segment, writer
    gc.collect()
    assert views == batches
    segment = OpenSegment(tmp_path / "open", stored_schema(CONTRACT), sync_each_batch=False)
    for view in views:
        segment.append(view)
    segment.close()
    assert scan_open(tmp_path / "open", stored_schema(CONTRACT)).batches == tuple(batches)
