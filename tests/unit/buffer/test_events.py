"""Events of the consumption log: what comes back from a record, and the log as a table while it is written."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from buffer.store.event_history import open_log_path, read_events, sealed_log_path
from buffer.store.event_record import EventRecord
from buffer.store.events import EVENT_SCHEMA, Counters, Event, decode_events, encode_events
from buffer.store.manifest import CorruptSegmentError
from buffer.store.segments import OpenSegment, encode_message

EVENTS = [
    Event("snapshot", counters=Counters(next_row=9, newest_version=-1, rejected=2)),
    Event(
        "snapshot",
        source="policy",
        rows=np.array([3, 8]),
        times_sampled=np.array([0, 4], dtype=np.int32),
        priorities=np.array([0.5, 2.0], dtype=np.float32),
        counters=Counters(inserted=9, drawn=4, evicted_age=7),
    ),
    Event("draw", stage="sft", step=3, source="policy", policy_version=7, rows=np.array([8, 3])),
    Event("checkpoint", stage="sft", step=4),
    Event("remove", source="expert", reason="quarantine", rows=np.array([1, 2]), ids=pa.array(["ä", None])),
    Event("reject", reason="id is null", ids=pa.array([None], pa.string())),
    Event("priorities", source="policy", rows=np.empty(0, np.int64), priorities=np.empty(0, np.float32)),
]


def as_plain(event: Event) -> list[object]:
    values = vars(event).values()
    return [
        value.tolist() if isinstance(value, np.ndarray) else value.to_pylist() if isinstance(value, pa.Array) else value
        for value in values
    ]


@pytest.mark.parametrize("events", [EVENTS, *([event] for event in EVENTS)])
def test_events_come_back_from_a_record(events):
    record = encode_events(events, at_us=1_700_000_000_000_000)
    record.validate(full=True)
    assert record.schema.equals(EVENT_SCHEMA, check_metadata=True)
    assert [as_plain(event) for event in decode_events(record)] == [as_plain(event) for event in events]
    assert {when.isoformat() for when in record.column("at").to_pylist()} == {"2023-11-14T22:13:20+00:00"}


def write_log(path, *records):
    file = OpenSegment(path, EVENT_SCHEMA, sync_each_batch=False)
    for record in records:
        file.append(encode_events(record, at_us=0))
    file.close()


def steps(folder):
    return read_events(folder).column("step").to_pylist()


def drawn(step):
    return replace(EVENTS[2], step=step)


def test_the_history_is_read_in_order_up_to_the_last_complete_event(tmp_path):
    assert read_events(tmp_path).num_rows == 0
    write_log(sealed_log_path(tmp_path, 1), [drawn(0), drawn(1)])
    write_log(sealed_log_path(tmp_path, 2), [drawn(2)])
    # What a crash at the end of a rotation leaves: the same records once more.
    write_log(open_log_path(tmp_path, 2), [drawn(2)])
    write_log(open_log_path(tmp_path, 3), [drawn(3)], [drawn(4)])
    assert steps(tmp_path) == [0, 1, 2, 3, 4]
    path = open_log_path(tmp_path, 3)
    os.truncate(path, path.stat().st_size - 1)
    assert steps(tmp_path) == [0, 1, 2, 3]
    sealed_log_path(tmp_path, 2).unlink()
    open_log_path(tmp_path, 2).unlink()
    with pytest.raises(CorruptSegmentError, match=r"consumption-000002\.arrows is missing: restore it"):
        read_events(tmp_path)


@pytest.mark.parametrize("path", [sealed_log_path, open_log_path])
def test_a_damaged_history_is_an_error_that_names_the_file(tmp_path, path):
    write_log(path(tmp_path, 1), [drawn(0)], [drawn(1)])
    content = bytearray(path(tmp_path, 1).read_bytes())
    content[content.index(b"draw")] ^= 1
    path(tmp_path, 1).write_bytes(content)
    with pytest.raises(CorruptSegmentError, match=rf"{path(tmp_path, 1).name} is damaged from byte \d+ .*: restore it"):
        read_events(tmp_path)


def test_a_sealed_file_of_the_history_is_never_torn(tmp_path):
    path = sealed_log_path(tmp_path, 1)
    write_log(path, [drawn(0)], [drawn(1)])
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CorruptSegmentError, match=r"is damaged from byte \d+ to byte \d+: restore it from a copy\."):
        read_events(tmp_path)


@pytest.mark.parametrize(
    "event",
    [
        Event("draw", stage="s", step=2**40, source="policy", policy_version=7, rows=np.array([8, 3]), whole=5),
        Event("draw", stage="s", step=1, source="expert", policy_version=-1, rows=np.array([2**50]), whole=1),
        Event("checkpoint", stage="s", step=4),
    ],
)
def test_a_record_with_other_numbers_has_the_bytes_of_one_that_was_encoded(event):
    zeros = {name: 0 for name in ("step", "policy_version", "whole") if getattr(event, name) is not None}
    like = replace(event, rows=None if event.rows is None else event.rows * 0, **zeros)
    record = EventRecord(like)
    for at_us in (17, 2**50):
        encoded = encode_message(encode_events([event], at_us), EVENT_SCHEMA)
        assert record.message(event, at_us) == encoded
