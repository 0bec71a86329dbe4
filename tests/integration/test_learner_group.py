"""A call on all ranks, with Ray tasks in place of learners: it ends with the first failure, and names its cause."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import ray

from buffer.processes import NoAnswerError, RemoteCall
from launch.run.learner_group import LearnerCall, LearnerFailedError
from learner.ranks import RankLostError
from tests.integration.local_ray import local_ray

TIMEOUT_S = 60.0
NAMES = ["learner rank 0 of 2", "learner rank 1 of 2"]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_ray(num_cpus=4):
        yield


@ray.remote(num_cpus=0, max_retries=0)
def rank(answer: object, error: Exception | None, seconds: float, dies: bool = False) -> object:
    """Gives `answer`, raises `error` or dies, after a while."""
    time.sleep(seconds)
    if dies:
        import os

        os._exit(1)
    if error is not None:
        raise error
    return answer


def outcome(*references: ray.ObjectRef) -> object:
    return learner_call(*references).wait(TIMEOUT_S, while_waiting=lambda: None)


def learner_call(*references: ray.ObjectRef) -> LearnerCall:
    return LearnerCall([RemoteCall(name, each, "begin") for name, each in zip(NAMES, references, strict=True)])


def test_the_result_is_that_of_rank_0_once_all_have_finished() -> None:
    call = learner_call(rank.remote("first", None, 0.0), rank.remote(None, None, 2.0))
    started = time.monotonic()
    assert call.wait(TIMEOUT_S, while_waiting=lambda: None) == "first"
    assert time.monotonic() - started > 1.0
    assert call.wait(0.0, while_waiting=lambda: None) == "first", "asking again changes nothing"


def test_a_failure_is_told_though_the_others_still_work() -> None:
    slow = rank.remote(None, None, 300.0)
    with pytest.raises(LearnerFailedError, match=r"^learner rank 1 of 2 failed: ValueError: no such token$") as caught:
        outcome(slow, rank.remote(None, ValueError("no such token"), 0.0))
    assert isinstance(caught.value.cause, ValueError)
    with pytest.raises(NoAnswerError, match=r"^learner rank 0 of 2 did not begin within 0\.5 s$"):
        learner_call(slow, rank.remote(None, None, 0.0)).wait(0.5, while_waiting=lambda: None)
    ray.cancel(slow, force=True)


def test_who_only_lost_the_others_is_not_the_cause() -> None:
    lost = rank.remote(None, RankLostError("lost the others"), 0.0)
    with pytest.raises(LearnerFailedError, match=r"^learner rank 1 of 2 failed: OSError: no space"):
        outcome(lost, rank.remote(None, OSError("no space"), 2.0))
    lost = rank.remote(None, RankLostError("lost the others"), 0.0)
    with pytest.raises(LearnerFailedError, match=r"^learner rank 1 of 2 died: ") as caught:
        outcome(lost, rank.remote(None, None, 2.0, dies=True))
    assert caught.value.cause is None


def test_where_nobody_knows_more_the_loss_itself_is_told() -> None:
    losses = [rank.remote(None, RankLostError(f"rank {number} is alone"), 0.0) for number in range(2)]
    with pytest.raises(LearnerFailedError, match=r"^learner rank 0 of 2 failed: RankLostError: rank 0 is alone$"):
        outcome(*losses)
