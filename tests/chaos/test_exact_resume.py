"""A learner that is killed again and again ends with the weights of one that was not, bit for bit.

Each life is a process of its own: the trainer, the replay buffer and the checkpoints as they are, without Ray. What
comes into the buffer is fixed in advance, row by row, as it would be with actors that nobody killed; it outgrows the
capacity, so rows that a repeated step needs are no longer live.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from buffer.experts.tasks import Task, load_task
from buffer.service.client import sample_from_shards
from buffer.service.service import ReplayBufferService
from buffer.service.shard import SampleRequest
from buffer.settings import ArithmeticTaskSettings, BufferSettings, NoiseSettings
from buffer.store import segments
from buffer.store.catalog import CatalogWriter
from buffer.store.gather import Gather
from buffer.store.shard import SampleKey
from buffer.store.store import ReplayStore
from learner import trainer as trainer_module
from learner.checkpoints import checkpoint as checkpoint_module
from learner.checkpoints.checkpoint import load_weights, read_training_state
from learner.checkpoints.store import LocalCheckpoints, Progress, read_progress
from learner.checkpoints.writer import StageCheckpoints
from learner.model.policy import load_policy
from learner.objectives import make_objective
from learner.ranks import Ranks
from learner.settings.model import ScratchModelSettings
from learner.settings.objectives import SequenceMatchSettings
from learner.settings.stages import LearnerSettings, OptimizerSettings, StageSettings
from learner.state_tree.batch import TreeSettings
from learner.state_tree.policy import TreePolicy
from learner.trainer import Trainer
from tests.rollouts import rollouts

STEPS = 14
ROWS_BEFORE, ROWS_PER_STEP, STEPS_PER_VERSION = 24, 5, 3
MODEL = ScratchModelSettings(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32, max_positions=40)
STAGE = StageSettings(
    name="stage",
    objective=SequenceMatchSettings(alpha=0.05, bc_weight_start=0.8, bc_weight_end=0.2, bc_weight_steps=STEPS),
    steps=STEPS,
    batch_size=4,
    rollout_batch_size=6,
    optimizer=OptimizerSettings(learning_rate=5e-3, warmup_steps=3),
)
SETTINGS = LearnerSettings(checkpoint_every_steps=4, keep_checkpoints=1, checkpoint_timeout_s=30.0)
BUFFER = BufferSettings(capacity=24, min_size=1, max_staleness=2, segment_bytes=6_000, fsync="none")
LIFE_TIMEOUT_S = 60.0
LIVES = 6


@dataclass
class ServiceSource:
    """Draws from a buffer in the same process; before each, the actors have handed in what they made until then."""

    service: ReplayBufferService
    store: ReplayStore
    task: Task
    run: Callable
    step: int = 0

    def sample(self, count: int) -> pa.RecordBatch:
        while self.store.next_row < ROWS_BEFORE + ROWS_PER_STEP * self.step:
            made_at = max(self.store.next_row - ROWS_BEFORE, 0) // ROWS_PER_STEP
            version = made_at // STEPS_PER_VERSION
            self.run(self.service.insert(rollouts(self.task, self.store.next_row, 1, version)))
        key = SampleKey(STAGE.name, self.step, "policy")
        request = SampleRequest(key, count, self.step // STEPS_PER_VERSION)
        (result,) = self.run(sample_from_shards([self.service], request, timeout_s=1.0))
        self.step += 1
        return result.batch


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task(ArithmeticTaskSettings(max_digits=1, train_questions=40, held_out_questions=4), max_length=40)


def live(task: Task, folder: Path) -> None:
    """One life of the learner, from its newest checkpoint to the end of the stage."""
    torch.set_num_threads(1)
    torch.manual_seed(int.from_bytes(os.urandom(4)))  # what is not in the checkpoint must not matter
    policy = load_policy(MODEL, task.tokenizer)
    contract = task.contract(policy.model.config.vocab_size)
    loop = asyncio.new_event_loop()
    service = ReplayBufferService(str(folder / "buffer"), contract, BUFFER, seed=1)
    source = ServiceSource(service, service._store, task, loop.run_until_complete)
    stream = task.expert_stream(NoiseSettings(kind="task", rate=0.3), contract, seed=2)
    trees = TreeSettings(
        backspace_id=task.backspace_id,
        eos_id=task.eos_id,
        max_tokens_per_micro_batch=128,
        max_positions=MODEL.max_positions,
    )
    objective = make_objective(STAGE.objective)
    trainer = Trainer(TreePolicy(policy.model, task.backspace_id), objective, STAGE, trees, stream, source)
    store = LocalCheckpoints(folder / "checkpoints")
    if steps := store.steps():
        checkpoint = store.folder(steps[-1])
        load_weights(policy.model, checkpoint)
        trainer.load_state(read_training_state(checkpoint))
        stream.load_state(read_progress(checkpoint).expert_stream)
    source.step = trainer.step

    def release(progress: Progress) -> None:
        loop.run_until_complete(service.checkpointed(progress.stage, progress.step))

    start = Progress(STAGE.name, 0, STAGE.steps, -1, 0, {}, contract)
    with StageCheckpoints(Ranks(), store, SETTINGS, start, policy.model, task.tokenizer, release) as checkpoints:

        def save() -> None:
            checkpoints.save(trainer.step, trainer.state, stream.state(), trainer.step // STEPS_PER_VERSION)

        while not trainer.finished:
            checkpoints.after_step(trainer.train_step())
            if trainer.step % SETTINGS.checkpoint_every_steps == 0:
                save()
        save()
        checkpoints.wait()
    loop.run_until_complete(service.close())


def die(*_args: object, **_options: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying_before(original: Callable, call: int) -> Callable:
    """A function whose `call`-th use (from 0) kills the process."""
    calls = iter(range(10**9))
    return lambda *args, **options: die() if next(calls) == call else original(*args, **options)


def dying_after(original: Callable, call: int) -> Callable:
    calls = iter(range(10**9))

    def function(*args, **options):
        result = original(*args, **options)
        if next(calls) == call:
            die()
        return result

    return function


def dying_half_way(original: Callable, call: int) -> Callable:
    """Of `os.pwrite`: half of the bytes are written."""
    calls = iter(range(10**9))

    def write(descriptor: int, content: memoryview, offset: int) -> int:
        if next(calls) == call:
            original(descriptor, content[: len(content) // 2], offset)
            die()
        return original(descriptor, content, offset)

    return write


@dataclass(frozen=True)
class KillPoint:
    """Where a life ends: at a use of `owner.attribute`. calls: range of the uses in a whole life."""

    name: str
    owner: object
    attribute: str
    how: Callable[[Callable, int], Callable]
    calls: tuple[int, int]


POINTS = [
    KillPoint("before a draw", ReplayStore, "sample", dying_before, (0, STEPS)),
    KillPoint("in the middle of an insert", segments.os, "pwrite", dying_half_way, (2, 80)),
    KillPoint("between segment and catalog", CatalogWriter, "commit", dying_before, (2, 80)),
    KillPoint("between catalog and answer", Gather, "take", dying_before, (0, STEPS)),
    KillPoint("in the middle of a step", trainer_module, "clip_gradients", dying_before, (0, STEPS)),
    KillPoint("after the optimizer", torch.optim.AdamW, "step", dying_after, (0, STEPS)),
    KillPoint("in the middle of writing a checkpoint", checkpoint_module.torch, "save", dying_before, (0, 3)),
    KillPoint("before the rename of a checkpoint", Path, "rename", dying_before, (0, 4)),
    KillPoint("after the rename of a checkpoint", Path, "rename", dying_after, (0, 4)),
    KillPoint("between checkpoint and release", ReplayStore, "checkpointed", dying_before, (0, 3)),
    KillPoint("after the release", ReplayStore, "checkpointed", dying_after, (0, 3)),
]


def one_life(task: Task, folder: Path, kill: tuple[KillPoint, int] | None = None) -> int:
    """A life in a process of its own; gives its exit code."""

    def body() -> None:
        if kill is not None:
            point, call = kill
            setattr(point.owner, point.attribute, point.how(getattr(point.owner, point.attribute), call))
        live(task, folder)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join(LIFE_TIMEOUT_S)
    assert process.exitcode is not None, f"a life took more than {LIFE_TIMEOUT_S:.0f} s"
    return process.exitcode


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, moments and random state of the last checkpoint."""
    store = LocalCheckpoints(folder / "checkpoints")
    assert store.steps() == [STEPS]
    checkpoint = store.folder(STEPS)
    state = read_training_state(checkpoint)
    moments = {
        f"optimizer {index} {name}": value
        for index, values in state["optimizer"]["state"].items()
        for name, value in values.items()
    }
    assert len(moments) > 10
    return {**load_file(checkpoint / "model.safetensors"), **moments}


