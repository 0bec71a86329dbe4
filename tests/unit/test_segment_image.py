"""The image of a segment has the bytes of the file, whatever its batches, and what was read of it stays."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest

from buffer.schema import trajectory_schema
from buffer.store.segment_image import SegmentImage
from buffer.store.segments import OpenSegment, add_message, read_batches
from tests.trajectories import CONTRACT, numbered

SCHEMA = pa.schema([pa.field("content", pa.large_binary())])
METADATA = {b"key": b"v" * 250}


def binary(number: int, size_bytes: int) -> pa.RecordBatch:
    return pa.record_batch([pa.array([bytes([number % 256]) * size_bytes], pa.large_binary())], schema=SCHEMA)


def stream(batches: list[pa.RecordBatch]) -> bytes:
    sink = pa.BufferOutputStream()
    writer = pa.ipc.new_stream(sink, SCHEMA)
    for batch in batches:
        writer.write_batch(batch, custom_metadata=METADATA)
    content: bytes = sink.getvalue().to_pybytes()
    return content


@pytest.mark.parametrize("room_bytes", [0, 2_000, 1_000_000])
def test_an_image_is_the_stream_of_its_batches_and_never_changes_what_was_read(room_bytes):
    image, batches, read = SegmentImage(SCHEMA, room_bytes), [], []
    for number, size_bytes in enumerate(random.Random(0).choices([0, 1, 63, 300, 1000, 1300, 5000], k=100)):
        batches.append(binary(number, size_bytes))
        message = image.write(batches[-1], METADATA)
        assert pa.ipc.read_record_batch(pa.ipc.read_message(pa.py_buffer(message)), SCHEMA) == batches[-1]
        read.append((image.content, image.size_bytes))
    whole = stream(batches)
    assert image.content.to_pybytes() == whole
    for content, size_bytes in read:
        assert content.to_pybytes() == whole[:size_bytes]


@pytest.mark.parametrize("room_bytes", [0, 1_000_000])
def test_an_image_goes_on_after_what_was_there_and_forgets_what_was_not_written(room_bytes):
    batches = [binary(number, 100 * number) for number in range(6)]
    image = SegmentImage(SCHEMA, room_bytes, stream(batches[:3]))
    image.write(batches[3], METADATA)
    before = image.size_bytes
    for _ in range(2):
        image.write(binary(99, 5_000), METADATA)
        image.cut(before)
    for batch in batches[4:]:
        image.write(batch, METADATA)
    assert image.content.to_pybytes() == stream(batches)


def test_a_file_that_is_written_from_an_image_has_its_bytes(tmp_path):
    schema = trajectory_schema(CONTRACT)
    batches = [numbered(4 * number, 4) for number in range(5)]
    segment = OpenSegment(tmp_path / "open", schema, sync_each_batch=False)
    image = SegmentImage(schema, room_bytes=4_000)
    for batch in batches:
        segment.append_message(add_message(image, batch))
    segment.close()
    assert (tmp_path / "open").read_bytes() == image.content.to_pybytes()
    assert [batch for batch, _ in read_batches(image.content, schema)] == batches
