"""Pieces of memory: their own bytes each, kept by whoever holds them, never more blocks than needed."""

from __future__ import annotations

import gc
import random

import pyarrow as pa

from buffer.schema import stored_schema, with_rows
from buffer.store.block_memory import BlockMemory
from buffer.store.segments import OpenSegment, scan_open
from tests.trajectories import CONTRACT, numbered


def test_pieces_are_of_the_size_asked_for_and_never_overlap():
    memory, sizes = BlockMemory(1000), random.Random(0).choices([0, 1, 63, 64, 65, 300, 1000, 1001, 5000], k=200)
    pieces = []
    for number, size_bytes in enumerate(sizes):
        offered = memory.offer(size_bytes + 100)
        assert len(offered) == size_bytes + 100
        offered[:] = b"?" * len(offered)
        memory.keep(size_bytes)
        pieces.append(offered[:size_bytes])
        pieces[-1][:] = bytes([number % 256]) * size_bytes
    assert [bytes(piece) for piece in pieces] == [bytes([n % 256]) * size for n, size in enumerate(sizes)]
    blocks = {id(piece.obj): piece.obj for piece in pieces}
    assert sum(map(len, blocks.values())) < 2 * sum(sizes)


def test_batches_of_a_segment_outlive_it_and_share_blocks(tmp_path):
    batches = [with_rows(numbered(2 * step, 2), pa.array([2 * step, 2 * step + 1]).to_numpy()) for step in range(30)]
    segment = OpenSegment(tmp_path / "open", stored_schema(CONTRACT), sync_each_batch=False, memory=BlockMemory(10_000))
    views = [segment.append(batch) for batch in batches]
    segment.delete()
    del segment
    gc.collect()
    assert views == batches
    segment = OpenSegment(tmp_path / "open", stored_schema(CONTRACT), sync_each_batch=False)
    for view in views:
        segment.append(view)
    segment.close()
    assert scan_open(tmp_path / "open", stored_schema(CONTRACT)).batches == tuple(batches)
