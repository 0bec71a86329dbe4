"""Weights on their way from a publisher to the engine of a living actor: pool, actor and buffer are real Ray actors."""

from __future__ import annotations

import copy
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray
import torch
from transformers import PreTrainedModel

from actors.engine.interface import FinishedRollout, SamplingSettings, engine_environment
from actors.pool.controller import PoolStatus
from actors.pool.ray_pool import ActorPool
from actors.rollout_actor import RolloutSpec
from actors.settings import ActorsSettings, RolloutSettings
from buffer.reading.snapshot import read_shard
from buffer.service.client import BufferClient, Shard
from buffer.service.service import ReplayBufferService
from buffer.service.shard import SampleRequest
from buffer.settings import BufferSettings, NoiseSettings
from buffer.store.shard import SampleKey
from buffer.weights import (
    WeightHandle,
    WeightManifest,
    WeightPayload,
    WeightReceiver,
    WeightSender,
    fingerprint,
    pack_tensors,
)
from learner.model.adapters import add_adapters
from learner.publication import WeightPublisher, make_probe, publication_tensors
from learner.settings.model import AdapterSettings
from learner.settings.stages import PublishMode
from learner.state_tree.policy import TreePolicy, sequence_logprobs
from tests.integration.local_ray import local_ray
from tests.integration.reference import compare
from tests.processes import wait_until
from tests.tiny_models import BACKSPACE_ID, CONTRACT, FIRST_TEXT_ID, VOCAB_SIZE, perturbed, tiny_model
from tests.unit.learner.test_adapters import train_a_little

ROOT = Path(__file__).parents[2]
ANSWER_TIMEOUT_S = 60.0
START_TIMEOUT_S = 180.0
ROWS = 24
PROBE = make_probe(CONTRACT, seed=0)
SETTINGS = ActorsSettings(
    count=1,
    max_concurrent=8,
    insert_batch_size=4,
    kv_cache_gib=0.05,
    max_restarts=2,
    rollout=RolloutSettings(max_new_tokens=12, max_actions=24),
)
QUESTIONS = [np.array(ids, dtype=np.int32) for ids in ([250, 9], [251, 10, 11], *([252, 30 + i] for i in range(12)))]
"""More than the engine works on at a time; no prompt of the examples is one of them."""
SAMPLING = SamplingSettings(max_new_tokens=12, max_actions=24)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_ray(num_cpus=4):
        yield


class Push:
    """A pool of one actor, and what the learner would hold of it."""

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        actors: ActorsSettings = SETTINGS,
        mode: PublishMode = "full",
    ) -> None:
        self.folder = folder / "buffer"
        settings = BufferSettings(capacity=100_000, min_size=1, fsync="none")
        service = ray.remote(ReplayBufferService).options(num_cpus=0)
        self.buffer = service.remote(str(self.folder), CONTRACT, settings, 0)
        shards = [Shard(0, self.buffer)]
        self.client = BufferClient(shards)
        generator = np.random.default_rng(0)
        texts = [generator.integers(FIRST_TEXT_ID, VOCAB_SIZE, size).tolist() for size in range(4, 12)]
        examples = pa.table({"prompt_ids": pa.array(texts), "target_ids": pa.array(texts)})
        spec = RolloutSpec(
            config_json=model.config.to_json_string(use_diff=False),
            contract=CONTRACT,
            task="tiny",
            settings=actors,
            noise=NoiseSettings(kind="none", rate=0.0),
            max_length=64,
            questions=QUESTIONS,
        )
        environment = engine_environment() | {"PYTHONPATH": str(ROOT)}
        self.pool = ray.remote(ActorPool).options(num_cpus=0).remote(spec, [ray.put(examples)], shards, environment, 1)
        ray.get(self.pool.start.remote(), timeout=ANSWER_TIMEOUT_S)
        self.publisher = WeightPublisher(self.pool, PROBE, mode=mode)
        self._draws = 0

    def status(self) -> PoolStatus:
        status: PoolStatus = ray.get(self.pool.status.remote(), timeout=ANSWER_TIMEOUT_S)
        return status

    def wait_until(
        self, condition: Callable[[PoolStatus], bool], what: str, timeout_s: float = START_TIMEOUT_S
    ) -> None:
        wait_until(lambda: condition(self.status()), timeout_s, lambda: f"{what}; the pool: {self.status()}")

    def sample(self, count: int, version: int) -> list[dict[str, object]]:
        """`count` rows, drawn anew."""
        self._draws += 1
        key = SampleKey("stage", self._draws, "policy")
        (drawn,) = self.client.sample(SampleRequest(key, count, version), START_TIMEOUT_S)
        assert drawn is not None
        rows: list[dict[str, object]] = drawn.batch.to_pylist()
        return rows

    def rollouts_of(self, version: int, count: int) -> list[FinishedRollout]:
        """`count` rollouts whose last action is of `version`, as the buffer holds them."""
        found: dict[str, dict[str, object]] = {}

        def are_there(status: PoolStatus) -> bool:
            found.update(
                (row["id"], row) for row in self.sample(count, version) if row["policy_version"][-1] == version
            )
            return len(found) >= count

        self.wait_until(are_there, f"rollouts of version {version}")
        return [as_log(row) for row in found.values()]

    def versions_of_all(self) -> list[set[int]]:
        """The versions of each rollout that was ever stored."""
        stored = read_shard(self.folder).stored.column("policy_version").to_pylist()
        return [set(versions) for versions in stored]

    def stop(self) -> None:
        ray.get(self.pool.stop.remote(30.0), timeout=ANSWER_TIMEOUT_S)
        for actor in (self.pool, self.buffer):
            ray.kill(actor)


