"""The audit: clean for whatever a store does, and every violation that somebody really made is named with its ids."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from buffer.reading.audit import SampleLimits, audit_buffer
from buffer.store.catalog import CATALOG_NAME, EventEntry, row_checksum
from buffer.store.shard import SampleKey
from launch.cli import app
from launch.settings.recipe import read_recipe, write_recipe
from tests.stores import SMALL, open_store
from tests.trajectories import batch_of, expert_row, numbered, row

LIMITS = SampleLimits(max_times_sampled=2, max_staleness=1)
RECIPE = Path("launch/recipes/arithmetic_cpu.yaml")
AT_US = 1_800_000_000_000_000


def shard(run: Path, index: int = 0) -> Path:
    return run / "buffer" / f"shard-{index:03d}"


def findings(run: Path, limits: SampleLimits = LIMITS) -> list[tuple[str, tuple[str, ...]]]:
    return [(finding.what, finding.names) for finding in audit_buffer(run / "buffer", limits).findings]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Rows 0-5: p0, p1 and p2 (stale, p0 drawn once), e0 (drawn once), p3 (drawn once) and p4, of version 2."""
    store = open_store(shard(tmp_path), max_staleness=1, max_times_sampled=2, segment_bytes=SMALL)
    store.insert(batch_of([row(f"p{number}", features=[0.0] * SMALL) for number in range(3)]))
    store.insert(batch_of([expert_row("e0")]))
    assert store.sample(SampleKey("tune", 0, "policy"), 1, 0) is not None
    store.insert(batch_of([row("p3", policy_version=[2, 2, 2])]))
    assert store.sample(SampleKey("tune", 1, "policy"), 1, 2) is not None
    assert store.sample(SampleKey("tune", 1, "expert"), 1, 2) is not None
    store.insert(batch_of([row("p4", policy_version=[2, 2, 2])]))
    store.insert(batch_of([row("p4"), row("bad", actions=[99])]))
    store.close()
    return tmp_path


def append_events(run: Path, *events: dict[str, object]) -> None:
    """As a defective writer would."""
    with closing(sqlite3.connect(shard(run) / CATALOG_NAME)) as catalog, catalog:
        for fields in events:
            seq, next_row = catalog.execute("select max(seq) + 1, max(next_row) from events").fetchone()
            absent = dict.fromkeys(EventEntry._fields)
            event = EventEntry(**{**absent, "seq": seq, "at_us": AT_US, "next_row": next_row, **fields})
            marks = ", ".join("?" * (len(event) + 1))
            catalog.execute(f"insert into events values ({marks})", (*event, row_checksum(event)))


def blob(rows: list[int]) -> bytes:
    return np.array(rows, np.int64).tobytes()


def draw(rows: list[int], step: int = 7, version: int = 2, source: str = "policy", whole: int = 9) -> dict[str, object]:
    key = {"stage": "tune", "step": step, "source": source}
    return {"kind": "draw", **key, "version": version, "rows": blob(rows), "whole": whole}


def removal(rows: list[int]) -> dict[str, object]:
    return {"kind": "remove", "source": "policy", "reason": "age", "version": 2, "rows": blob(rows)}


def deletion(rows: list[int]) -> dict[str, object]:
    return {"kind": "delete", "source": "policy", "rows": blob(rows)}


def command(run: Path, *arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["audit", str(run), *arguments])


def refusal(run: Path) -> str:
    result = command(run)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    return line


def test_what_a_store_leaves_is_clean_and_the_account_says_what_happened(run):
    report = audit_buffer(run / "buffer", LIMITS)
    assert report.findings == ()
    expert, policy = report.accounts
    assert (expert.source, expert.inserted, expert.live, expert.sampled) == ("expert", 1, 1, 1)
    assert (policy.source, policy.inserted, policy.live, policy.sampled) == ("policy", 5, 2, 2)
    assert {reason: count for reason, count in policy.removed.items() if count} == {"stale": 3}
    assert (report.rejected, report.num_samples) == (1, 3)


