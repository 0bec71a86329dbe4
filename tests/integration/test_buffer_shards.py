"""Two shards as Ray actors that Ray restarts: writers and a learner go on through kill -9, and nothing is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import ray
from pyarrow import flight

from buffer.processes import JOB_SIGNALS, ProcessLostError
from buffer.service.client import BufferClient, BufferLostError
from buffer.service.service import ReplayBufferService
from buffer.service.shard import shard_folder, shard_settings
from buffer.settings import BufferSettings
from buffer.store.store import ReplayStore
from launch.errors import UserError
from launch.run.buffer_shards import STATUS_TIMEOUT_S, ShardWatch, check_buffer, find_buffer, start_buffer
from launch.run_folder.folder import TOKEN_FILE, TOKEN_VARIABLE
from learner.batches import BufferSource, StopRequestedError
from tests.integration.local_ray import local_ray
from tests.processes import wait_until
from tests.trajectories import CONTRACT, fresh_key, ids_of, numbered

START_TIMEOUT_S = 240.0
TIMEOUT_S = 60.0
LOST = r"shard 1 of the replay buffer could not start: .*catalog.*; the rows that it accepted are on disk: resume"


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_ray(num_cpus=2):
        yield


def settings_of(**changes):
    return BufferSettings(**{"shards": 2, "capacity": 100_000, "min_size": 1, **changes})


@pytest.fixture
def start(tmp_path):
    """Starts the buffer of a run in `tmp_path`; ended with the test."""
    running = []

    def start_shards(**changes):
        buffer = start_buffer(tmp_path / "buffer", CONTRACT, settings_of(**changes), seed=0)
        running.append(buffer)
        assert buffer.newest_version(TIMEOUT_S, lambda: None) == -1 or len(running) > 1
        return buffer

    yield start_shards
    for buffer in running:
        buffer.close()


def statuses(buffer, watch=None, lines=None):
    """Of every shard; waits for one that is being restarted. lines: takes what `watch` says meanwhile."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        status = buffer.status(STATUS_TIMEOUT_S)
        if watch is not None:
            lines += watch.look(status)
        if None not in status.shards:
            return status
        assert time.monotonic() < deadline, f"a shard did not come back within {TIMEOUT_S:.0f} s"


def kill(buffer, index):
    os.kill(statuses(buffer).shards[index].pid, signal.SIGKILL)


def source_of(shards, timeout_s=TIMEOUT_S, stop=lambda: False):
    return BufferSource(BufferClient(shards), "s", "policy", timeout_s, newest_version=lambda: 0, stop_requested=stop)


def writer_of(shards, number=0, **changes):
    return BufferClient(shards, first=number, **changes)


def stored_ids(folder, index):
    """Ids of all rows of a shard, read from its segment files after it has ended."""
    store = ReplayStore(shard_folder(folder, index), CONTRACT, shard_settings(settings_of(), index), seed=0)
    drawn = store.sample(fresh_key(), store.num_live("policy"), store.newest_version)
    store.close()
    return ids_of(drawn.batch)