def as_log(row: dict[str, object]) -> FinishedRollout:
    return FinishedRollout(
        request_id=str(row["id"]),
        prompt_ids=np.array(row["prompt_ids"], dtype=np.int32),
        actions=np.array(row["actions"], dtype=np.int32),
        logprobs=np.array(row["logprobs"], dtype=np.float32),
        policy_version=np.array(row["policy_version"], dtype=np.int32),
        finish_reason=str(row["finish_reason"]),
    )


def assert_explained(logs: list[FinishedRollout], models: dict[int, PreTrainedModel]) -> None:
    """Every action's log-probability is what transformers computes with the weights of the action's version."""
    result = compare(logs, {log.request_id: SAMPLING for log in logs}, models)
    assert not result.errors, result.errors[:3]
    assert result.worst < 1e-4


def actor_processes() -> list[psutil.Process]:
    """The processes of the rollout actors of this test's Ray."""
    return [p for p in psutil.Process().children(recursive=True) if "RolloutActor" in " ".join(p.cmdline())]


@pytest.mark.slow
def test_pushes_reach_the_engine_and_wrong_ones_fence_the_actor(tmp_path: Path) -> None:
    models = {0: tiny_model()}
    for version in (1, 2):
        models[version] = perturbed(models[version - 1], seed=version)
    push = Push(tmp_path, models[0])
    push_good_weights(push, models)
    ask_in_the_middle_of_rollouts(push, models)
    push_wrong_weights(push, models[2])
    push.stop()


@pytest.mark.slow
def test_adapters_travel_alone_to_actors_that_drain_join_late_hang_and_die(tmp_path: Path) -> None:
    """Nothing of that holds up the learner; every actor ends with base and newest adapters, every rollout has one
    version.
    """
    model = tiny_model(tied=True)
    add_adapters(model, AdapterSettings(rank=4, alpha=8.0), base_name="base", revision=None, seed=0)
    actors = SETTINGS.model_copy(update={"weight_update": "drain", "health_timeout_s": 600.0})
    push = Push(tmp_path, model, actors, "adapter")
    models = {}
    for version in range(2):
        models[version] = copy.deepcopy(train_a_little(model, seed=version))
        push.publisher.publish(policy_of(model))
        assert_explained(push.rollouts_of(version, ROWS), models)
    before = {process.pid for process in actor_processes()}
    ray.get(push.pool.scale.remote(2), timeout=ANSWER_TIMEOUT_S)
    push.wait_until(lambda status: versions_of(status) == [1, 1], "the late joiner to have the newest weights")
    (hung,) = (process for process in actor_processes() if process.pid in before)
    os.kill(hung.pid, signal.SIGSTOP)
    started = time.monotonic()
    for version in (2, 3):
        models[version] = copy.deepcopy(train_a_little(model, seed=version))
        push.publisher.publish(policy_of(model))
    assert time.monotonic() - started < 30.0, "the learner waited for an actor"
    push.wait_until(lambda status: 3 in versions_of(status), "the other actor to go on")
    assert hung.status() == psutil.STATUS_STOPPED
    os.kill(hung.pid, signal.SIGKILL)
    push.wait_until(lambda status: versions_of(status) == [3, 3], "the dead actor's successor")
    assert_explained(push.rollouts_of(3, ROWS), models)
    assert not any("WeightMismatchError" in event.message for event in push.status().events)
    assert all(len(versions) == 1 for versions in push.versions_of_all())
    push.stop()


