"""Weights between real processes over gloo: takers that come at once, late or for what is gone, that stop and die."""

from __future__ import annotations

import gc
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import psutil
import pytest
import torch

from buffer.collective import receiver
from buffer.collective.buckets import BucketedTensors
from buffer.collective.handle import OfferedWeights
from buffer.collective.receiver import CollectiveReceiver
from buffer.collective.sender import MAX_TRANSFERS, CollectiveSender
from buffer.weights import PayloadDigests, WeightManifest, WeightsReplacedError, verify_fingerprint
from tests.integration.collective_taker import Order, Taker

WAIT_S = 60.0
NEVER_S = 600.0
"""A time-out that no test lives to see: what goes on meanwhile does not wait for it."""
NUM_BUCKETS = 3
SMALL_BYTES = 2**10
LARGE_BYTES = 16 * 2**20  # more than sockets hold, so that a sender notices who does not read


class Source:
    """A sender and what it published."""

    def __init__(self, stall_timeout_s: float = NEVER_S) -> None:
        self.sender = CollectiveSender("127.0.0.1", torch.device("cpu"), stall_timeout_s)
        self.version = -1
        self.buckets: dict[int, list[weakref.ref[torch.Tensor]]] = {}
        self._kept = BucketedTensors((), ())

    def keep(self, tensors: dict[str, torch.Tensor]) -> None:
        self._kept, _ = self.sender.pack(tensors.items())
        self.sender.keep(self._kept)

    def publish(self, num_buckets: int = NUM_BUCKETS, bucket_bytes: int = SMALL_BYTES) -> Order:
        """Each time with other numbers."""
        self.version += 1
        generator = torch.Generator().manual_seed(self.version)
        tensors = {
            f"layer.{index}": torch.randint(
                0, 256, (bucket_bytes // 128, 128), dtype=torch.uint8, generator=generator
            ).view(torch.bfloat16)
            for index in range(num_buckets)
        }
        # One bucket holds one of these.
        packed = BucketedTensors.copy_of(tensors.items(), bucket_bytes=bucket_bytes)
        ours, _ = self.sender.pack(())  # as the publisher calls it, before it offers
        assert not ours
        self.buckets[self.version] = [weakref.ref(bucket) for bucket in packed.buckets]
        digests = PayloadDigests.of(self._kept.entries, self._kept) | PayloadDigests.of(packed.entries, packed)
        entries = (*self._kept.entries, *packed.entries)
        manifest = WeightManifest(self.version, digests.fingerprint, entries, (), (), checksum=digests.checksum)
        return Order(self.sender.offer(packed), manifest)

    def num_alive(self, version: int) -> int:
        """Buckets of a publication that are still in memory."""
        gc.collect()
        return sum(bucket() is not None for bucket in self.buckets[version])


@pytest.fixture(scope="module")
def takers() -> Iterator[list[Taker]]:
    with Taker() as first, Taker() as second, Taker() as third:
        yield [first, second, third]


@pytest.fixture
def source() -> Iterator[Source]:
    made = Source()
    yield made
    made.sender.close()
    wait_until(lambda: not transfers(), "the sender's threads to end")


def transfers() -> list[threading.Thread]:
    """Of the senders in this process, threads that speak with a taker."""
    return [thread for thread in threading.enumerate() if thread.name == "weights-send"]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {WAIT_S:.0f} s for {what}"
        time.sleep(0.05)


def wait_until_stopped(taker: Taker) -> psutil.Process:
    process = psutil.Process(taker.process.pid)
    wait_until(lambda: process.status() == psutil.STATUS_STOPPED, "the taker to stop itself")
    return process


def test_takers_at_once_and_a_late_one_get_the_newest_and_leave_nothing(source: Source, takers: list[Taker]) -> None:
    for _ in range(2):
        order = source.publish()
        for taker in takers:
            taker.take(order)
        assert [taker.answer() for taker in takers] == [(NUM_BUCKETS, "right")] * 3
    wait_until(lambda: not transfers(), "the transfers to end")
    process = psutil.Process()
    files, threads = process.num_fds(), process.num_threads()
    for _ in range(3):
        takers[0].take(order)
        assert takers[0].answer() == (NUM_BUCKETS, "right")
    wait_until(lambda: not transfers(), "the transfers to end")
    gc.collect()
    assert process.num_fds() <= files
    assert process.num_threads() <= threads
    source.publish()
    late = source.publish()
    takers[2].take(late)
    assert takers[2].answer() == (NUM_BUCKETS, "right")
    # The newest, and the one before it until the next is made.
    assert [source.num_alive(version) for version in range(4)] == [0, 0, NUM_BUCKETS, NUM_BUCKETS]


def test_what_is_kept_travels_once_and_is_always_checked(source: Source, takers: list[Taker]) -> None:
    source.keep({"frozen.a": torch.arange(10), "frozen.b": torch.ones(3, dtype=torch.bool)})
    for taker, counts in ((takers[0], [2, 1]), (takers[1], [2])):
        for count in counts:
            taker.take(source.publish(num_buckets=1))
            assert taker.answer() == (count, "right")
    source.keep({"frozen.a": torch.arange(11)})
    order = source.publish(num_buckets=1)
    for taker in takers:
        taker.take(order)
        assert taker.answer() == (2, "right")


def test_a_replaced_publication_is_an_error_and_never_other_bytes(source: Source, takers: list[Taker]) -> None:
    first = source.publish()
    second = source.publish()
    takers[0].take(first)
    assert takers[0].answer() == (0, "WeightsReplacedError: these weights were replaced by newer ones")
    takers[0].take(second)
    assert takers[0].answer() == (NUM_BUCKETS, "right")


def test_no_stranger_gets_weights(source: Source) -> None:
    order = source.publish(num_buckets=1)
    handle = order.handle
    assert handle.token.hex() not in repr(handle)
    with pytest.raises(ConnectionError, match=rf"127.0.0.1:{handle.port} did not come: the other end closed"):
        CollectiveReceiver().take(replace(handle, token=bytes(32)))
    listening = [each.laddr.ip for each in psutil.Process().net_connections() if each.status == "LISTEN"]
    assert set(listening) == {"127.0.0.1"}
    # One that says nothing holds up nobody.
    with socket.create_connection((handle.host, handle.port)):
        verify_fingerprint(CollectiveReceiver().take(handle), order.manifest)


def test_a_taker_that_is_killed_in_the_middle_frees_its_place(source: Source, takers: list[Taker]) -> None:
    order = source.publish(bucket_bytes=LARGE_BYTES)
    with Taker() as doomed:
        doomed.take(replace(order, signal_at=(1, signal.SIGKILL)))
        with pytest.raises(EOFError):
            doomed.answer()
    wait_until(lambda: not transfers(), "the transfer to the dead taker to end, long before its time-out")
    takers[0].take(order)
    assert takers[0].answer() == (NUM_BUCKETS, "right")


def test_a_stopped_taker_holds_up_neither_the_sender_nor_others(source: Source, takers: list[Taker]) -> None:
    first = source.publish(bucket_bytes=LARGE_BYTES)
    with Taker() as stopped:
        stopped.take(replace(first, signal_at=(1, signal.SIGSTOP)))
        process = wait_until_stopped(stopped)
        takers[0].take(first)
        assert takers[0].answer() == (NUM_BUCKETS, "right")
        wait_until(lambda: len(transfers()) == 1, "the sender to notice that the first taker has all")
        second = source.publish()
        assert source.num_alive(0) == NUM_BUCKETS, "the one before the newest is still being sent"
        third = source.publish()
        assert source.num_alive(0) == 1, "of what is older the bucket on its way alone is left"
        takers[0].take(third)
        assert takers[0].answer() == (NUM_BUCKETS, "right")
        assert process.status() == psutil.STATUS_STOPPED
        wait_until(lambda: len(transfers()) == 1, "that of the stopped one alone to go on")
        process.resume()
        assert stopped.answer() == (2, "WeightsReplacedError: these weights were replaced by newer ones")
        stopped.take(second)
        assert stopped.answer()[1].startswith("WeightsReplacedError")
        stopped.take(third)
        assert stopped.answer() == (NUM_BUCKETS, "right")
    wait_until(lambda: source.num_alive(0) == 0, "the withdrawn bucket to be freed")


def test_a_stopped_taker_is_given_up_after_its_time_out(source: Source) -> None:
    hasty = Source(stall_timeout_s=1.0)
    order = hasty.publish(bucket_bytes=LARGE_BYTES)
    with Taker() as stopped:
        stopped.take(replace(order, signal_at=(0, signal.SIGSTOP)))
        process = wait_until_stopped(stopped)
        wait_until(lambda: not transfers(), "the sender to give it up")
        assert process.status() == psutil.STATUS_STOPPED
        process.resume()
        number, error = stopped.answer()
        assert number == 1
        assert error.startswith("ConnectionError: the learner's weights at 127.0.0.1:")
        # It starts afresh the next time.
        stopped.take(source.publish(bucket_bytes=LARGE_BYTES))
        assert stopped.answer() == (NUM_BUCKETS, "right")
    hasty.sender.close()


def test_takers_wait_for_a_place(source: Source, takers: list[Taker]) -> None:
    order = source.publish(num_buckets=1)
    for _ in range(MAX_TRANSFERS):
        assert source.sender._places.acquire(timeout=WAIT_S)
    takers[0].take(order)
    wait_until(lambda: len(transfers()) == 1, "the taker to ask")
    source.sender._places.release()
    assert takers[0].answer() == (1, "right")


def test_a_learner_that_cannot_be_reached_or_is_silent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source()
    handle = source.publish(num_buckets=1).handle
    source.sender.close()
    with pytest.raises(ConnectionError, match=rf"no connection to the learner's weights at 127.0.0.1:{handle.port}"):
        CollectiveReceiver().take(handle)
    monkeypatch.setattr(receiver, "HELLO_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TimeoutError, match="silent for 0 s"):
        CollectiveReceiver().take(replace(handle, port=silent.getsockname()[1]))
    # The system drops what comes to a full queue, as a firewall does.
    monkeypatch.setattr(receiver, "CONNECT_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, ExitStack() as queue:
        port = full.getsockname()[1]
        for _ in range(4):
            waiting = queue.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        with pytest.raises(TimeoutError, match=r"no connection within 0 s .* let actors reach all ports"):
            CollectiveReceiver().take(replace(handle, port=port))


def test_weights_of_a_gpu_need_one(source: Source) -> None:
    handle = source.publish(num_buckets=1).handle
    assert isinstance(handle, OfferedWeights)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"this actor has none: .* learner.transport=object_store"):
            CollectiveReceiver().take(replace(handle, backend="nccl"))
    with pytest.raises(WeightsReplacedError):
        CollectiveReceiver().take(replace(handle, changed=replace(handle.changed, number=99)))
