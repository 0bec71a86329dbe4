"""Checks that a replay buffer accounts for every trajectory, on the folder of a live run or of a finished one.

Per shard, and then over all shards:

    accounting   inserted = live + evicted (by reason) + dropped (by reason); every row is in one of them, once
    ids          no id belongs to two rows
    samples      only rows that were inserted, live, of the stage and of the source asked for; each at most
                 `max_times_sampled` times, none staler than `max_staleness`; no sample larger than requested
    files        checksums of segments and catalog (verified by the snapshot)

The events of the catalog say what happened; its batches and the segments say what is stored. An error in either is a
contradiction. Each check is one query over both. Staleness can be checked only for rows whose bytes are still stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import duckdb
import pyarrow as pa

from buffer.reading.snapshot import ShardSnapshot, read_shard, shard_folders, with_shard
from buffer.store.catalog import REASONS, CorruptStoreError
from buffer.trajectory.schema import ROW, SOURCES


@dataclass(frozen=True)
class SampleLimits:
    """Limits of a run on its samples, None = none (see `buffer.settings.BufferSettings`)."""

    max_times_sampled: int | None
    max_staleness: int | None


@dataclass(frozen=True)
class Finding:
    """A broken rule. shard: None where it concerns several; names: ids of the trajectories concerned, `row N` where
    the id of a row is not stored."""

    shard: int | None
    what: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Account:
    """Rows of one source in one shard. removed: by reason; sampled: each row counts every time."""

    shard: int
    source: str
    inserted: int
    live: int
    removed: dict[str, int]
    sampled: int


@dataclass(frozen=True)
class AuditReport:
    """What an audit found. rejected: trajectories refused on insert; num_samples: of whole batches, each once."""

    accounts: tuple[Account, ...]
    rejected: int
    num_samples: int
    findings: tuple[Finding, ...]


# entries: each row of a batch and of a deletion. known: each row that was ever inserted, with its id if one is known.
# sampled: one line per row and sample event, with the event of the row's removal and the first version of the stage.
_TABLES = """
    CREATE TABLE named AS SELECT * EXCLUDE ("rows", ids, priorities), unnest("rows") AS "row", unnest(ids) AS id
        FROM events WHERE event IN ('remove', 'delete');
    CREATE TABLE entries AS
        SELECT shard, "row", id, source, oldest, live FROM stored
        UNION ALL SELECT shard, "row", id, source, -1, false FROM named WHERE event = 'delete';
    CREATE TABLE known AS SELECT DISTINCT ON (shard, "row") * FROM entries;
    CREATE TABLE removed AS
        SELECT shard, "row", count(*) AS times, min(seq) AS seq FROM named WHERE event = 'remove' GROUP BY ALL;
    CREATE TABLE sampled AS
        SELECT sample.*, known.source AS own_source, known.oldest, removed.seq AS removed_seq FROM
        (SELECT * EXCLUDE ("rows", ids, priorities), unnest("rows") AS "row" FROM
            (SELECT *, coalesce(last_value(CASE WHEN event = 'stage' THEN policy_version END IGNORE NULLS)
                OVER (PARTITION BY shard ORDER BY seq ROWS UNBOUNDED PRECEDING), 0) AS first_version FROM events)
            WHERE event = 'draw') AS sample
        LEFT JOIN known USING (shard, "row") LEFT JOIN removed USING (shard, "row");
"""

_CHECKS = (
    """SELECT shard, 'removed ' || times || ' times' AS what, "row" FROM removed WHERE times > 1""",
    """SELECT shard, 'in no segment, though neither evicted nor dropped' AS what, "row" FROM (
        SELECT shard, unnest(range(next_row)) AS "row" FROM shards UNION SELECT shard, unnest("rows") FROM events
    ) ANTI JOIN known USING (shard, "row")""",
    """SELECT shard, 'deleted, though it was live' AS what, "row" FROM named ANTI JOIN removed USING (shard, "row")
    WHERE event = 'delete'""",
    """SELECT shard, 'in a segment, though it was deleted' AS what, "row" FROM entries
    GROUP BY shard, "row" HAVING count(*) > 1""",
    """SELECT shard, 'sampled before it was inserted' AS what, "row" FROM sampled WHERE "row" >= next_row""",
    """SELECT shard, 'sampled after it ceased to be live' AS what, "row" FROM sampled WHERE removed_seq < seq""",
    """SELECT shard, 'sampled as a trajectory of the other source' AS what, "row" FROM sampled
    WHERE own_source <> source""",
    """SELECT shard, 'sampled in a later stage than it was made for' AS what, "row" FROM sampled
    WHERE oldest <> -1 AND oldest < first_version""",
    """SELECT shard, 'given twice in one sample' AS what, "row" FROM sampled
    GROUP BY shard, seq, "row" HAVING count(*) > 1""",
    """SELECT shard, 'sampled ' || count(*) || ' times; max_times_sampled is ' || $max_times_sampled AS what, "row"
    FROM sampled GROUP BY shard, "row" HAVING count(*) > $max_times_sampled""",
    """SELECT shard, 'sampled with a staleness of ' || policy_version - oldest || '; max_staleness is ' ||
    $max_staleness AS what, "row" FROM sampled WHERE oldest <> -1 AND policy_version - oldest > $max_staleness""",
)
"""Each gives the rows that break a rule. A limit that a run does not have is null, which nothing exceeds."""

_NAMED = """
    SELECT shard, what, list(coalesce(id, 'row ' || "row") ORDER BY "row") FROM (SELECT DISTINCT * FROM ({check}))
    LEFT JOIN known USING (shard, "row") GROUP BY shard, what ORDER BY shard, what
