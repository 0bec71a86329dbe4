"""SQL over the replay buffer of a run, live or finished: a snapshot of its shards as tables of an in-memory DuckDB.

    trajectories   every stored row, with `shard`, `live`, `times_sampled`, `staleness` and columns of text
    draws          one line per drawn row: when, for which step of which stage
    removals       one line per row that ceased to be live, with the reason
    rejections     one line per trajectory refused at the door
    events         what happened, as the catalog has it; the three before are made of it

A query cannot write: it is one SELECT, and DuckDB may open no file once the tables are there. Stored rows stay in the
mapped files; DuckDB reads the columns that a query asks for. Text is decoded for the rows that are left after the
conditions on other columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import duckdb
import pyarrow as pa
from duckdb.func import FunctionNullHandling, PythonUDFType

from buffer.reading.snapshot import BufferSnapshot
from launch.queries.text_columns import TEXT_INPUTS, TextColumns

TABLES = ("trajectories", "draws", "removals", "rejections", "events")

POLL_S = 0.1
"""How soon a query notices Ctrl-C."""

T = TypeVar("T")

_STORED = "stored_trajectories"  # DuckDB's own views of the Arrow tables; `trajectories` and `events` are made of them
_LOGGED = "logged_events"
_SQL_TYPES = {"prompt_ids": "INTEGER[]", "actions": "INTEGER[]", "realised": "INTEGER[]", "finish_reason": "VARCHAR"}
_EVENT_VIEWS = """
    CREATE VIEW events AS SELECT * RENAME ("at" AS logged_at) FROM logged_events;
    CREATE VIEW draws AS
        SELECT shard, logged_at, stage, step, source, policy_version, unnest("rows") AS "row"
        FROM events WHERE event = 'draw';
    CREATE VIEW removals AS
        SELECT shard, logged_at, source, policy_version, reason, unnest("rows") AS "row", unnest(ids) AS id
        FROM events WHERE event = 'remove';
    CREATE VIEW rejections AS
        SELECT shard, logged_at, source, reason, unnest(ids) AS id FROM events WHERE event = 'reject';
"""
_LOCKED = """
    SET TimeZone = 'UTC';
    SET temp_directory = '';
    SET python_enable_replacements = false;
    SET enable_external_access = false;
    SET lock_configuration = true;
"""


@dataclass(frozen=True)
class TableDescription:
    """What a query may ask of one table. columns: names with their SQL types."""

    name: str
    columns: tuple[tuple[str, str], ...]
    num_rows: int


class BufferDatabase:
    """A snapshot of a buffer as tables of SQL."""

    def __init__(self, snapshot: BufferSnapshot, texts: TextColumns) -> None:
        """Make the tables; nothing is read from the files yet but what the snapshot has read."""
        self._connection = duckdb.connect(
            config={"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
        )
        self._texts = texts
        self._connection.register(_STORED, snapshot.trajectories)
        self._connection.register(_LOGGED, snapshot.events)
        self._create_text_functions()
        behind = f"greatest({snapshot.newest_version} - list_min(policy_version), 0)"
        texts_called = ", ".join(f"_{name}({', '.join(inputs)}) AS {name}" for name, inputs in TEXT_INPUTS.items())
        self._connection.execute(
            f"CREATE VIEW trajectories AS SELECT *, CASE WHEN policy_version IS NOT NULL THEN {behind} END "
            f"AS staleness, {texts_called} FROM {_STORED}"
        )
        self._connection.execute(_EVENT_VIEWS)
        self._connection.execute(_LOCKED)

    def select(self, sql: str) -> duckdb.DuckDBPyRelation:
        """The result of one SELECT (or EXPLAIN, DESCRIBE, SUMMARIZE), computed as it is read: do that inside `run`.

        Raises:
            ValueError: the query is none, or more than one, or does something else than read. duckdb.Error: DuckDB
                refuses it, here or where the result is read.
        """
        statements = self._connection.extract_statements(sql)
        if len(statements) != 1:
            raise ValueError(f'give one query, not {len(statements)}, e.g. "select count(*) from trajectories"')
        readers = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
        if statements[0].type not in readers:
            raise ValueError(f"a query only reads: give a SELECT, not {statements[0].type.name}")
        return self._connection.sql(sql)

    def run(self, work: Callable[[], T]) -> T:
        """What `work` gives, which asks this database. Ctrl-C ends it; DuckDB by itself would not notice.

        Raises:
            ValueError: in place of DuckDB's errors, its first line; or why there is no text.
            KeyboardInterrupt, and what `work` raises.
        """
        with ThreadPoolExecutor(max_workers=1) as executor, self._reported():
            future = executor.submit(work)
            try:
                while not wait([future], timeout=POLL_S).done:
                    pass
            except KeyboardInterrupt:
                while not wait([future], timeout=POLL_S).done:  # again and again: it may be between two queries
                    self._connection.interrupt()
                raise
            return future.result()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except (duckdb.Error, pa.ArrowException) as error:
            # DuckDB buries what a function of ours raises in a message of its own.
            raise ValueError(str(self._texts.load_error or _first_line(error))) from None

    def describe(self) -> list[TableDescription]:
        """All tables, in the order of `TABLES`."""
        return [self._describe(name) for name in TABLES]

    def close(self) -> None:
        """Let go of the tables."""
        self._connection.close()

    def _describe(self, name: str) -> TableDescription:
        columns = self._connection.execute(f"DESCRIBE {name}").fetchall()
        (num_rows,) = self._connection.execute(f"SELECT count(*) FROM {name}").fetchall()[0]
        return TableDescription(name, tuple((column[0], column[1]) for column in columns), num_rows)

    def _create_text_functions(self) -> None:
        for name, inputs in TEXT_INPUTS.items():
            self._connection.create_function(
                f"_{name}",
                getattr(self._texts, name),
                [_SQL_TYPES[column] for column in inputs],
                "VARCHAR",
                type=PythonUDFType.ARROW,
                null_handling=FunctionNullHandling.SPECIAL,
            )


def _first_line(error: Exception) -> str:
    """What DuckDB says, without its drawing of where in the query; its suggestion, on the second line, is kept."""
    lines = [line.strip() for line in str(error).split("\n\nLINE ")[0].splitlines()]
    return " ".join(line for line in lines if line)
