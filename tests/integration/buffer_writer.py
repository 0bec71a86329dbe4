"""A process that writes to a shard as hard as it can: `python -m tests.integration.buffer_writer FOLDER NUM_INSERTS`.

Row n has the id str(n), and its contents follow from n, so that whoever reads a row knows what it should be. The number
of acknowledged rows stands in FOLDER.acknowledged. Sealing and compaction happen every few inserts.
"""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

from buffer.store.shard import SampleKey
from tests.stores import open_store
from tests.trajectories import batch_of, expert_row, row

MAX_TIMES_SAMPLED, MAX_STALENESS, CAPACITY = 3, 2, 60


def acknowledged_file(folder: Path) -> Path:
    """Where the writer says how many rows it was acknowledged."""
    return folder.with_name(folder.name + ".acknowledged")


def expected_actions(number: int) -> list[int]:
    """What row `number` holds."""
    return [3 + number % 29] * (1 + number % 11)


def numbered_row(number: int, version: int) -> dict[str, object]:
    """Row `number`; every fifth is an expert's."""
    actions = expected_actions(number)
    if number % 5 == 0:
        return expert_row(str(number), actions, finish_reason="max_actions")
    return row(str(number), actions, policy_version=[version] * len(actions))


def main(folder: Path, num_inserts: int) -> None:
    """Write, draw and tidy up."""
    store = open_store(
        folder,
        capacity=CAPACITY,
        max_times_sampled=MAX_TIMES_SAMPLED,
        max_staleness=MAX_STALENESS,
        segment_bytes=12_000,
        compaction_threshold=0.9,
        fsync="none",
    )
    acknowledged = os.open(acknowledged_file(folder), os.O_CREAT | os.O_WRONLY)
    compactions = 0
    for step in range(num_inserts):
        version = step // 20
        numbers = range(store.next_row, store.next_row + 1 + step % 4)
        assert store.insert(batch_of([numbered_row(number, version) for number in numbers])).accepted == len(numbers)
        os.pwrite(acknowledged, struct.pack("<q", store.next_row), 0)
        for source in ("policy", "expert"):
            store.sample(SampleKey("stage", step, source), 3, version)
        if step % 7 == 0:
            store.checkpointed("stage", step + 1)
        if (plan := store.maintenance.plan()) is not None:
            store.maintenance.finish(plan.run())
            compactions += 1
    store.close()
    print(compactions)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