"""

_REPEATED_IDS = """
    SELECT id, list('row ' || "row" || ' of shard ' || shard ORDER BY shard, "row") FROM known WHERE id IS NOT NULL
    GROUP BY id HAVING count(*) > 1 ORDER BY id
"""

# A sample that lost rows to damage is forgotten, and the learner is given others in their place.
_SAMPLES = """
    SELECT stage, step, source, sum(len("rows"))::BIGINT, min(whole), max(whole) FROM events AS sample
    WHERE event = 'draw' AND NOT EXISTS (
        SELECT 1 FROM events AS later WHERE later.event = 'forget' AND later.shard = sample.shard
        AND later.seq > sample.seq
        AND (later.stage, later.step, later.source) = (sample.stage, sample.step, sample.source))
    GROUP BY ALL ORDER BY ALL
"""

_ROWS = "SELECT shard, source, live, count(*) FROM known GROUP BY ALL"
_SAMPLED = "SELECT shard, source, count(*) FROM sampled GROUP BY ALL"
_REMOVED = "SELECT shard, source, reason, count(*) FROM named WHERE event = 'remove' GROUP BY ALL"


def audit_buffer(buffer: Path, limits: SampleLimits, image: Callable[[Path], bytes] | None = None) -> AuditReport:
    """Check all shards below `buffer`; a damaged one is a finding. Raises as `read_shard`, which `image` is for."""
    findings: list[Finding] = []
    shards: dict[int, ShardSnapshot] = {}
    for index, folder in shard_folders(buffer).items():
        try:
            shards[index] = read_shard(folder, image)
        except CorruptStoreError as error:
            findings.append(Finding(index, str(error), ()))
    report = audit_shards(shards, limits)
    return replace(report, findings=(*findings, *report.findings))


def audit_shards(shards: Mapping[int, ShardSnapshot], limits: SampleLimits) -> AuditReport:
    """Check snapshots of the shards of one buffer, by their numbers."""
    if not shards:
        return AuditReport((), 0, 0, ())
    with closing(_database(shards)) as database:
        accounts = list(_accounts(database, shards))
        findings = [finding for check in _CHECKS for finding in _check(database, check, limits)]
        findings.sort(key=lambda finding: finding.shard or 0)
        for each in accounts:
            if each.inserted != each.live + (removed := sum(each.removed.values())):
                what = f"{each.source}: {each.inserted} inserted, but {each.live} live and {removed} removed"
                findings.append(Finding(each.shard, what, ()))
        for id_, places in database.execute(_REPEATED_IDS).fetchall():
            findings.append(Finding(None, f"one id for {len(places)} rows: {', '.join(places)}", (id_,)))
        samples = database.execute(_SAMPLES).fetchall()
        for stage, step, source, given, whole, largest in samples:
            if given > whole or whole != largest:
                name = f"sample of {source} trajectories for step {step} of stage {stage!r}"
                findings.append(Finding(None, f"{name}: {given} rows given of {whole} asked for", ()))
        rejected = database.execute("SELECT sum(len(ids))::BIGINT FROM events WHERE event = 'reject'").fetchone()
    return AuditReport(tuple(accounts), (rejected or (0,))[0] or 0, len(samples), tuple(findings))


def _database(shards: Mapping[int, ShardSnapshot]) -> duckdb.DuckDBPyConnection:
    stored = []
    for index, shard in shards.items():
        table = shard.stored.select([ROW, "id", "source"]).append_column("oldest", pa.array(shard.oldest_version))
        stored.append(with_shard(table.append_column("live", pa.array(shard.live)), index))
    next_rows = [shard.next_row for shard in shards.values()]
    database = duckdb.connect()
    database.register("stored", pa.concat_tables(stored))
    database.register("events", pa.concat_tables(with_shard(shard.events, index) for index, shard in shards.items()))
    database.register("shards", pa.table({"shard": pa.array(shards, pa.int32()), "next_row": next_rows}))
    database.execute(_TABLES)
    return database


def _check(database: duckdb.DuckDBPyConnection, check: str, limits: SampleLimits) -> Iterator[Finding]:
    values = {name: value for name, value in vars(limits).items() if f"${name}" in check}
    for shard, what, names in database.execute(_NAMED.format(check=check), values).fetchall():
        yield Finding(shard, what, tuple(names))


def _accounts(database: duckdb.DuckDBPyConnection, shards: Iterable[int]) -> Iterator[Account]:
    """Of every shard and source."""
    rows, sampled, removed = (
        {tuple(key): count for *key, count in database.execute(query).fetchall()}
        for query in (_ROWS, _SAMPLED, _REMOVED)
    )
    for shard in shards:
        for source in SOURCES:
            live = rows.get((shard, source, True), 0)
            inserted = live + rows.get((shard, source, False), 0)
            of_source = {reason: removed.get((shard, source, reason), 0) for reason in REASONS}
            yield Account(shard, source, inserted, live, of_source, sampled.get((shard, source), 0))
