"""A mapping shows what a file has got since, and lives as long as anything that was read through it."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from buffer.store.growing_map import GrowingMap
from buffer.store.segments import OpenSegment, read_batches
from buffer.trajectory.schema import stored_schema, with_rows
from tests.trajectories import CONTRACT, numbered


def maps_of(path: Path) -> int:
    return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("room_bytes", [1, 10_000, 2**24])
def test_what_was_read_stays_while_the_file_grows_and_when_it_is_gone(tmp_path, room_bytes):
    path = tmp_path / "file"
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND)
    growing, read, expected = GrowingMap(descriptor, room_bytes), [], b""
    for number in range(200):
        piece = bytes([number]) * 997
        os.write(descriptor, piece)
        expected += piece
        read.append(growing.content(len(expected)))
    assert (maps_of(path) == 1) == (room_bytes == 2**24)
    os.close(descriptor)
    path.unlink()
    del growing
    gc.collect()
    for number, content in enumerate(read, start=1):
        assert content.to_pybytes() == expected[: 997 * number]
    del read, content
    gc.collect()
    assert maps_of(path) == 0


def test_what_cannot_be_mapped_is_an_error(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(OSError, match="No such device"):
        GrowingMap(descriptor, 10).content(5)
    os.close(descriptor)


def test_an_open_segment_is_read_through_its_mapping(tmp_path):
    schema = stored_schema(CONTRACT)
    batches = [with_rows(numbered(first, 4), np.arange(first, first + 4)) for first in range(0, 36, 4)]
    segment = OpenSegment(tmp_path / "open", schema, sync_each_batch=False, room_bytes=9_000)
    views, end = [], 0
    for batch in batches:
        segment.append(batch)
        ((view, end),) = read_batches(segment.content(), schema, end)
        views.append(view)
    segment.delete()
    del segment
    assert views == batches
