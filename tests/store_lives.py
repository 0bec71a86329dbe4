"""Lives of a process that writes to a store as hard as it can and is killed with SIGKILL, and checks after each."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from buffer.settings import BufferSettings
from buffer.store.shard import SampleKey
from buffer.store.store import ReplayStore
from tests.stores import events, live_ids, stored_rows
from tests.trajectories import CONTRACT, ids_of, numbered

CAPACITY, BATCH, DRAWN = 200, 7, 4
MOST_LINES = 60


def settings_of(fsync: str) -> BufferSettings:
    """Small segments, so that sealing, compaction and deletion happen in every life."""
    return BufferSettings(
        capacity=CAPACITY, min_size=1, max_staleness=3, segment_bytes=20_000, compaction_threshold=0.9, fsync=fsync
    )


@dataclass
class Acknowledged:
    """By all lives: rows inserted, the last checkpoint, the draws since then with the ids that they were given."""

    rows: int = 0
    checkpoint: int = 0
    draws: dict[int, list[str]] = field(default_factory=dict)

    def add(self, line: str) -> None:
        """What a writer said."""
        kind, number, *ids = line.split()
        match kind:
            case "inserted":
                self.rows = int(number)
            case "drew":
                self.draws[int(number)] = ids
            case _:
                self.checkpoint = int(number)
                self.draws = {step: drawn for step, drawn in self.draws.items() if step >= self.checkpoint}


def write(folder: Path, fsync: str, tell: Callable[[str], None]) -> None:
    """Insert, draw, compact and checkpoint without an end."""
    store = ReplayStore(folder, CONTRACT, settings_of(fsync), seed=0)
    while True:
        first = store.next_row
        version = first // 100
        store.insert(numbered(first, BATCH, version=version))
        tell(f"inserted {first + BATCH}")
        if first % 3 == 0:
            drawn = store.sample(SampleKey("s", first, "policy"), DRAWN, version)
            assert drawn is not None
            tell(f"drew {first} {' '.join(ids_of(drawn.batch))}")
        if first % 13 == 0:
            tell(f"checkpoint {first}")  # before: the learner has it, whether or not the store hears of it
            store.checkpointed("s", first)
        if (plan := store.maintenance.plan()) is not None:
            store.maintenance.finish(plan.run())


def live(folder: Path, fsync: str, num_lines: int, acknowledged: Acknowledged) -> None:
    """One life, which ends when it has said so many lines or a few more."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            write(folder, fsync, lambda line: os.write(send, f"{line}\n".encode()))
        finally:
            os._exit(1)  # only after an error: nothing else ends it
    os.close(send)
    with os.fdopen(receive) as lines:
        for _ in range(num_lines):
            line = lines.readline()
            assert line, "the writer died by itself"
            acknowledged.add(line)
        os.kill(child, signal.SIGKILL)
        for line in lines:  # it said more before the signal reached it
            if line.endswith("\n"):
                acknowledged.add(line)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def check_kills(folder: Path, fsync: str, kills: int, seed: int) -> None:
    """Kill a writer so often; after each: nothing acknowledged is lost, nothing is there twice, each draw that no
    checkpoint covers is repeated."""
    generator, acknowledged, repeated = np.random.default_rng(seed), Acknowledged(), 0
    for _ in range(kills):
        before = acknowledged.rows
        # Not a time: how much is written in one depends on the machine.
        live(folder, fsync, int(generator.integers(1, MOST_LINES)), acknowledged)
        assert acknowledged.rows > before
        store = ReplayStore(folder, CONTRACT, settings_of(fsync), seed=0)
        for step, ids in acknowledged.draws.items():
            again = store.sample(SampleKey("s", step, "policy"), DRAWN, store.newest_version + 100)
            assert again is not None
            assert (again.repeated, ids_of(again.batch)) == (True, ids)
            repeated += 1
        assert acknowledged.rows <= store.next_row <= acknowledged.rows + BATCH, "at most one insert had no answer"
        live_rows = sorted(map(int, live_ids(store)))
        assert live_rows == list(range(live_rows[0], store.next_row)), "the newest rows, without a gap, each once"
        counters = store.status().sources["policy"]
        assert counters.inserted == store.next_row == counters.live + sum(counters.removed.values())
        deleted = [row for event in events(folder, "delete") for row in event.row_numbers.tolist()]
        assert sorted([*stored_rows(folder), *deleted]) == list(range(store.next_row))
        store.close()
    assert repeated >= kills // 2, "the writer draws too seldom"
