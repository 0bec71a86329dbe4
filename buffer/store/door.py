"""What of a batch comes into a shard: rows that hold every invariant and are not there already."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from buffer.store.events import Event
from buffer.store.known_ids import KnownIds, UInt64, hash_ids
from buffer.trajectory.schema import TokenContract
from buffer.trajectory.validation import Rejection, validate


@dataclass(frozen=True)
class CheckedBatch:
    """good: rows to be stored; hashes: [n] of their ids; rejections: invalid rows, in order; num_present: valid rows
    that are stored already, as when Ray repeats an insert whose answer was lost."""

    good: pa.RecordBatch
    hashes: UInt64
    rejections: tuple[Rejection, ...]
    num_present: int

    def to_events(self) -> list[Event]:
        """The rejections for the log, one event per reason."""
        by_reason: dict[str, list[str | None]] = {}
        for rejection in self.rejections:
            by_reason.setdefault(rejection.reason, []).append(rejection.id)
        return [Event("reject", reason=reason, ids=pa.array(ids, pa.string())) for reason, ids in by_reason.items()]


def check(batch: pa.RecordBatch, contract: TokenContract, known: KnownIds) -> CheckedBatch:
    """Split a batch as sent.

    Raises:
        ValueError: the batch as a whole does not fit (see `buffer.trajectory.validation.validate`).
    """
    validated = validate(batch, contract)
    good = validated.good
    hashes = hash_ids(good.column("id"))
    is_known = known.knows(good.column("id"), hashes)
    if not is_known.any():
        return CheckedBatch(good, hashes, validated.rejections, 0)
    return CheckedBatch(good.filter(pa.array(~is_known)), hashes[~is_known], validated.rejections, int(is_known.sum()))
