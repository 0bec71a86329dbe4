"""The learner against a real buffer and a real pool without actors: what a stage draws after a resume."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from ray.actor import ActorHandle
from safetensors.torch import load_file

from actors.pool.ray_pool import ActorPool
from actors.rollout_actor import RolloutSpec
from actors.settings import ActorsSettings
from buffer.experts.tasks import Task, load_task
from buffer.reading.snapshot import read_shard
from buffer.service.client import Shard
from buffer.service.service import ReplayBufferService
from buffer.service.shard import ShardStatus
from buffer.settings import ArithmeticTaskSettings, BufferSettings, NoiseSettings
from learner.messages import LearnerSpec
from learner.settings.held_out import HeldOutSettings
from learner.settings.model import ScratchModelSettings
from learner.settings.objectives import SequenceMatchSettings
from learner.settings.stages import LearnerSettings, StageSettings
from learner.worker import LearnerWorker
from tests.checkpoints import checkpoints_of
from tests.integration.local_ray import local_ray
from tests.integration.train_process import metrics_of
from tests.processes import wait_until
from tests.rollouts import rollouts

pytestmark = pytest.mark.slow

TIMEOUT_S = 60.0
TASK = ArithmeticTaskSettings(max_digits=1, train_questions=40, held_out_questions=4)
MODEL = ScratchModelSettings(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32, max_positions=40)
FIRST_VERSION = 10
"""Of the learner's first publication; the stage starts with the next one."""

NOT_EVALUATED = HeldOutSettings()

GOLDEN_LOSSES = [3.48875, 3.48602, 3.52743, 3.53245, 3.58042, 3.53825, 3.59351, 3.60855, 3.52965, 3.58452]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_ray(num_cpus=2):
        yield


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task(TASK, max_length=MODEL.max_positions)


def start_buffer(folder: Path, task: Task, **changes: object) -> ActorHandle:
    folder.mkdir(exist_ok=True)
    actor = ray.remote(ReplayBufferService).options(num_cpus=0)
    settings = BufferSettings(**{"capacity": 100, "min_size": 1, **changes})
    return actor.remote(str(folder / "buffer"), task.contract(), settings, 0)


def end_buffer(buffer: ActorHandle) -> None:
    ray.get(buffer.close.remote(), timeout=TIMEOUT_S)
    ray.kill(buffer)


def status(buffer: ActorHandle) -> ShardStatus:
    answer: ShardStatus = ray.get(buffer.status.remote(), timeout=TIMEOUT_S)
    return answer


def learn(
    folder: Path,
    buffer: ActorHandle,
    steps: int,
    first_version: int,
    when_waiting: Callable[[LearnerWorker], object] | None = None,
    prioritized_replay: bool = False,
    held_out: HeldOutSettings = NOT_EVALUATED,
    **changes: object,
) -> int:
    """One life of a learner: its stage up to step `steps`, with the checkpoint of its end; gives the step it reached.

    when_waiting: called once, as soon as the learner waits for rollouts.
    """
    noise = NoiseSettings(kind="task", rate=0.3)
    settings = LearnerSettings(checkpoint_every_steps=2)
    spec = LearnerSpec(MODEL, TASK, noise, settings, str(folder), seed=3, prioritized_replay=prioritized_replay)
    spec = replace(spec, held_out=held_out)
    worker = LearnerWorker(spec)
    run = worker.prepare()
    rollout_spec = RolloutSpec("{}", run.contract, run.task.name, ActorsSettings(), spec.noise, run.max_length)
    shards = [Shard(0, buffer)]
    pool = ray.remote(ActorPool).options(num_cpus=0).remote(rollout_spec, [ray.put(None)], shards, {}, 0)
    worker.connect(shards, pool, first_version)
    objective = SequenceMatchSettings(bc_weight_steps=5)
    stage = StageSettings(
        name="second", objective=objective, steps=steps, batch_size=4, rollout_batch_size=4, **changes
    )
    with ThreadPoolExecutor() as threads:
        helper = threads.submit(call_when_waiting, buffer, worker, when_waiting) if when_waiting else None
        result = worker.run_stage(stage)
        if helper is not None:
            helper.result(timeout=TIMEOUT_S)
    ray.kill(pool)
    return result.step


def call_when_waiting(buffer: ActorHandle, worker: LearnerWorker, then: Callable[[LearnerWorker], object]) -> None:
    wait_until(lambda: status(buffer).waiting_samples, TIMEOUT_S, "the learner to wait for rollouts")
    then(worker)


