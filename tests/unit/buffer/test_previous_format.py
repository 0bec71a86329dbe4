"""A buffer folder of format 1 (golden folder): what a reader finds in it, and that damage is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from buffer.reading.reader import read_buffer
from buffer.store.manifest import CorruptSegmentError
from buffer.trajectory.schema import stored_schema
from tests.trajectories import BACKSPACE, CONTRACT, EOS

GOLDEN = Path(__file__).parents[2] / "golden" / "buffer_v1" / "folder"


def test_every_row_of_the_golden_folder_is_read_with_what_became_of_it():
    snapshot = read_buffer(GOLDEN)
    assert snapshot.contract == CONTRACT
    assert snapshot.newest_version == 3
    table = snapshot.trajectories
    assert table.select(stored_schema(CONTRACT).names).schema.equals(stored_schema(CONTRACT))
    facts = zip(*(table.column(name).to_pylist() for name in ("row", "id", "live", "times_sampled")), strict=True)
    assert list(facts) == [
        (0, "p0", False, 1),  # dropped as stale, pinned by its draw
        (1, "e0", True, 2),
        (2, "e1", True, 1),
        (3, "p1", False, 1),  # dropped as stale
        (4, "p2", False, 1),  # evicted
        (5, "p3", True, 1),
        (6, "e2", True, 0),
        (7, "p4", True, 0),
        (8, "p5", True, 0),
        (9, "p6", True, 0),
    ]
    rows = table.to_pylist()
    assert rows[0]["actions"] == [5, 6, BACKSPACE, 9, EOS]
    assert rows[0]["policy_version"] == [0, 0, 0, 1, 1]
    assert rows[2]["realised"] == [None, 20, None, None, None]
    assert rows[3]["reward"] == 0.5
    assert rows[6]["actions"] == []
    assert rows[6]["logprobs"] is None
    assert rows[6]["finish_reason"] == "aborted"
    assert rows[7]["sampling"] is None
    assert rows[7]["weights_fingerprint"] is None
    events = snapshot.events.select(["event", "stage", "step", "source", "rows"]).to_pylist()
    assert [tuple(event.values()) for event in events] == [
        ("draw", "trunk", 0, "expert", [2, 1]),
        ("draw", "tune", 0, "policy", [0, 3]),
        ("checkpoint", "tune", 1, None, None),
        ("draw", "tune", 1, "policy", [4, 5]),
        ("draw", "tune", 1, "expert", [1]),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", b'{"format": 1', "manifest.json is damaged"),
        ("segment-000001.arrows", b"\xff\xff\xff\xff", "holds a damaged file"),
        ("segment-000002.arrows", None, "segment-000002.arrows"),
    ],
)
def test_a_damaged_file_of_the_folder_is_named(tmp_path, name, content, message):
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "buffer"))
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(CorruptSegmentError, match=message):
        read_buffer(folder)
