"""Rows of the previous schema version: the golden folder reads as rows of this one, any other version is refused."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from buffer.store.upgrade import PREVIOUS_VERSION, schema_of_version, stored_contract, stored_version, upgrade
from buffer.trajectory.schema import rows_of, stored_schema, trajectory_schema, without_rows
from tests.trajectories import CONTRACT, batch_of, row

GOLDEN = Path(__file__).parents[2] / "golden" / "buffer_v1" / "folder"


def golden_batches(name: str) -> list[pa.RecordBatch]:
    with pa.OSFile(str(GOLDEN / name)) as file:
        return list(pa.ipc.open_stream(file))


def with_version(batch: pa.RecordBatch, version: str) -> pa.RecordBatch:
    return batch.replace_schema_metadata({**batch.schema.metadata, b"schema_version": version.encode()})


@pytest.mark.parametrize(
    ("name", "first_row", "ids"),
    [
        ("segment-000001.arrows", 0, ["p0", "e0", "e1", "p1", "p2", "p3", "e2"]),
        ("segment-000002.arrows", 7, ["p4", "p5"]),
        ("segment-000003.arrows.open", 9, ["p6"]),
    ],
)
def test_golden_segments_of_version_1_become_rows_of_this_version(name, first_row, ids):
    old = golden_batches(name)
    assert stored_version(old[0].schema) == PREVIOUS_VERSION
    assert stored_contract(old[0].schema) == CONTRACT
    assert old[0].schema.equals(schema_of_version(CONTRACT, PREVIOUS_VERSION), check_metadata=True)
    new = upgrade(old, first_row)
    assert [row for batch in new for row in rows_of(batch)] == list(range(first_row, first_row + len(ids)))
    assert [id_ for batch in new for id_ in batch.column("id").to_pylist()] == ids
    for before, after in zip(old, new, strict=True):
        assert after.schema.equals(stored_schema(CONTRACT), check_metadata=True)
        assert without_rows(after).equals(before)  # every value, nulls included


def test_rows_of_this_version_keep_the_numbers_they_have():
    stored = batch_of([row("a"), row("b")]).append_column(
        pa.field("row", pa.int64(), nullable=False), pa.array([5, 9], pa.int64())
    )
    assert upgrade([stored], first_row=0) == [stored]


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("3", "version 3 cannot be read; this program reads versions 1 and 2: use the version of the program that"),
        ("0", "version 0 cannot be read"),
        ("two", "version two cannot be read"),
    ],
)
def test_rows_of_an_unknown_version_are_refused_by_name(version, message):
    batch = with_version(golden_batches("segment-000002.arrows")[0], version)
    with pytest.raises(ValueError, match=message):
        upgrade([batch], 0)


def test_rows_without_metadata_and_rows_of_other_columns_are_refused():
    batch = golden_batches("segment-000002.arrows")[0]
    with pytest.raises(ValueError, match="version none"):
        stored_version(batch.schema.remove_metadata())
    with pytest.raises(ValueError, match="schema version 1 have other columns"):
        upgrade([batch.drop_columns(["reward"])], 0)
    unnumbered = pa.RecordBatch.from_arrays(batch.columns, schema=trajectory_schema(CONTRACT))
    with pytest.raises(ValueError, match="schema version 2 have other columns"):
        upgrade([unnumbered], 0)