def policy_of(model: PreTrainedModel) -> TreePolicy:
    return TreePolicy(model, BACKSPACE_ID)


def push_good_weights(push: Push, models: dict[int, PreTrainedModel]) -> None:
    """Versions 0 to 3: at birth, in the middle of rollouts, and while the actor hears nothing."""
    push.publisher.publish(policy_of(models[0]))
    first = push.rollouts_of(0, ROWS)
    assert_explained(first, models)
    # Of the first model alone: weights that were moved at random may take back too seldom to count on it.
    assert any((log.actions == BACKSPACE_ID).any() for log in first)
    push.publisher.publish(policy_of(models[1]))
    assert_explained(push.rollouts_of(1, ROWS), models)
    (process,) = actor_processes()
    os.kill(process.pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        # The second publication waits until the pool has taken the first; neither waits for the actor.
        push.publisher.publish(policy_of(models[2]))
        push.publisher.publish(policy_of(models[2]))
        waited_s = time.monotonic() - started
        push.wait_until(lambda status: status.newest_version == 3, "the pool to know of both", timeout_s=20.0)
        assert process.status() == psutil.STATUS_STOPPED
        assert version_of(push.status()) <= 1
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert waited_s < 10.0
    push.wait_until(lambda status: version_of(status) == 3, "the woken actor to load the newest weights")
    assert any(len(versions) > 1 for versions in push.versions_of_all()), "no rollout lived through a push"
    assert_explained(push.rollouts_of(3, ROWS), models | {3: models[2]})
    assert not any(event.kind == "actor_failed" for event in push.status().events)


def ask_in_the_middle_of_rollouts(push: Push, models: dict[int, PreTrainedModel]) -> None:
    """An actor answers greedily, with one version of the weights though a newer one comes; no answer is a rollout."""
    asked = push.pool.answer.remote(3)
    push.publisher.publish(policy_of(models[1]))
    rows = ray.get(asked, timeout=START_TIMEOUT_S).to_pylist()
    assert [row["prompt_ids"] for row in rows] == [ids.tolist() for ids in QUESTIONS]
    (version,) = {version for row in rows for version in row["policy_version"]}
    assert version in (3, 4)
    sampling = SAMPLING.model_copy(update={"temperature": 0.0, "ban_deleted": True})
    result = compare([as_log(row) for row in rows], {row["id"]: sampling for row in rows}, {3: models[2], 4: models[1]})
    assert not result.errors, result.errors[:3]
    push.wait_until(lambda status: version_of(status) == 4, "the actor to load the weights that waited for the answers")
    stored = read_shard(push.folder).stored.column("prompt_ids").to_pylist()
    assert not any(ids in stored for ids in (row["prompt_ids"] for row in rows)), "an answer is in the buffer"


def push_wrong_weights(push: Push, model: PreTrainedModel) -> None:
    """Versions 5 to 7: the first meets a running actor, the others meet its successors at birth."""
    good, payload = publication(model, version=5)
    name = good.tensors[1].name
    lacking = {key: array for key, array in payload.items() if key != name}
    assert name in failure_after(push, good, lacking)
    changed = dict(payload)
    changed[name] = changed[name].copy()
    changed[name].reshape(-1)[0] += 1e-3
    assert "the bytes changed on their way" in failure_after(push, replace(good, version=6), changed)
    shifted = tuple(value + (0.05 if index == 3 else 0.0) for index, value in enumerate(good.probe_logprobs))
    reason = failure_after(push, replace(good, version=7, probe_logprobs=shifted), payload)
    assert "the engine does not compute with the published weights" in reason
    assert "at token 4" in reason
    push.wait_until(lambda status: status.failure is not None, "the pool to give up")
    assert "failed 3 times in a row" in str(push.status().failure)
    assert max(version for row in push.sample(ROWS, 4) for version in row["policy_version"]) <= 4


def version_of(status: PoolStatus) -> int:
    return max(versions_of(status), default=-1)


def versions_of(status: PoolStatus) -> list[int]:
    return [member.status.policy_version for member in status.members if member.status is not None]


def publication(model: PreTrainedModel, version: int) -> tuple[WeightManifest, WeightPayload]:
    payload, entries = pack_tensors(publication_tensors(model))
    logprobs = tuple(sequence_logprobs(model, PROBE).tolist())
    return WeightManifest(version, fingerprint(entries, payload), entries, PROBE, logprobs), payload


def failure_after(push: Push, manifest: WeightManifest, payload: WeightPayload) -> str:
    """Announce it, wait for the actor that loads it to fail; gives the reason that the pool tells."""
    before = len(failures(push.status()))
    handle = WeightSender().publish(payload)
    ray.get(push.pool.notify.remote(manifest, handle), timeout=ANSWER_TIMEOUT_S)
    push.wait_until(lambda status: len(failures(status)) > before, f"version {manifest.version} to be refused")
    # The successor must meet the next publication, so that this object may go.
    reason = failures(push.status())[before]
    assert "WeightMismatchError" in reason
    assert f"version {manifest.version}" in reason
    return reason


def failures(status: PoolStatus) -> list[str]:
    return [event.message for event in status.events if event.kind == "actor_failed"]


def test_publishing_is_a_snapshot() -> None:
    """What the optimizer writes after `publish` returned reaches no actor."""
    model = tiny_model()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    class Receiver:
        def __init__(self) -> None:
            self.payload: WeightPayload = {}

        def notify(self, manifest: WeightManifest, handle: WeightHandle) -> None:
            self.payload = {name: array.copy() for name, array in WeightReceiver().fetch(handle).items()}

        def received(self) -> WeightPayload:
            return self.payload

    receiver = ray.remote(Receiver).options(num_cpus=0).remote()
    publisher = WeightPublisher(receiver, PROBE, first_version=7)
    assert publisher.newest_version == 6
    assert publisher.publish(policy_of(model)) == publisher.newest_version == 7
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    received = ray.get(receiver.received.remote(), timeout=ANSWER_TIMEOUT_S)
    assert received.keys() == expected.keys()
    for name, array in received.items():
        assert np.array_equal(array, expected[name].numpy()), name
    ray.kill(receiver)


def test_frozen_tensors_travel_once() -> None:
    class Pool:
        def __init__(self) -> None:
            self.handles: list[WeightHandle] = []

        def notify(self, manifest: WeightManifest, handle: WeightHandle) -> None:
            self.handles.append(handle)

        def static(self) -> list[str | None]:
            return [None if handle.static is None else handle.static.hex() for handle in self.handles]

    model = tiny_model()
    add_adapters(model, AdapterSettings(rank=4, alpha=8.0), base_name="base", revision=None, seed=0)
    found: dict[str, list[str | None]] = {}
    for mode in get_args(PublishMode):
        pool = ray.remote(Pool).options(num_cpus=0).remote()
        publisher = WeightPublisher(pool, PROBE, mode=mode)
        for _ in range(2):
            publisher.publish(policy_of(model))
        found[mode] = ray.get(pool.static.remote(), timeout=ANSWER_TIMEOUT_S)
        ray.kill(pool)
    assert found["full"] == [None, None]
    first, second = found["adapter"]
    assert first is not None
    assert first == second
