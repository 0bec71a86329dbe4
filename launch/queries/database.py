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

from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

import duckdb
import numpy as np
import pyarrow as pa
from duckdb.func import FunctionNullHandling, PythonUDFType

from buffer.experts.ragged import Ragged
from buffer.reading.snapshot import BufferSnapshot, read_buffer
from buffer.trajectory.replay import TrajectoryArrays, final_token_ids, replay
from buffer.trajectory.schema import TokenContract
from launch.queries.query import catalog_image
from launch.rollout_view import as_shown, view_rollout
from launch.run_folder.folder import BUFFER_FOLDER, run_config
from launch.run_folder.task import load_run_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TABLES = ("trajectories", "draws", "removals", "rejections", "events")

POLL_S = 0.1
"""How soon a query notices Ctrl-C."""

T = TypeVar("T")

TEXT_INPUTS = {
    "prompt_text": ("prompt_ids",),
    "final_text": ("prompt_ids", "actions", "executed"),
    "marked_text": ("prompt_ids", "actions", "executed", "finish_reason"),
}
"""Per column of text, the columns of a trajectory that it is made of, in the order of the method's parameters."""

_STORED = "stored_trajectories"  # DuckDB's own views of the Arrow tables; `trajectories` and `events` are made of them
_LOGGED = "logged_events"
_SQL_TYPES = {"prompt_ids": "INTEGER[]", "actions": "INTEGER[]", "executed": "INTEGER[]", "finish_reason": "VARCHAR"}
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


def open_database(run: Path) -> BufferDatabase:
    """The tables of a run; UserError where `run` is none, ValueError or OSError where it holds no replay buffer."""
    folder = run_config(run).parent
    snapshot = read_buffer(folder / BUFFER_FOLDER, partial(catalog_image, folder))
    texts = TextColumns(snapshot.contract, lambda: load_run_tokenizer(folder, snapshot.contract))
    return BufferDatabase(snapshot, texts)


