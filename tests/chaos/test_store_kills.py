"""A store that is killed with kill -9 at random moments: what it acknowledged is there, what it drew is drawn again."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from buffer.settings import BufferSettings
from buffer.store.consumption_log import DrawKey
from buffer.store.replay_store import ReplayStore
from tests.stores import draw
from tests.trajectories import CONTRACT, ids_of

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60.0

WRITER = """
import sys
from pathlib import Path
from buffer.store.consumption_log import DrawKey
from buffer.settings import BufferSettings
from buffer.store.replay_store import ReplayStore
from tests.trajectories import CONTRACT, ids_of, numbered

settings = BufferSettings(capacity=200, min_size=1, max_staleness=3, segment_bytes=20_000, fsync=sys.argv[2])
store = ReplayStore(Path(sys.argv[1]), CONTRACT, settings, seed=0)
while True:
    first = store.next_row
    version = first // 100
    store.insert(numbered(first, 7, version=version))
    print("inserted", first + 7, flush=True)
    if first % 3 == 0:
        print("drew", first, *ids_of(store.draw(DrawKey("s", first, "policy"), 4, version).batch), flush=True)
    if first % 13 == 0:
        print("checkpoint", first, flush=True)
        store.checkpointed("s", first)
"""


@pytest.mark.parametrize("fsync", ["batch", "none"])
def test_a_kill_loses_nothing_acknowledged(tmp_path, fsync):
    """Inserts, draws, evictions, sealing and deletion, killed twelve times or more; what was acknowledged is there, and
    draws that no checkpoint covers are repeated.
    """
    generator = np.random.default_rng(0)
    settings = BufferSettings(capacity=200, min_size=1, segment_bytes=20_000)
    acknowledged = checkpoint = repeated = kills = 0
    while kills < 12 or repeated < 12:  # a kill just after a checkpoint leaves no draw to repeat
        assert kills < 100, f"{repeated} draws to repeat after {kills} kills: the writer draws too seldom"
        kills += 1
        log = tmp_path / "acknowledged"
        with log.open("w") as output:
            writer = subprocess.Popen(
                [sys.executable, "-c", WRITER, str(tmp_path / "b"), fsync], stdout=output, cwd=ROOT
            )
            deadline = time.monotonic() + TIMEOUT_S
            num_lines = generator.integers(1, 60)  # not a time: how much is written in one depends on the machine
            while log.read_text().count("\n") < num_lines:
                assert writer.poll() is None, "the writer died by itself"
                assert time.monotonic() < deadline, f"the writer had too few lines after {TIMEOUT_S:.0f} s"
                time.sleep(0.001)
            writer.kill()
            writer.wait(timeout=TIMEOUT_S)
        complete_lines = log.read_text().rsplit("\n", 1)[0].split("\n")
        before, drawn = acknowledged, {}
        for event, number, *ids in map(str.split, complete_lines):
            if event == "inserted":
                acknowledged = int(number)
            elif event == "checkpoint":
                checkpoint = int(number)
            else:
                drawn[DrawKey("s", int(number), "policy")] = ids
        assert acknowledged > before
        store = ReplayStore(tmp_path / "b", CONTRACT, settings, seed=0)
        for key, ids in drawn.items():
            if key.step >= checkpoint:
                again = store.draw(key, 4, store.newest_version + 100)
                assert (again.repeated, ids_of(again.batch)) == (True, ids)
                repeated += 1
        assert acknowledged <= store.next_row <= acknowledged + 7, "at most the insert under way is extra"
        live = sorted(map(int, ids_of(draw(store, store.num_live("policy"), store.newest_version))))
        assert live[-1] == store.next_row - 1
        counters = store.status().sources["policy"]
        assert counters.inserted == store.next_row
        assert live == list(range(live[0], store.next_row)), "the newest rows, without a gap"
        assert counters.live + counters.evicted + counters.dropped_stale == counters.inserted
        store.close()
