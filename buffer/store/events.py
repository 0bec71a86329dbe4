"""What befalls the rows of a shard, one Arrow row per event: the columns of the consumption log.

    event       says that                                        and fills
    snapshot    a file of the log begins with this state         source, rows, times_sampled, priorities, counters
    pinned      a draw of an earlier file is still repeatable    as draw
    draw        a training step was given rows                   stage, step, source, policy_version, rows, whole
    checkpoint  the learner has a durable checkpoint             stage, step
    stage       rows of older weights are of an earlier stage    policy_version (the first one that counts)
    version     a newer version was published                    policy_version
    seal        these rows are in a sealed segment               source, rows
    remove      rows ceased to be live                           source, policy_version, reason, rows, ids
    reject      trajectories were refused at the door            reason, ids (null where there is none)
    priorities  the learner changed how likely rows are          source, rows, priorities

Rows are numbers (`stored_schema`). Each draw, removal and rejection stands in exactly one event over
all files of a log; only where a draw from several shards was interrupted may a shard complete its part with a second
`draw` of other rows. Over all shards, the parts of a draw that was answered add up to `whole` rows. A snapshot without
a source holds the counters of the shard and those of removed rows whose source could no longer be read. A number in
[0, next_row) is live or was removed, so that nothing can be lost in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

_Number = TypeVar("_Number", np.int64, np.int32, np.float32)

EventKind = Literal[
    "snapshot", "pinned", "draw", "checkpoint", "stage", "version", "seal", "remove", "reject", "priorities"
]
EVICTED = ("capacity", "age", "sampled")
"""Reasons to remove a row that could have been drawn: too many rows, too old, drawn `max_times_sampled` times."""

DROPPED = ("stale", "stage", "quarantine")
"""Reasons to remove a row that must not or cannot be drawn: `max_staleness`, of an earlier stage, file damaged."""

RemovalReason = Literal["capacity", "age", "sampled", "stale", "stage", "quarantine"]


@dataclass(frozen=True)
class Counters:
    """Counts of a snapshot, since the folder exists. A field is None where it does not apply.

    Of a source: inserted = live + evicted (by reason) + dropped (by reason); drawn: rows, each time counted; draws:
    without the repeated ones. Of the shard (no source): next_row, newest_version, first_version (of the stage),
    rejected; inserted and dropped_quarantine are then of lost rows whose source is unknown.
    """

    next_row: int | None = None
    newest_version: int | None = None
    first_version: int | None = None
    rejected: int | None = None
    inserted: int | None = None
    draws: int | None = None
    drawn: int | None = None
    evicted_capacity: int | None = None
    evicted_age: int | None = None
    evicted_sampled: int | None = None
    dropped_stale: int | None = None
    dropped_stage: int | None = None
    dropped_quarantine: int | None = None


COUNTERS_TYPE = pa.struct([pa.field(field.name, pa.int64()) for field in fields(Counters)])

EVENT_SCHEMA = pa.schema(
    [
        pa.field("event", pa.string(), nullable=False),
        pa.field("at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("stage", pa.string()),
        pa.field("step", pa.int64()),  # steps of the stage done before
        pa.field("source", pa.string()),
        pa.field("policy_version", pa.int64()),  # newest one known
        pa.field("reason", pa.string()),
        pa.field("rows", pa.list_(pa.int64())),
        pa.field("whole", pa.int64()),
        pa.field("ids", pa.list_(pa.string())),
        pa.field("times_sampled", pa.list_(pa.int32())),
        pa.field("priorities", pa.list_(pa.float32())),
        pa.field("counters", COUNTERS_TYPE),
    ],
    metadata={b"schema_version": b"2"},
)


@dataclass(frozen=True)
class Event:
    """One row of the log; see the module for which field belongs to which kind. Arrays are as long as `rows`."""

    kind: EventKind
    stage: str | None = None
    step: int | None = None
    source: str | None = None
    policy_version: int | None = None
    reason: str | None = None
    rows: Int64 | None = None
    whole: int | None = None
    ids: pa.StringArray | None = None
    times_sampled: Int32 | None = None
    priorities: Float32 | None = None
    counters: Counters | None = None


def encode_events(events: Sequence[Event], at_us: int) -> pa.RecordBatch:
    """The events, which happened at `at_us` (microseconds since the epoch), as one record."""
    counters = [None if event.counters is None else vars(event.counters) for event in events]
    columns = [
        pa.array([event.kind for event in events], pa.string()),
        pa.array([at_us] * len(events), pa.int64()).view(EVENT_SCHEMA.field("at").type),
        _scalars([event.stage for event in events], pa.string()),
        _scalars([event.step for event in events], pa.int64()),
        _scalars([event.source for event in events], pa.string()),
        _scalars([event.policy_version for event in events], pa.int64()),
        _scalars([event.reason for event in events], pa.string()),
        _lists([event.rows for event in events], pa.int64()),
        _scalars([event.whole for event in events], pa.int64()),
        _lists([event.ids for event in events], pa.string()),
        _lists([event.times_sampled for event in events], pa.int32()),
        _lists([event.priorities for event in events], pa.float32()),
        _scalars(counters, COUNTERS_TYPE),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=EVENT_SCHEMA)


def decode_events(record: pa.RecordBatch) -> list[Event]:
    """The events of a record, arrays as views of it."""
    names = ["event", "stage", "step", "source", "policy_version", "reason", "whole", "counters"]
    scalars = record.select(names).to_pylist()
    return [
        Event(
            kind=values["event"],
            stage=values["stage"],
            step=values["step"],
            source=values["source"],
            policy_version=values["policy_version"],
            reason=values["reason"],
            rows=_values(record, "rows", index, np.int64),
            whole=values["whole"],
            ids=record.column("ids")[index].values,
            times_sampled=_values(record, "times_sampled", index, np.int32),
            priorities=_values(record, "priorities", index, np.float32),
            counters=None if values["counters"] is None else Counters(**values["counters"]),
        )
        for index, values in enumerate(scalars)
    ]


def _scalars(values: Sequence[str | int | dict[str, int | None] | None], type_: pa.DataType) -> pa.Array:
    """A column; most are null in most events, which costs least this way."""
    if all(value is None for value in values):
        return pa.nulls(len(values), type_)
    return pa.array(values, type_)


def _lists(lists: Sequence[Int64 | Int32 | Float32 | pa.StringArray | None], value_type: pa.DataType) -> pa.ListArray:
    """A list column made without a Python object per element."""
    if all(values is None for values in lists):
        return pa.nulls(len(lists), pa.list_(value_type))
    parts = [pa.array(values, value_type) for values in lists if values is not None]
    if len(lists) == 1:
        return pa.ListArray.from_arrays(pa.array([0, len(parts[0])], pa.int32()), parts[0])
    ends = np.cumsum([0 if values is None else len(values) for values in lists])
    # A null in the offsets makes a null list.
    is_null = np.array([values is None for values in lists] + [False])
    offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32), mask=is_null)
    return pa.ListArray.from_arrays(offsets, pa.concat_arrays(parts))


def _values(record: pa.RecordBatch, name: str, index: int, dtype: type[_Number]) -> npt.NDArray[_Number] | None:
    values = record.column(name)[index].values
    return None if values is None else np.asarray(values, dtype=dtype)