def test_answers_that_come_while_the_learner_waits_are_metrics_of_the_next_step(task: Task, tmp_path: Path) -> None:
    buffer = start_buffer(tmp_path, task, samples_per_insert=1.0, samples_per_insert_tolerance=4.0)
    own = FIRST_VERSION + 1
    ray.get(buffer.insert.remote(rollouts(task, 0, 8, version=own)), timeout=TIMEOUT_S)

    def answer(worker: LearnerWorker) -> None:
        worker.report_answers(own, {"held_out_accuracy": 0.25})  # published before the first step, not after one
        worker.report_answers(own + 1, {"held_out_accuracy": 0.5})
        ray.get(buffer.insert.remote(rollouts(task, 8, 8, version=own)), timeout=TIMEOUT_S)

    assert (
        learn(
            tmp_path, buffer, 4, FIRST_VERSION, answer, held_out=HeldOutSettings(every_steps=2), publish_every_steps=2
        )
        == 4
    )
    end_buffer(buffer)
    rows = metrics_of(tmp_path)
    (answered,) = (row for row in rows if "held_out_accuracy" in row)
    assert (answered["step"], answered["held_out_accuracy"], answered["held_out_answers_step"]) == (3, 0.5, 2)
    assert [row["step"] for row in rows if "held_out_loss" in row] == [2, 4]


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints_of(folder / "checkpoints" / "second")[-1] / "model.safetensors")


def test_a_resumed_stage_draws_no_rows_of_the_stage_before(task: Task, tmp_path: Path) -> None:
    """An actor may hand in what it made for the stage before long after this one began, and a kill may follow."""
    own = FIRST_VERSION + 1
    buffer = start_buffer(tmp_path, task)
    ray.get(buffer.insert.remote(rollouts(task, 0, 8, version=own)), timeout=TIMEOUT_S)
    assert learn(tmp_path, buffer, steps=4, first_version=FIRST_VERSION) == 4
    shutil.rmtree(checkpoints_of(tmp_path / "checkpoints" / "second")[-1])  # as if it had been killed after step 2
    ray.get(buffer.insert.remote(rollouts(task, 8, 8, version=own - 1)), timeout=TIMEOUT_S)
    assert status(buffer).store.sources["policy"].live == 16
    end_buffer(buffer)

    buffer = start_buffer(tmp_path, task)
    assert learn(tmp_path, buffer, steps=4, first_version=own + 5) == 4
    policy = status(buffer).store.sources["policy"]
    assert policy.dropped_stale == 8, "rows older than the weights that the stage began with"
    assert policy.live == 8, "rows of the stage's first life are its own"
    end_buffer(buffer)


def test_a_stop_while_the_learner_waits_for_rollouts_skips_no_expert(task: Task, tmp_path: Path) -> None:
    """The expert part of the step is drawn by then; the step is not done, so the checkpoint is from before it."""
    own = FIRST_VERSION + 1
    ends = {}
    for name in ("straight", "stopped"):
        folder = tmp_path / name
        buffer = start_buffer(folder, task, samples_per_insert=1.0, samples_per_insert_tolerance=4.0)
        ray.get(buffer.insert.remote(rollouts(task, 0, 8, version=own)), timeout=TIMEOUT_S)

        def insert_more(_: object = None, buffer: ActorHandle = buffer) -> None:
            ray.get(buffer.insert.remote(rollouts(task, 8, 8, version=own)), timeout=TIMEOUT_S)

        if name == "straight":
            assert learn(folder, buffer, 4, FIRST_VERSION, insert_more) == 4
        else:
            assert learn(folder, buffer, 4, FIRST_VERSION, LearnerWorker.request_stop) == 2
            insert_more()
            assert learn(folder, buffer, 4, own + 5) == 4
        ends[name] = final_weights(folder)
        end_buffer(buffer)
    for name, tensor in ends["straight"].items():
        assert torch.equal(ends["stopped"][name], tensor), name


def test_the_golden_loss_curve(task: Task, tmp_path: Path) -> None:
    """The loss of ten steps, as it was when the curve was recorded; processors differ in the last bits of a float."""
    buffer = start_buffer(tmp_path, task, sampler="fifo", max_times_sampled=1)
    ray.get(buffer.insert.remote(rollouts(task, 0, 40, version=FIRST_VERSION + 1)), timeout=TIMEOUT_S)
    assert learn(tmp_path, buffer, steps=10, first_version=FIRST_VERSION) == 10
    end_buffer(buffer)
    losses = [row["loss"] for row in metrics_of(tmp_path)]
    assert losses == pytest.approx(GOLDEN_LOSSES, rel=1e-3)


def test_the_buffer_knows_the_priorities_of_a_step_before_it_gives_the_next(task: Task, tmp_path: Path) -> None:
    buffer = start_buffer(tmp_path, task, sampler="prioritized", segment_bytes=2_000)
    ray.get(buffer.insert.remote(rollouts(task, 0, 12, version=FIRST_VERSION + 1)), timeout=TIMEOUT_S)
    assert learn(tmp_path, buffer, steps=5, first_version=FIRST_VERSION, prioritized_replay=True) == 5
    end_buffer(buffer)
    events = read_shard(tmp_path / "buffer").events.select(["event", "rows", "priorities"]).to_pylist()
    told = [event for event in events if event["event"] in ("draw", "priorities")]
    # Of the last step nobody waits for them.
    assert [event["event"] for event in told[:9]] == 4 * ["draw", "priorities"] + ["draw"]
    for drawn, judged in zip(told[:8:2], told[1:8:2], strict=True):
        assert drawn["rows"] == judged["rows"]
        assert min(judged["priorities"]) > 0
    assert len({priority for event in told[1:8:2] for priority in event["priorities"]}) > 4
