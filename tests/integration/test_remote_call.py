"""What a call to another process gives: its value, its own error, or who is silent or dead."""

from __future__ import annotations

import asyncio
import os
import pickle
import time
from collections.abc import Iterator

import pytest
import ray
from ray.actor import ActorHandle

from buffer.processes import NoAnswerError, ProcessLostError, RemoteCall, end_actor
from tests.integration.local_ray import local_ray

TIMEOUT_S = 60.0


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_ray(num_cpus=2):
        yield


@ray.remote(num_cpus=0)
class Process:
    def __init__(self, refuses=False):
        if refuses:
            raise ValueError("no such folder")

    def answer(self):
        return 7

    def fail(self, error):
        raise error

    def sleep(self):
        time.sleep(10 * TIMEOUT_S)

    def die(self):
        os._exit(1)


def blocking(call, timeout_s=TIMEOUT_S):
    return call.result(timeout_s)


def polling(call, timeout_s=TIMEOUT_S):
    return call.result(timeout_s, while_waiting=lambda: None)


def awaiting(call, timeout_s=TIMEOUT_S):
    return asyncio.run(call.answer(timeout_s))


each_way = pytest.mark.parametrize("get", [blocking, polling, awaiting])


@pytest.fixture
def process():
    handle = Process.remote()
    yield handle
    ray.kill(handle)


@each_way
def test_a_call_gives_its_value_or_its_own_error(process, get):
    assert get(RemoteCall[int]("the process", process.answer.remote())) == 7
    for error in (ValueError("as it says"), TimeoutError("a wait of its own"), ray.exceptions.GetTimeoutError("own")):
        with pytest.raises(type(error)) as caught:
            get(RemoteCall[int]("the process", process.fail.remote(error)))
        assert type(caught.value.cause) is type(error)
        assert str(caught.value.cause) == str(error)


@each_way
def test_who_is_silent_is_named(process, get):
    with pytest.raises(NoAnswerError, match=r"^the process did not take the batch within 0\.3 s$"):
        get(RemoteCall[None]("the process", process.sleep.remote(), task="take the batch"), timeout_s=0.3)


@each_way
def test_who_died_is_named(process, get):
    with pytest.raises(ProcessLostError, match=r"^the process died: "):
        get(RemoteCall[None]("the process", process.die.remote()))
    refusing = Process.remote(refuses=True)
    with pytest.raises(ProcessLostError, match=r"^the other could not start: ValueError: no such folder$") as caught:
        get(RemoteCall[int]("the other", refusing.answer.remote()))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value), "it passes between processes"


def test_a_wait_asks_for_something_to_do_meanwhile(process):
    calls = []
    call = RemoteCall[None]("the process", process.sleep.remote())
    assert not call.done()
    with pytest.raises(NoAnswerError):
        call.result(1.0, while_waiting=lambda: calls.append(1))
    assert calls


def wait_for_the_end(actor: ActorHandle) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        RemoteCall[int]("it", actor.answer.remote()).result(TIMEOUT_S)


def test_an_actor_is_killed_after_its_last_answer_or_without_it():
    ends = {"answer": None, "fail": "it did not end by itself: no", "sleep": "it did not stop within 0.5 s"}
    for method, line in ends.items():
        actor = Process.remote()
        reference = getattr(actor, method).remote(*([ValueError("no")] if method == "fail" else []))
        assert end_actor(actor, RemoteCall("it", reference, "stop"), TIMEOUT_S if method != "sleep" else 0.5) == line
        with pytest.raises(ProcessLostError):  # Ray may take a moment to kill it
            wait_for_the_end(actor)
