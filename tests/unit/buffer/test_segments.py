"""Segment files: torn tails at every byte, damage at every byte, sealing, and what other Arrow readers see."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from buffer.store.manifest import CorruptSegmentError, SegmentEntry
from buffer.store.sealed_segments import map_sealed, seal_open, write_sealed
from buffer.store.segments import (
    DamagedRange,
    OpenSegment,
    cut_torn_tail,
    read_batches,
    scan_open,
    sealed_path,
)
from buffer.trajectory.schema import trajectory_schema
from tests.trajectories import CONTRACT, numbered

SCHEMA = trajectory_schema(CONTRACT)
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
BATCHES = [numbered(0, 3), numbered(3, 2), numbered(5, 4)]


def write_open(path: Path, batches=BATCHES) -> list[int]:
    """An open segment as a killed process leaves it; gives its size after the header and after each batch."""
    segment = OpenSegment(path, SCHEMA, sync_each_batch=False)
    sizes = [segment.size_bytes]
    for batch in batches:
        segment.append(batch)
        sizes.append(segment.size_bytes)
    segment.close()
    return sizes


def write_entry(folder: Path) -> SegmentEntry:
    sealed = write_sealed(sealed_path(folder, 1), BATCHES, SCHEMA)
    return SegmentEntry(1, 0, 8, 9, sealed.size_bytes, sealed.checksum, 0, 0)


def test_every_acknowledged_batch_is_in_the_file(tmp_path):
    path = tmp_path / "open"
    segment = OpenSegment(path, SCHEMA, sync_each_batch=True)
    for count, batch in enumerate(BATCHES, start=1):
        segment.append(batch)
        assert path.stat().st_size == segment.size_bytes
        # Read while the writer holds the file: nothing waits in a user-space buffer.
        assert scan_open(path, SCHEMA).batches == tuple(BATCHES[:count])
    segment.close()


def test_a_sliced_batch_is_written_without_its_neighbours(tmp_path):
    big = numbered(0, 1000)
    segment = OpenSegment(tmp_path / "open", SCHEMA, sync_each_batch=False)
    segment.append(big.slice(500, 2))
    assert scan_open(tmp_path / "open", SCHEMA).batches == (big.slice(500, 2),)
    assert segment.size_bytes < 10_000
    segment.close()


def test_torn_tail_at_every_byte_of_the_last_batch(tmp_path):
    path = tmp_path / "open"
    sizes = write_open(path)
    content = path.read_bytes()
    for size in range(sizes[2], sizes[3]):
        path.write_bytes(content[:size])
        scan = scan_open(path, SCHEMA)
        assert scan.batches == tuple(BATCHES[:2])
        assert scan.damaged == ()
        assert cut_torn_tail(path, scan) == size - sizes[2]
        assert path.stat().st_size == sizes[2]
    # What is left takes inserts again.
    segment = OpenSegment(path, SCHEMA, sync_each_batch=False)
    segment.append(BATCHES[2])
    segment.close()
    assert path.read_bytes() == content


def test_torn_header_at_every_byte(tmp_path):
    path = tmp_path / "open"
    sizes = write_open(path, [])
    content = path.read_bytes()
    for size in range(sizes[0]):
        path.write_bytes(content[:size])
        scan = scan_open(path, SCHEMA)
        assert (scan.batches, scan.damaged) == ((), ())
        cut_torn_tail(path, scan)
        assert path.stat().st_size == 0
    assert write_open(path)[0] == sizes[0]


def flipped(content: bytes, at: int) -> bytes:
    damaged = bytearray(content)
    damaged[at] ^= 0x55
    return bytes(damaged)


def test_damage_at_every_byte_of_the_last_batch_is_seen_and_never_read(tmp_path):
    """It is known for damage, with its rows where they can be read, unless it looks longer than the file."""
    path = tmp_path / "open"
    sizes = write_open(path)
    content = path.read_bytes()
    outcomes = Counter()
    for at in range(sizes[2], sizes[3]):
        path.write_bytes(flipped(content, at))
        scan = scan_open(path, SCHEMA)
        assert scan.batches == tuple(BATCHES[:2]), at
        outcomes[scan.damaged, scan.torn_bytes] += 1
    torn = outcomes.pop(((), sizes[3] - sizes[2]))
    assert torn < 20
    assert set(outcomes) == {((DamagedRange(sizes[2], sizes[3], rows),), 0) for rows in (4, None)}
    path.write_bytes(content[: sizes[2]] + bytes(sizes[3] - sizes[2]))  # blocks that were never written
    scan = scan_open(path, SCHEMA)
    assert (scan.batches, scan.damaged) == (tuple(BATCHES[:2]), ())


def test_damage_at_every_byte_between_complete_batches_spares_both_sides(tmp_path):
    path = tmp_path / "open"
    sizes = write_open(path)
    content = path.read_bytes()
    for at in range(sizes[1], sizes[2]):
        path.write_bytes(flipped(content, at))
        scan = scan_open(path, SCHEMA)
        assert scan.batches == (BATCHES[0], BATCHES[2]), at
        assert scan.torn_bytes == 0
        (damaged,) = scan.damaged
        assert (damaged.start, damaged.end) == (sizes[1], sizes[2])
        assert damaged.num_rows in (2, None)
        assert path.read_bytes() == flipped(content, at), "reading leaves the evidence alone"


def test_damage_of_the_header_spares_every_batch(tmp_path):
    path = tmp_path / "open"
    sizes = write_open(path)
    content = path.read_bytes()
    for at in range(sizes[0]):
        path.write_bytes(flipped(content, at))
        scan = scan_open(path, SCHEMA)
        assert scan.batches == tuple(BATCHES)
        assert [(each.start, each.end) for each in scan.damaged] in ([(0, sizes[0])], []), "or it was padding"


def test_sealed_round_trip_is_mapped_and_outlives_its_file(tmp_path):
    entry = write_entry(tmp_path)
    before = pa.total_allocated_bytes()
    batches = map_sealed(tmp_path, entry, SCHEMA)
    assert pa.total_allocated_bytes() == before, "views of the mapping take no heap"
    sealed_path(tmp_path, 1).unlink()
    assert batches == BATCHES
    assert [path.name for path in tmp_path.iterdir()] == []


def test_any_arrow_reader_reads_both_kinds(tmp_path):
    entry = write_entry(tmp_path)
    write_open(tmp_path / "open")
    for path in (sealed_path(tmp_path, entry.number), tmp_path / "open"):
        with pa.OSFile(str(path)) as file:
            assert list(pa.ipc.open_stream(file)) == BATCHES


def no_links(source, path):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("has_links", [True, False])
def test_an_open_segment_that_is_sealed_has_both_names_until_one_is_deleted(tmp_path, monkeypatch, has_links):
    source, path = tmp_path / "open", sealed_path(tmp_path, 1)
    write_open(source)
    path.write_bytes(b"what an attempt left behind that failed")
    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    sealed = seal_open(source, path)
    assert source.read_bytes() == path.read_bytes()
    assert path.stat().st_nlink == 1 + has_links
    assert {each.name for each in tmp_path.iterdir()} == {source.name, path.name}
    source.unlink()
    entry = SegmentEntry(1, 0, 8, 9, sealed.size_bytes, sealed.checksum, 0, 0)
    assert map_sealed(tmp_path, entry, SCHEMA) == BATCHES


def test_a_segment_may_say_that_it_ends(tmp_path):
    """As those did that an earlier version of this program sealed."""
    write_open(tmp_path / "open")
    for end in (b"", END_OF_STREAM):
        content = pa.py_buffer((tmp_path / "open").read_bytes() + end)
        assert [batch for batch, _ in read_batches(content, SCHEMA)] == BATCHES


def test_corrupted_sealed_segment_at_every_byte(tmp_path):
    entry = write_entry(tmp_path)
    path = sealed_path(tmp_path, 1)
    content = path.read_bytes()
    with path.open("r+b") as file:
        for at in range(len(content)):
            os.pwrite(file.fileno(), bytes([content[at] ^ 1]), at)
            with pytest.raises(CorruptSegmentError, match=r"segment-000001.arrows has checksum .*restore it from"):
                map_sealed(tmp_path, entry, SCHEMA)
            os.pwrite(file.fileno(), content[at : at + 1], at)
    path.write_bytes(content[:-1])
    with pytest.raises(CorruptSegmentError, match=rf"has {len(content) - 1} bytes instead of {len(content)}"):
        map_sealed(tmp_path, entry, SCHEMA)
    path.unlink()
    with pytest.raises(CorruptSegmentError, match="is missing"):
        map_sealed(tmp_path, entry, SCHEMA)


FULL_DISK = """
import resource, sys
from pathlib import Path
from buffer.store.segments import OpenSegment, scan_open
from tests.trajectories import CONTRACT, numbered
from buffer.trajectory.schema import trajectory_schema

schema = trajectory_schema(CONTRACT)
path = Path(sys.argv[1])
segment = OpenSegment(path, schema, sync_each_batch=True)
segment.append(numbered(0, 3))
size = segment.size_bytes
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
try:
    segment.append(numbered(3, 3))
except OSError as error:
    print(type(error).__name__, error.filename == str(path))
assert path.stat().st_size == segment.size_bytes == size
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
segment.append(numbered(6, 3))
segment.close()
print([batch.num_rows for batch in scan_open(path, schema).batches])
"""


def test_a_write_that_fails_half_way_leaves_the_file_as_it_was(tmp_path):
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "open")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split("\n")[:2] == ["OSError True", "[3, 3]"]


def test_a_sync_that_was_prepared_works_after_the_file_was_closed_and_deleted(tmp_path):
    segment = OpenSegment(tmp_path / "open", SCHEMA, sync_each_batch=False)
    segment.append(BATCHES[0])
    syncs = [segment.prepare_sync(), segment.prepare_sync()]
    syncs[0]()
    segment.close()
    segment.path.unlink()
    syncs[1]()
    with pytest.raises(OSError, match="Bad file descriptor"):
        syncs[1]()