@pytest.mark.parametrize(
    ("events", "what", "names"),
    [
        ([draw([0])], "sampled after it ceased to be live", ("p0",)),
        ([draw([3])], "sampled as a trajectory of the other source", ("e0",)),
        ([draw([4, 4])], "given twice in one sample", ("p3",)),
        ([draw([4, 5]), draw([5, 4], 8)], "sampled 3 times; max_times_sampled is 2", ("p3",)),
        ([draw([5, 4], version=5)], "sampled with a staleness of 3; max_staleness is 1", ("p3", "p4")),
        ([{"kind": "stage", "version": 3}, draw([5])], "sampled in a later stage than it was made for", ("p4",)),
        ([draw([6])], "sampled before it was inserted", ("row 6",)),
        ([deletion([5])], "deleted, though it was live", ("p4",)),
        ([removal([5]), deletion([5])], "in a segment, though it was deleted", ("p4",)),
        ([draw([6])], "in no segment, though neither evicted nor dropped", ("row 6",)),
        ([removal([1, 5]), removal([5])], "removed 2 times", ("p1", "p4")),
        ([draw([4, 5], whole=1)], "sample of policy trajectories for step 7 of stage 'tune': 2 rows given of 1", ()),
    ],
)
def test_an_event_that_must_not_be_is_found(run, events, what, names):
    append_events(run, *events)
    assert any(found.startswith(what) and rows == names for found, rows in findings(run)), findings(run)


def test_limits_that_a_run_does_not_have_are_not_checked(run):
    append_events(run, draw([4, 5], version=5), draw([5, 4], 8), draw([4], 9))
    assert len(findings(run)) == 2
    assert findings(run, SampleLimits(None, None)) == []


def test_an_id_in_two_shards_is_found(run):
    store = open_store(shard(run, 1))
    store.insert(batch_of([row("p3", policy_version=[2, 2, 2]), row("q0")]))
    store.close()
    assert findings(run) == [("one id for 2 rows: row 4 of shard 0, row 0 of shard 1", ("p3",))]


@pytest.mark.parametrize(
    ("name", "near"), [("segment-000001.arrows", b"p1"), ("segment-000002.arrows", b"p3"), (CATALOG_NAME, b"tune")]
)
def test_a_flipped_bit_is_found_and_the_other_shards_are_checked_all_the_same(run, name, near):
    store = open_store(shard(run, 1))
    store.insert(numbered(0, 3))
    store.close()
    path = shard(run) / name
    content = bytearray(path.read_bytes())
    content[content.index(near)] ^= 4
    path.write_bytes(content)
    report = audit_buffer(run / "buffer", LIMITS)
    assert [finding.shard for finding in report.findings] == [0]
    assert str(path) in report.findings[0].what
    assert {account.shard for account in report.accounts} == {1}


def test_rows_that_left_the_catalog_without_a_trace_are_found(run):
    with closing(sqlite3.connect(shard(run) / CATALOG_NAME)) as catalog, catalog:
        catalog.execute("delete from batches where first_row = 4")
    assert findings(run) == [("in no segment, though neither evicted nor dropped", ("row 4",))]


def test_the_command_ends_with_0_1_or_2(run, tmp_path_factory):
    settings = read_recipe(RECIPE, ["buffer.max_staleness=1", "buffer.max_times_sampled=2"])
    write_recipe(settings, run / "config.yaml")
    clean = command(run)
    assert clean.exit_code == 0
    assert "clean: every row is accounted for" in clean.stdout
    assert max(map(len, clean.stdout.splitlines())) <= 80
    assert json.loads(command(run, "--json").stdout)["clean"] is True

    append_events(run, draw([4, 5]), draw([5, 4], 8))
    found = command(run)
    assert found.exit_code == 1
    assert "shard 0: sampled 3 times; max_times_sampled is 2: p3" in found.stdout
    as_json = command(run, "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["findings"] == [
        {"shard": 0, "what": "sampled 3 times; max_times_sampled is 2", "ids": ["p3"]}
    ]

    nowhere = tmp_path_factory.mktemp("empty")
    assert "is not a run folder" in refusal(nowhere)
    write_recipe(settings, nowhere / "config.yaml")
    assert "holds no replay buffer" in refusal(nowhere)
