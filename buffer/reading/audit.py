"""Checks that every trajectory of a replay buffer is accounted for, on the folder of a live run or a finished one.

Per shard, and then over all shards:

    accounting   inserted = live + evicted (by reason) + dropped (by reason); every row is in one of them, once
    ids          no id belongs to two rows
    draws        only rows that were inserted, live, of the stage and of the source asked for; each at most
                 `max_times_sampled` times, none staler than `max_staleness`; no draw larger than it was asked for
    the log      every file begins with the state that the events before it add up to
    files        checksums of segments and log (read on the way)

The log is the authority on what happened, the segments on what is there: an error in either shows as a contradiction.
Staleness can be checked for rows whose bytes are still there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from buffer.reading.audit_checks import DrawLimits, Finding, check_draws, check_rows, check_states
from buffer.reading.reader import read_shard, shard_folders
from buffer.reading.shard_history import REASONS, UNKNOWN, ShardHistory
from buffer.store.counters import Tally
from buffer.store.manifest import CorruptSegmentError
from buffer.store.previous_format import holds_previous_format
from buffer.trajectory.schema import SOURCES

_KEY = ["stage", "step", "source"]


@dataclass(frozen=True)
class Account:
    """Rows of one source in one shard; source None: rows that were lost before anybody read their source.

    inserted: as the log counts them; removed: by reason; drawn: each row counts every time.
    """

    shard: int
    source: str | None
    inserted: int
    live: int
    removed: dict[str, int]
    drawn: int

    @property
    def is_balanced(self) -> bool:
        """Whether inserted = live + evicted + dropped."""
        return self.inserted == self.live + sum(self.removed.values())


@dataclass(frozen=True)
class AuditReport:
    """What an audit found. rejected: trajectories refused at the door; num_draws: of whole batches, each once."""

    accounts: tuple[Account, ...]
    rejected: int
    num_draws: int
    findings: tuple[Finding, ...]


def audit_buffer(buffer: Path, limits: DrawLimits) -> AuditReport:
    """Check all shards below `buffer`; a shard that cannot be read is a finding.

    Raises:
        ValueError: there is no shard, or the folder is of the previous format, which keeps no account.
        TimeoutError: see `read_shard`.
    """
    if holds_previous_format(buffer):
        raise ValueError(
            f"{buffer} was written by a version of this program that kept no account of removed trajectories: it can "
            "be queried, not audited"
        )
    histories: dict[int, ShardHistory] = {}
    findings: list[Finding] = []
    accounts: list[Account] = []
    for index, folder in shard_folders(buffer).items():
        try:
            history = ShardHistory(read_shard(folder))
        except CorruptSegmentError as error:
            findings.append(Finding(index, str(error), ()))
            continue
        histories[index] = history
        accounts += _accounts(index, history)
        findings += check_rows(index, history)
        findings += check_draws(index, history, limits)
        findings += check_states(index, history)
    findings += [_imbalance(account) for account in accounts if not account.is_balanced]
    num_draws = 0
    if histories:
        draws = _draws(histories)
        num_draws = draws.num_rows
        findings += [*_repeated_ids(histories), *_wrong_sizes(draws)]
    return AuditReport(
        accounts=tuple(accounts),
        rejected=sum(_num_rejected(history) for history in histories.values()),
        num_draws=num_draws,
        findings=tuple(findings),
    )


def _accounts(shard: int, history: ShardHistory) -> list[Account]:
    begin, last, stored, removed = history.states[0], history.states[-1], history.stored, history.removed
    accounts = []
    for index, source in enumerate(SOURCES):
        begun, noted = Tally.from_counters(begin.counters(source)), Tally.from_counters(last.counters(source))
        counts = np.bincount(history.reasons[removed.sources == index], minlength=len(REASONS)).tolist()
        accounts.append(
            Account(
                shard=shard,
                source=source,
                inserted=noted.inserted + int(np.count_nonzero(history.rows_of_source(index) >= last.next_row)),
                live=int(np.count_nonzero(stored.live & (stored.sources == index))),
                removed={reason: begun.removed[reason] + count for reason, count in zip(REASONS, counts, strict=True)},
                drawn=begun.drawn + int(np.count_nonzero(history.drawn.sources == index)),
            )
        )
    num_lost = (begin.counters().inserted or 0) + int(np.count_nonzero(removed.sources == UNKNOWN))
    if num_lost:
        accounts.append(Account(shard, None, num_lost, 0, {**dict.fromkeys(REASONS, 0), "quarantine": num_lost}, 0))
    return accounts


def _imbalance(account: Account) -> Finding:
    removed = sum(account.removed.values())
    what = f"{account.source}: {account.inserted} inserted by the log, but {account.live} live and {removed} removed"
    return Finding(account.shard, what, ())


def _num_rejected(history: ShardHistory) -> int:
    ids = history.log.column("ids").filter(pc.equal(history.log.column("event"), "reject"))
    return (history.states[0].counters().rejected or 0) + len(pc.list_flatten(ids))


def _repeated_ids(histories: dict[int, ShardHistory]) -> list[Finding]:
    """Ids that belong to two rows, of one shard or of several."""
    ids = pa.concat_tables(
        history.ids.append_column("shard", pa.array(np.full(history.ids.num_rows, shard)))
        for shard, history in histories.items()
    )
    counted = ids.group_by("id").aggregate([("row", "count")])
    repeated = counted.filter(pc.greater(counted.column("row_count"), 1)).column("id")
    places = ids.filter(pc.is_in(ids.column("id"), value_set=repeated.combine_chunks())).group_by("id")
    findings = []
    for found in places.aggregate([("shard", "list"), ("row", "list")]).to_pylist():
        pairs = sorted(zip(found["shard_list"], found["row_list"], strict=True))
        where = ", ".join(f"row {row} of shard {shard}" for shard, row in pairs)
        findings.append(Finding(None, f"one id for {len(pairs)} rows: {where}", (found["id"],)))
    return findings


def _draws(histories: dict[int, ShardHistory]) -> pa.Table:
    """A line per draw over all shards: how many rows it asked for, and how many it was given and kept.

    Rows that were lost with a damaged file do not count: a resumed learner is given others in their place.
    """
    parts = []
    for history in histories.values():
        is_draw = pc.equal(history.log.column("event"), "draw").to_numpy()
        lost = history.removed.rows[history.reasons == REASONS.index("quarantine")]
        kept = history.drawn.events[~np.isin(history.drawn.rows, lost)]
        given_rows = np.bincount(kept, minlength=history.log.num_rows)[is_draw]
        columns = history.log.filter(pa.array(is_draw)).select([*_KEY, "whole"])
        parts.append(columns.append_column("given", pa.array(given_rows)))
    return pa.concat_tables(parts).group_by(_KEY).aggregate([("given", "sum"), ("whole", "min"), ("whole", "max")])


def _wrong_sizes(draws: pa.Table) -> list[Finding]:
    """Draws whose parts do not fit together."""
    too_many = pc.greater(draws.column("given_sum"), draws.column("whole_min"))
    disagree = pc.not_equal(draws.column("whole_min"), draws.column("whole_max"))
    findings = []
    for draw in draws.filter(pc.or_(too_many, disagree)).to_pylist():
        name = f"draw of {draw['source']} trajectories for step {draw['step']} of stage {draw['stage']!r}"
        findings.append(Finding(None, f"{name}: {draw['given_sum']} rows given of {draw['whole_min']} asked for", ()))
    return findings
