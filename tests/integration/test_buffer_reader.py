"""Reading a shard while another process inserts, draws, seals, evicts and compacts: every snapshot is true."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from buffer.reading.audit import SampleLimits, audit_buffer, audit_shards
from buffer.reading.snapshot import ShardSnapshot, read_shard
from tests.integration.buffer_writer import (
    CAPACITY,
    MAX_STALENESS,
    MAX_TIMES_SAMPLED,
    acknowledged_file,
    expected_actions,
)

LIMITS = SampleLimits(MAX_TIMES_SAMPLED, MAX_STALENESS)
NUM_INSERTS = 900
MOST_INSERTED = 4
"""Rows of the largest insert of the writer."""


def num_acknowledged(folder: Path) -> int:
    content = acknowledged_file(folder).read_bytes() if acknowledged_file(folder).exists() else b""
    return struct.unpack("<q", content)[0] if content else 0


def check(snapshot: ShardSnapshot, acknowledged: int) -> None:
    """Nothing torn, nothing twice, nothing missing of what was acknowledged before the snapshot was begun."""
    stored = snapshot.stored
    rows = stored.column("row").to_numpy()
    assert np.all(np.diff(rows) > 0)
    assert stored.column("id").to_pylist() == [str(number) for number in rows.tolist()]
    assert stored.column("actions").to_pylist() == [expected_actions(number) for number in rows.tolist()]
    assert acknowledged <= snapshot.next_row
    named = pc.max(pc.list_flatten(snapshot.events.column("rows"))).as_py()
    assert named is None or named < snapshot.next_row
    # Each row below next_row is live or was removed once; draws agree with that.
    assert audit_shards({0: snapshot}, LIMITS).findings == ()
    sources = snapshot.stored.column("source").to_numpy()
    for source in ("expert", "policy"):
        # Rows are stored before those that they push out are removed.
        assert np.count_nonzero(snapshot.live & (sources == source)) <= CAPACITY + MOST_INSERTED
    draws = snapshot.events.filter(pc.equal(snapshot.events.column("event"), "draw"))
    drawn = np.bincount(pc.list_flatten(draws.column("rows")).to_numpy(), minlength=snapshot.next_row)
    assert snapshot.times_sampled.tolist() == drawn[rows].tolist()


def test_every_snapshot_of_a_shard_under_writing_is_consistent(tmp_path):
    folder = tmp_path / "buffer" / "shard-000"
    command = [sys.executable, "-m", "tests.integration.buffer_writer", str(folder), str(NUM_INSERTS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as writer:
        try:
            seen = set()
            while writer.poll() is None:
                acknowledged = num_acknowledged(folder)
                if acknowledged:
                    snapshot = read_shard(folder)
                    check(snapshot, acknowledged)
                    seen.add(snapshot.next_row)
            output, errors = writer.communicate(timeout=60)
        finally:
            writer.kill()
    assert (writer.returncode, errors) == (0, "")
    assert len(seen) > 10  # snapshots of different moments, while it was written
    # What the reader had to live with really happened.
    assert int(output) > 10
    assert max(int(path.stem.rpartition("-")[2]) for path in folder.glob("segment-*")) > 20
    snapshot = read_shard(folder)
    check(snapshot, num_acknowledged(folder))
    assert snapshot.next_row == num_acknowledged(folder)
    assert audit_buffer(tmp_path / "buffer", LIMITS).findings == ()