class BufferDatabase:
    """A snapshot of a buffer as tables of SQL; nothing more than the snapshot is read from the files yet."""

    def __init__(self, snapshot: BufferSnapshot, texts: TextColumns) -> None:
        self._connection = duckdb.connect(
            config={"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
        )
        self._texts = texts
        self._connection.register(_STORED, snapshot.trajectories)
        self._connection.register(_LOGGED, snapshot.events)
        for name, inputs in TEXT_INPUTS.items():
            self._connection.create_function(
                f"_{name}",
                getattr(texts, name),
                [_SQL_TYPES[column] for column in inputs],
                "VARCHAR",
                type=PythonUDFType.ARROW,
                null_handling=FunctionNullHandling.SPECIAL,
            )
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
            ValueError: the query is none, or more than one, or does something else than read.
            duckdb.Error: DuckDB refuses it, here or where the result is read.
        """
        statements = self._connection.extract_statements(sql)
        if len(statements) != 1:
            raise ValueError(f'give one query, not {len(statements)}, e.g. "select count(*) from trajectories"')
        readers = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
        if statements[0].type not in readers:
            raise ValueError(f"a query only reads: give a SELECT, not {statements[0].type.name}")
        return self._connection.sql(sql)

    def run(self, work: Callable[[], T]) -> T:
        """What `work` gives, which asks this database; Ctrl-C ends it, which DuckDB by itself would not notice.

        Raises:
            ValueError: in place of DuckDB's errors, its first line; or why there is no text.
        """
        future: Future[T] = Future()

        def compute() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except Exception as error:  # noqa: BLE001 (`result` raises it)
                    future.set_exception(error)

        try:
            Thread(target=compute).start()  # no executor: Ctrl-C within its `submit` would leave the query running
            while not wait([future], timeout=POLL_S).done:
                pass
        except KeyboardInterrupt:
            while not (future.cancel() or wait([future], timeout=POLL_S).done):
                self._connection.interrupt()  # again and again: it may be between two queries
            raise
        try:
            return future.result()
        except (duckdb.Error, pa.ArrowException) as error:
            # DuckDB buries what a function of ours raises in a message of its own.
            raise ValueError(str(self._texts.load_error or _first_line(error))) from None

    def describe(self) -> dict[str, tuple[int, dict[str, str]]]:
        """The number of rows of each table, and the SQL types of its columns."""
        found = {}
        for name in TABLES:
            columns = self._connection.execute(f"DESCRIBE {name}").fetchall()
            (num_rows,) = self._connection.execute(f"SELECT count(*) FROM {name}").fetchall()[0]
            found[name] = num_rows, {column[0]: column[1] for column in columns}
        return found

    def close(self) -> None:
        """Let go of the tables, and of the files behind them."""
        self._connection.close()


def _first_line(error: Exception) -> str:
    """What DuckDB says, without its drawing of where in the query; its suggestion, on the second line, is kept."""
    lines = [line.strip() for line in str(error).split("\n\nLINE ")[0].splitlines()]
    return " ".join(line for line in lines if line)


class TextColumns:
    """Text of trajectories of one token contract. The tokenizer is loaded at the first use of any column."""

    def __init__(self, contract: TokenContract, load_tokenizer: Callable[[], PreTrainedTokenizerBase]) -> None:
        self._contract = contract
        self._load_tokenizer = load_tokenizer
        self._loaded: PreTrainedTokenizerBase | None = None
        self.load_error: ValueError | OSError | None = None  # once somebody needed a tokenizer in vain

    def prompt_text(self, prompt_ids: pa.ChunkedArray) -> pa.StringArray:
        """[n] prompts. As every column: ValueError or OSError if there is no tokenizer (`load_run_tokenizer`)."""
        return pa.array(self._decode_all(prompt_ids.to_pylist()), pa.string())

    def final_text(
        self, prompt_ids: pa.ChunkedArray, actions: pa.ChunkedArray, executed: pa.ChunkedArray
    ) -> pa.StringArray:
        """[n] answers as they stand at the end, without `<eos>`; decoded in their place behind the prompt, because
        many tokenizers drop the space of a first token.
        """
        trajectories = TrajectoryArrays.from_batch(_batch(prompt_ids=prompt_ids, actions=actions, executed=executed))
        offsets, ids = final_token_ids(
            trajectories, replay(trajectories, self._contract.backspace_id), self._contract.backspace_id
        )
        answers = [part[~np.isin(part, self._contract.eos_ids)].tolist() for part in Ragged(offsets, ids).rows()]
        prompts: list[list[int]] = prompt_ids.to_pylist()
        starts = self._decode_all(prompts)
        wholes = self._decode_all([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
        return pa.array(
            [
                whole[len(start) :] if whole.startswith(start) else self._decode_all([answer])[0]
                for start, whole, answer in zip(starts, wholes, answers, strict=True)
            ],
            pa.string(),
        )

    def marked_text(
        self,
        prompt_ids: pa.ChunkedArray,
        actions: pa.ChunkedArray,
        executed: pa.ChunkedArray,
        finish_reason: pa.ChunkedArray,
    ) -> pa.StringArray:
        """[n] answers with their deletions, as `RolloutView.plain` writes them."""
        batch = _batch(prompt_ids=prompt_ids, actions=actions, executed=executed, finish_reason=finish_reason)
        tokenizer = self._tokenizer()
        views = (view_rollout(batch, index, tokenizer, self._contract) for index in range(batch.num_rows))
        return pa.array([view.plain() for view in views], pa.string())

    def _decode_all(self, ids: list[list[int]]) -> list[str]:
        texts: list[str] = self._tokenizer().batch_decode(ids, clean_up_tokenization_spaces=False)
        return [as_shown(text) for text in texts]

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self._loaded is None:
            try:
                self._loaded = self._load_tokenizer()
            except (ValueError, OSError) as error:
                self.load_error = error
                raise
        return self._loaded


def _batch(**columns: pa.ChunkedArray) -> pa.RecordBatch:
    arrays = [column.combine_chunks() for column in columns.values()]
    return pa.RecordBatch.from_arrays(arrays, names=list(columns))