@pytest.fixture(scope="module")
def uninterrupted(task: Task, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert one_life(task, folder) == 0
    return final_state(folder)


def assert_same_end(task: Task, folder: Path, expected: dict[str, torch.Tensor], told: str) -> None:
    assert one_life(task, folder) == 0, told
    found = final_state(folder)
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different, f"{told}: {different}"


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name.replace(" ", "-"))
def test_a_kill_at_a_random_moment_changes_nothing(task, tmp_path, uninterrupted, point):
    generator = np.random.default_rng(POINTS.index(point))
    call = int(generator.integers(*point.calls))
    assert one_life(task, tmp_path, (point, call)) == -signal.SIGKILL, "the kill never came"
    assert_same_end(task, tmp_path, uninterrupted, f"killed {point.name}, use {call}")


@pytest.mark.parametrize("seed", range(4))
def test_kills_upon_kills_change_nothing(task, tmp_path, uninterrupted, seed):
    generator = np.random.default_rng(seed)
    told = []
    for _ in range(LIVES):
        point = POINTS[generator.integers(len(POINTS))]
        call = int(generator.integers(*point.calls))
        told.append(f"{point.name}, use {call}: exit {one_life(task, tmp_path, (point, call))}")
    assert sum("exit -9" in line for line in told) >= 2, told
    assert_same_end(task, tmp_path, uninterrupted, "; ".join(told))


def without_draws(original: Callable, _call: int) -> Callable:
    """Of `CatalogWriter.events`: a catalog that names no draw."""
    return lambda catalog: (event for event in original(catalog) if event.kind != "draw")


def test_had_the_catalog_no_draws_the_end_would_be_another(task, tmp_path, uninterrupted):
    """That the buffer's contents matter: the same kill, and what was drawn before it is forgotten."""
    (point,) = (point for point in POINTS if point.attribute == "clip_gradients")
    assert one_life(task, tmp_path, (point, STEPS - 1)) == -signal.SIGKILL
    forgetful = KillPoint("never", CatalogWriter, "events", without_draws, (0, 1))
    assert one_life(task, tmp_path, (forgetful, 0)) == 0
    found = final_state(tmp_path)
    assert not all(torch.equal(found[name], tensor) for name, tensor in uninterrupted.items())