def test_writers_take_turns_and_draws_are_in_proportion(start):
    buffer = start()
    writer = writer_of(buffer.shards)
    for first in range(0, 60, 10):
        writer.insert(numbered(first, 10))
    writer.settle()
    assert (writer.accepted, writer.rejected, writer.bytes_in_flight) == (60, 0, 0)
    assert [shard.store.sources["policy"].live for shard in statuses(buffer).shards] == [30, 30]
    other = writer_of(buffer.shards[1:])
    other.insert(numbered(100, 60))
    other.settle()
    source = source_of(buffer.shards)
    batch = source.sample(12)
    assert Counter(int(id_) >= 10 and (int(id_) >= 100 or int(id_) // 10 % 2 == 1) for id_ in ids_of(batch)) == {
        False: 3,
        True: 9,
    }
    assert len(source.staleness) == 12
    source.seek(0, first_version=0)
    assert source.sample(12).equals(batch)
    assert statuses(buffer).sources["policy"].sampled == 12
    assert [shard.handle for shard in find_buffer(2).shards] == [shard.handle for shard in buffer.shards]
    assert find_buffer(3) is None


def test_rows_travel_both_ways_and_a_draw_waits_in_the_shard(start):
    buffer = start(shards=1)
    writer = writer_of(buffer.shards)
    batch = numbered(0, 300)
    with ThreadPoolExecutor(1) as threads:
        drawing = threads.submit(source_of(buffer.shards).sample, 400)
        writer.insert(batch)
        writer.settle()
        wait_until(lambda: statuses(buffer).waiting_samples == 1, TIMEOUT_S, "the draw to wait")
        writer.insert(numbered(300, 400).slice(0, 100))
        drawn = drawing.result(timeout=TIMEOUT_S)
    assert sorted(map(int, ids_of(drawn))) == list(range(400))
    assert drawn.schema.equals(batch.schema, check_metadata=True)
    rows = {row["id"]: row for row in batch.to_pylist()}
    assert all(rows[row["id"]] == row for row in drawn.to_pylist() if row["id"] in rows)
    writer.insert(numbered(0, 1).replace_schema_metadata(None))
    with pytest.raises(ValueError, match="schema version none"):
        writer.settle()


def test_signals_of_a_job_system_do_not_end_a_shard(start):
    """They reach all processes of a job at once; the driver alone stops the run."""
    buffer = start(shards=1)
    pid = statuses(buffer).shards[0].pid
    status = Path(f"/proc/{pid}/status").read_text()
    (ignored,) = (int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigIgn"))
    assert {number for number in JOB_SIGNALS if ignored >> (number - 1) & 1} == {*JOB_SIGNALS}
    for number in JOB_SIGNALS:
        os.kill(pid, number)
    writer = writer_of(buffer.shards)
    writer.insert(numbered(0, 10))
    writer.settle()
    assert writer.accepted == 10
    assert statuses(buffer).shards[0].pid == pid


def test_a_slice_travels_without_what_it_was_cut_from(start):
    buffer = start(shards=1)
    parent = numbered(0, 3_000)
    writer = writer_of(buffer.shards, max_bytes_in_flight=2**20)
    received = ray.remote(lambda batch: batch.get_total_buffer_size()).options(num_cpus=0)
    for first in range(0, 100, 10):
        writer.insert(parent.slice(first, 10))
        assert writer.bytes_in_flight < parent.nbytes // 2
    assert ray.get(received.remote(parent.slice(0, 10)), timeout=TIMEOUT_S) > parent.nbytes // 2, "it would"
    writer.settle()
    assert statuses(buffer).sources["policy"].live == 100


def test_bytes_in_flight_are_bounded_while_a_shard_is_silent(start):
    """A shard that is stopped answers nothing: the writer waits instead of sending more."""
    buffer = start(shards=1)
    pid = statuses(buffer).shards[0].pid
    batch = numbered(0, 100)
    writer = writer_of(buffer.shards, max_bytes_in_flight=int(2.5 * batch.nbytes))
    os.kill(pid, signal.SIGSTOP)
    try:
        for first in (0, 100):
            writer.insert(numbered(first, 100))
        sending = threading.Thread(target=writer.insert, args=(numbered(200, 100),), daemon=True)
        sending.start()
        sending.join(timeout=1.0)
        assert sending.is_alive(), "the third batch waits"
        assert writer.bytes_in_flight <= 2.5 * batch.nbytes
    finally:
        os.kill(pid, signal.SIGCONT)
    sending.join(timeout=TIMEOUT_S)
    writer.settle()
    assert writer.accepted == 300


def test_shards_that_pause_are_passed_over_and_all_of_them_hold_the_writer_back(start):
    buffer = start(samples_per_insert_tolerance=16)  # 8 rows ahead in each shard
    writer = writer_of(buffer.shards)

    def live_after(first, count):
        writer.insert(numbered(first, count))
        writer.settle()
        return [shard.store.sources["policy"].live for shard in statuses(buffer).shards]

    assert live_after(0, 10) == [10, 0]
    assert live_after(10, 3) == [10, 3]
    assert live_after(20, 3) == [10, 6], "shard 0 has asked for a pause"
    assert not writer.throttled()
    assert live_after(30, 4) == [10, 10]
    assert writer.throttled()
    assert sum(live_after(40, 2)) == 22, "what is finished has to go somewhere"
    source_of(buffer.shards).sample(14)
    wait_until(lambda: not writer.throttled(), TIMEOUT_S, "the draw to lift the pause")


@ray.remote(num_cpus=0)
class Writer:
    """Inserts numbered rows until told to stop; knows which of them were acknowledged."""

    def __init__(self, shards, number):
        self._writer = writer_of(shards, number)
        self._first = number * 10_000_000
        self._sent = 0
        self._stop = threading.Event()

    def run(self):
        while not self._stop.is_set():
            self._writer.insert(numbered(self._first + self._sent, 7))
            self._sent += 7
            self._writer.throttled()
            time.sleep(0.002)
        self._writer.settle()
        return self._first, self._sent, self._writer.accepted, self._writer.rejected

    def stop(self):
        self._stop.set()

    def accepted(self):
        return self._writer.accepted


def test_a_shard_that_is_killed_twice_comes_back_and_nothing_is_lost_or_doubled(start, tmp_path):
    buffer = start()
    make = Writer.options(max_concurrency=3)
    writers = [make.remote(buffer.shards, number) for number in range(2)]
    ray.get([writer.accepted.remote() for writer in writers], timeout=START_TIMEOUT_S)  # a busy machine starts slowly
    running = [writer.run.remote() for writer in writers]
    source = source_of(buffer.shards)
    lines, drawn = [], []
    watch = ShardWatch(buffer.shards, health_timeout_s=TIMEOUT_S)
    statuses(buffer, watch, lines)

    def sample_some(seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            drawn.append(source.sample(8))

    sample_some(0.5)
    for _ in range(2):
        before = ray.get([writer.accepted.remote() for writer in writers], timeout=TIMEOUT_S)
        kill(buffer, 1)
        sample_some(0.5)
        status = statuses(buffer, watch, lines)
        sample_some(0.5)
        after = ray.get([writer.accepted.remote() for writer in writers], timeout=TIMEOUT_S)
        assert all(now > then for now, then in zip(after, before, strict=True)), "both writers went on"
    for writer in writers:
        ray.get(writer.stop.remote(), timeout=TIMEOUT_S)
    ends = ray.get(running, timeout=TIMEOUT_S)
    assert all(accepted == sent and rejected == 0 for _, sent, accepted, rejected in ends), ends
    assert len(lines) == 2
    assert all("shard 1 of the replay buffer died" in line and "restarted from its segments" in line for line in lines)
    # Every draw, asked for again, is what it was.
    source.seek(0, first_version=0)
    for step, batch in enumerate(drawn):
        assert len(set(ids_of(batch))) == 8
        assert source.sample(8).equals(batch), step
    status = statuses(buffer)
    assert status.sources["policy"].inserted == sum(sent for _, sent, _, _ in ends)
    buffer.close()
    ids = stored_ids(tmp_path / "buffer", 0) + stored_ids(tmp_path / "buffer", 1)
    assert len(ids) == len(set(ids)), "no id twice"
    assert set(map(int, ids)) == {first + number for first, sent, _, _ in ends for number in range(sent)}


def test_a_shard_that_cannot_come_back_is_named(start, tmp_path):
    """Its folder is taken away under it: the process that Ray starts next refuses."""
    buffer = start()
    writer = writer_of(buffer.shards[1:])
    writer.insert(numbered(0, 10))
    writer.settle()
    (shard_folder(tmp_path / "buffer", 1) / "catalog.db").unlink()
    kill(buffer, 1)
    with pytest.raises(ProcessLostError, match=r"shard 1 of the replay buffer could not start: .*catalog"):
        statuses(buffer)
    with pytest.raises(BufferLostError, match=LOST):
        source_of(buffer.shards).sample(4)
    writer.insert(numbered(10, 10))
    with pytest.raises(BufferLostError, match=LOST):
        writer.settle()
    buffer.close()
    with pytest.raises(UserError, match="catalog"):
        check_buffer(tmp_path / "buffer", CONTRACT, settings_of())


def test_a_shard_that_hangs_is_ended_and_comes_back_with_its_rows(start):
    buffer = start()
    writer = writer_of(buffer.shards)
    for first in (0, 20):
        writer.insert(numbered(first, 20))
    writer.settle()
    lines = []
    watch = ShardWatch(buffer.shards, health_timeout_s=4.0)
    pid = statuses(buffer, watch, lines).shards[1].pid
    os.kill(pid, signal.SIGSTOP)
    for first in (40, 60):
        writer.insert(numbered(first, 20))
    status = statuses(buffer, watch, lines)
    writer.settle()
    silence, death = lines
    assert silence.startswith("shard 1 of the replay buffer was silent for 4 s (buffer.health_timeout_s)")
    assert f"died (process {pid}) and was restarted from its segments" in death
    assert status.shards[1].pid != pid
    assert statuses(buffer).sources["policy"].inserted == 80, "what it was sent while it hung, too, and once"


def test_priorities_reach_the_shard_of_each_row(start):
    buffer = start(sampler="prioritized", priority_exponent=1.0)
    writer = writer_of(buffer.shards)
    for first in range(0, 100, 25):
        writer.insert(numbered(first, 25))
    writer.settle()
    source = source_of(buffer.shards)
    ids = ids_of(source.sample(100))
    wanted = {"3", "30", "33", "70"}  # two of each shard
    source.report_priorities(np.where(np.isin(ids, list(wanted)), 1.0, 0.0).astype(np.float32))
    assert set(ids_of(source.sample(4))) == wanted


def test_live_rows_over_flight_also_after_a_kill_and_not_after_the_end(start, tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    buffer = start(flight={"enabled": True})
    writer = writer_of(buffer.shards)
    for first in range(0, 40, 10):
        writer.insert(numbered(first, 10))
    writer.settle()
    token = (tmp_path / TOKEN_FILE).read_text()
    call = flight.FlightCallOptions(timeout=TIMEOUT_S, headers=[(b"authorization", f"Bearer {token}".encode())])

    def fetched(location):
        with flight.connect(location) as client:
            return ids_of(client.do_get(flight.Ticket(b"policy"), call).read_all())

    before = [shard.flight for shard in statuses(buffer).shards]
    assert [list(map(int, fetched(location))) for location in before] == [
        [*range(10), *range(20, 30)],
        [*range(10, 20), *range(30, 40)],
    ]
    kill(buffer, 0)
    after = [shard.flight for shard in statuses(buffer).shards]
    assert len(fetched(after[0])) == len(fetched(after[1])) == 20
    assert before[1] == after[1]
    buffer.close()
    for location in after:
        with pytest.raises(flight.FlightUnavailableError):
            fetched(location)


def test_fewer_shards_than_before_are_refused(start, tmp_path):
    start().close()
    with pytest.raises(UserError, match=r"has 2 shards and buffer.shards is 1: .* resume with buffer.shards=2"):
        check_buffer(tmp_path / "buffer", CONTRACT, settings_of(shards=1))


def test_a_stop_ends_a_draw_that_waits(start):
    buffer = start()
    asked = threading.Event()
    timer = threading.Timer(0.3, asked.set)
    timer.start()
    with pytest.raises(StopRequestedError):
        source_of(buffer.shards, stop=asked.is_set).sample(4)
    with pytest.raises(TimeoutError, match="from 2 shards: shard 0: 0 are live"):
        source_of(buffer.shards, timeout_s=0.2).sample(4)
    with pytest.raises(TimeoutError, match="0 are live and 4 are needed"):
        source_of(buffer.shards[:1], timeout_s=0.2).sample(4)


def test_a_run_folder_that_a_node_does_not_see_is_refused(tmp_path):
    handle = ray.remote(ReplayBufferService).remote(
        str(tmp_path / "elsewhere" / "buffer" / "shard-000"), CONTRACT, settings_of(), 0
    )
    with pytest.raises(ray.exceptions.RayActorError, match="does not exist on this node"):
        ray.get(handle.status.remote(), timeout=TIMEOUT_S)
