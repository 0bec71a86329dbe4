"""The process dies before any single step that it takes on the files of a shard: nothing acknowledged is missing."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from buffer.reading.audit import SampleLimits, audit_buffer
from buffer.settings import BufferSettings
from buffer.store.catalog import CatalogWriter
from buffer.store.shard import SampleKey
from buffer.store.store import ReplayStore
from tests.store_lives import check_kills
from tests.stores import crash, events
from tests.trajectories import CONTRACT, ids_of, numbered

STEPS = [
    *((os, name) for name in ("pwrite", "ftruncate", "truncate", "unlink", "fsync")),
    (CatalogWriter, "_write"),
]
"""What changes a file so that another process sees it, or comes right after it; SQLite's commits are one step each."""

SETTINGS = BufferSettings(
    capacity=14, min_size=1, segment_bytes=6_000, max_times_sampled=2, compaction_threshold=0.9, fsync="none"
)


def open_store(folder: Path) -> ReplayStore:
    return ReplayStore(folder, CONTRACT, SETTINGS, seed=0)


def work(folder: Path, acknowledge) -> None:
    """Inserts, draws, checkpoints, seals, evictions, a rewriting and deletions."""
    store = open_store(folder)
    for step in range(8):
        batch = numbered(4 * step, 4)
        assert store.insert(batch).accepted == 4
        acknowledge("insert", step, ids_of(batch))
        drawn = store.sample(SampleKey("s", step, "policy"), 3, 0)
        acknowledge("draw", step, ids_of(drawn.batch))
        if step % 4 == 3:
            store.checkpointed("s", step - 1)
            acknowledge("checkpoint", step - 1, [])
        if (plan := store.maintenance.plan()) is not None:
            store.maintenance.finish(plan.run())
            acknowledge("rewrite", step, [])
    store.close()


def killed_at(moment: int, folder: Path) -> list[list]:
    """What a process acknowledged that died before step `moment`."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        write = os.write
        before_each_step(lambda number: os._exit(9) if number == moment else None)
        work(folder, lambda *what: write(send, json.dumps(what).encode() + b"\n"))
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as lines:
        acknowledged = [json.loads(line) for line in lines]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    return acknowledged


def before_each_step(react: Callable[[int], None], patch: Callable[[object, str, object], None] = setattr) -> None:
    """Call `react` with the number of each step before it is taken; one thread steps at a time."""
    numbers, one_at_a_time = count(1), threading.RLock()

    def reacting(function):
        def step(*arguments, **options):
            with one_at_a_time:
                react(next(numbers))
                return function(*arguments, **options)

        return step

    for owner, name in STEPS:
        patch(owner, name, reacting(getattr(owner, name)))


def check(folder: Path, acknowledged: list[list]) -> None:
    inserted = {id_ for kind, _, ids in acknowledged if kind == "insert" for id_ in ids}
    checkpoints = [event.step for event in events(folder, "checkpoint")]
    assert {step for kind, step, _ in acknowledged if kind == "checkpoint"} <= set(checkpoints)
    covered = max(checkpoints, default=0)
    store = open_store(folder)
    assert store.status().quarantined == ()
    for kind, step, ids in acknowledged:
        if kind == "draw" and step >= covered:
            again = store.sample(SampleKey("s", step, "policy"), 3, 0)
            assert again.repeated
            assert ids_of(again.batch) == ids
    removed = [row for event in events(folder, "remove") for row in event.row_numbers.tolist()]
    rows = [*store._shard.table.live_rows("policy").tolist(), *removed]
    assert sorted(rows) == list(range(store.next_row)), "the id of each row is its number"
    everything = {str(row) for row in rows}
    assert inserted <= everything
    assert len(everything) - len(inserted) in (0, 4), "an insert without an answer is there as a whole or not at all"
    counters = store.status().sources["policy"]
    assert counters.inserted == counters.live + len(removed) == store.next_row
    assert sum(counters.removed.values()) == len(removed)
    drawn = np.concatenate([[], *(event.row_numbers for event in events(folder, "draw"))])
    assert np.unique(drawn, return_counts=True)[1].max(initial=0) <= 2
    # The insert that had no answer is repeated, and the work goes on.
    audit = audit_buffer(folder.parent, SampleLimits(max_times_sampled=2, max_staleness=None))
    assert audit.findings == ()
    step = len(inserted) // 4
    result = store.insert(numbered(4 * step, 4))
    assert result.accepted + result.present == 4
    assert store.next_row == 4 * step + 4
    assert store.sample(SampleKey("t", 0, "policy"), 3, 0) is not None
    store.close()


def test_a_process_that_dies_before_any_of_its_steps_loses_nothing(tmp_path, monkeypatch):
    """A process that is gone leaves its folder as it was at that moment: so a copy of it stands for each death."""
    folder = tmp_path / "buffer" / "shard-000"
    acknowledged: list[list] = []
    states: list[tuple[Path, list[list]]] = []

    def keep(number: int) -> None:
        if folder.exists():
            states.append((crash(folder, tmp_path / str(number) / folder.name), list(acknowledged)))

    with monkeypatch.context() as patch:
        before_each_step(keep, patch.setattr)
        work(folder, lambda *what: acknowledged.append(list(what)))
    assert {kind for kind, _, _ in acknowledged} == {"insert", "draw", "checkpoint", "rewrite"}
    assert not (folder / "segment-000001.arrows").exists(), "a segment was deleted"
    assert len(states) > 80
    for copy, known in states:
        check(copy, known)


@pytest.mark.parametrize("moment", [5, 40, 75])
def test_a_process_that_really_dies_leaves_nothing_else(tmp_path, moment):
    folder = tmp_path / "buffer" / "shard-000"
    acknowledged = killed_at(moment, folder)
    check(folder, acknowledged)


def test_a_few_kills_at_random_points_lose_nothing_acknowledged(tmp_path):
    check_kills(tmp_path / "b", "batch", kills=4, seed=1)
