"""Which rows each training step was given: a log that makes a resumed learner repeat its draws exactly.

A draw has a key (stage, step, source). Its rows are in the log before it is answered, so a learner that was killed
and goes on from a checkpoint is given the same rows again, whatever came into the buffer meanwhile. Rows of draws
that no checkpoint covers yet are *pinned*: they may cease to be live, but their bytes are kept.

    consumption-000002.arrows.open   takes records, one Arrow batch per record (see `buffer.segments`)
    consumption-000001.arrows        sealed: history, never read in training

A record is a draw, or the mark that the learner has a durable checkpoint; the mark releases the draws before it.
Versions go on over a restart: weights that are published again on the way get new numbers, and a logged draw is
answered without looking at staleness, since its rows were fresh when they were first drawn. New draws count
staleness from the new numbers. They exceed the old ones by the publications that a restart adds or repeats, so a
bound on staleness is then kept more strictly, never less.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from buffer.manifest import sync_folder
from buffer.segments import OPEN_SUFFIX, SEALED_SUFFIX, OpenSegment, recover_open_segment, write_sealed

Int64 = npt.NDArray[np.int64]

logger = logging.getLogger(__name__)

ROTATE_BYTES = 8 * 2**20
"""Size beyond which a checkpoint begins a new file; opening a log reads no more than about this."""

_PREFIX = "consumption-"
_SCHEMA = pa.schema(
    [
        pa.field("event", pa.string(), nullable=False),  # draw | checkpoint
        pa.field("stage", pa.string(), nullable=False),
        pa.field("step", pa.int64(), nullable=False),  # steps of the stage done before
        pa.field("source", pa.string()),  # of a draw
        pa.field("policy_version", pa.int64()),  # newest one known at a draw
        pa.field("rows", pa.list_(pa.int64())),  # of a draw: row numbers in the store, in the order given
    ],
    metadata={b"schema_version": b"1"},
)


@dataclass(frozen=True)
class DrawKey:
    """Names one draw of a run. step: steps of the stage that were done before it."""

    stage: str
    step: int
    source: str


@dataclass(frozen=True)
class LoggedDraw:
    """What a draw was given: row numbers, in order. policy_version: newest version known then."""

    key: DrawKey
    policy_version: int
    rows: Int64


class ConsumptionLog:
    """The draws that no durable checkpoint covers yet, in memory and on disk. Not thread-safe."""

    def __init__(self, folder: Path, sync_each_record: bool, rotate_bytes: int = ROTATE_BYTES) -> None:
        """Open the log in `folder`; a record that a crash left torn is cut off.

        sync_each_record: whether a record survives a loss of power; without, it survives the death of the process.

        Raises:
            CorruptSegmentError: the file is damaged before its last record.
        """
        self._folder = folder
        self._sync_each_record = sync_each_record
        self._rotate_bytes = rotate_bytes
        self._draws: dict[DrawKey, LoggedDraw] = {}
        self._pinned: Int64 | None = None  # built on demand
        files = sorted(folder.glob(f"{_PREFIX}*{OPEN_SUFFIX}"))
        self._number = _number_of(files[-1]) if files else 1
        for superseded in files[:-1]:  # a crash at the end of a rotation
            superseded.unlink()
        path = self._path(self._number, OPEN_SUFFIX)
        if path.exists():
            recovered = recover_open_segment(path, _SCHEMA)
            if recovered.cut_bytes:
                logger.warning("%s: cut %d bytes of an unfinished record off its end", path, recovered.cut_bytes)
            for batch in recovered.batches:
                self._apply(batch)
        self._file = OpenSegment(path, _SCHEMA, sync_each_record)

    @property
    def pinned_rows(self) -> Int64:
        """[n] row numbers whose bytes must be kept, ascending, without repetition."""
        if self._pinned is None:
            rows = [draw.rows for draw in self._draws.values()]
            self._pinned = np.unique(np.concatenate(rows)) if rows else np.empty(0, dtype=np.int64)
        return self._pinned

    def find(self, key: DrawKey) -> LoggedDraw | None:
        """The draw with this key, None where there was none since the newest checkpoint."""
        return self._draws.get(key)

    def append(self, draw: LoggedDraw) -> None:
        """Make a draw durable, before it is answered.

        Raises:
            OSError: the disk refused; the log is as it was before.
        """
        assert draw.key not in self._draws, "a logged draw is repeated, not drawn again"
        self._file.append(_draw_record(draw))
        self._draws[draw.key] = draw
        self._pinned = None

    def checkpointed(self, stage: str, step: int) -> None:
        """Release what a durable checkpoint of `stage` after `step` steps covers: its draws before, and other stages'.

        Stages follow one another, so a checkpoint of one means that no other will go on from where it was.

        Raises:
            OSError: the disk refused.
        """
        self._file.append(_record(event="checkpoint", stage=stage, step=step))
        self._release(stage, step)
        if self._file.size_bytes >= self._rotate_bytes:
            self._rotate()

    def forget_unless(self, present: Callable[[Int64], bool]) -> None:
        """Forget, for good, draws whose rows the store no longer has.

        Rows get lost with a segment that was taken out of the manifest by hand, or in a loss of power where the
        settings do not guard against one; their numbers may then be given to other rows.
        """
        lost = [draw.key for draw in self._draws.values() if not present(draw.rows)]
        if not lost:
            return
        for key in lost:
            logger.warning("%s: the rows of %s are lost; on resume that step draws others", self._folder, key)
            del self._draws[key]
        self._pinned = None
        self._rotate()

    def close(self) -> None:
        """Make every record durable and let go of the file."""
        self._file.close()

    def _apply(self, batch: pa.RecordBatch) -> None:
        (row,) = batch.to_pylist()
        if row["event"] == "checkpoint":
            self._release(row["stage"], row["step"])
            return
        key = DrawKey(row["stage"], row["step"], row["source"])
        self._draws[key] = LoggedDraw(key, row["policy_version"], np.array(row["rows"], dtype=np.int64))

    def _release(self, stage: str, step: int) -> None:
        self._draws = {key: draw for key, draw in self._draws.items() if key.stage == stage and key.step >= step}
        self._pinned = None

    def _rotate(self) -> None:
        """Begin a new file with the draws that still count: history sealed, new file in place, then the old goes."""
        old = self._file
        sealed = self._path(self._number, SEALED_SUFFIX)
        write_sealed(sealed, _merged(recover_open_segment(old.path, _SCHEMA).batches), _SCHEMA)
        path = self._path(self._number + 1, OPEN_SUFFIX)
        temporary = path.with_name(path.name + ".tmp")
        temporary.unlink(missing_ok=True)
        file = OpenSegment(temporary, _SCHEMA, self._sync_each_record)
        for draw in self._draws.values():
            file.append(_draw_record(draw))
        file.close()
        os.rename(temporary, path)
        sync_folder(self._folder)
        self._number += 1
        self._file = OpenSegment(path, _SCHEMA, self._sync_each_record)
        old.close()
        old.path.unlink()

    def _path(self, number: int, suffix: str) -> Path:
        return self._folder / f"{_PREFIX}{number:06d}{suffix}"


def _number_of(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX).removesuffix(OPEN_SUFFIX))


def _draw_record(draw: LoggedDraw) -> pa.RecordBatch:
    return _record(
        event="draw",
        stage=draw.key.stage,
        step=draw.key.step,
        source=draw.key.source,
        policy_version=draw.policy_version,
        rows=draw.rows,
    )


def _record(**values: str | int | Int64) -> pa.RecordBatch:
    columns = [pa.array([values.get(field.name)], type=field.type) for field in _SCHEMA]
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)


def _merged(batches: tuple[pa.RecordBatch, ...]) -> list[pa.RecordBatch]:
    return [pa.concat_batches(batches)] if batches else []
