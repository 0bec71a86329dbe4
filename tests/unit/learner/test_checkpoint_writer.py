"""Checkpoints written beside training: order, errors, waits; with stores that are slow, full or stuck on command."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from learner.checkpoints.store import PROGRESS_FILE, LocalCheckpoints, Progress
from learner.checkpoints.writer import CheckpointWriteError, CheckpointWriter, StageCheckpoints
from learner.ranks import Ranks
from learner.settings.stages import LearnerSettings
from tests.checkpoints import progress_at
from tests.unit.learner.test_checkpoint import TOKENIZER, make_model

WAIT_S = 20.0


class GatedCheckpoints(LocalCheckpoints):
    """A folder on a disk that begins to write when it is told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.gate = threading.Event()
        self.writing = threading.Event()

    def write(self, step: int, fill: Callable[[Path], None]) -> None:
        self.writing.set()
        assert self.gate.wait(WAIT_S)
        super().write(step, fill)


@dataclass(frozen=True)
class SmallSnapshot:
    """A snapshot of nothing but its progress."""

    progress: Progress
    error: OSError | None = None

    def write(self, folder: Path) -> None:
        if self.error is not None:
            raise self.error
        (folder / PROGRESS_FILE).write_text(self.progress.to_json())


def snapshot(step: int, error: OSError | None = None, **changes: object) -> SmallSnapshot:
    return SmallSnapshot(progress_at(step, **changes), error)


def writer(store: LocalCheckpoints, durable: list[int], **changes: object) -> CheckpointWriter:
    settings = LearnerSettings.model_validate({"keep_checkpoints": 2, "checkpoint_timeout_s": WAIT_S, **changes})
    return CheckpointWriter(store, settings, on_durable=lambda progress: durable.append(progress.step))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    store, durable = GatedCheckpoints(tmp_path), []
    with writer(store, durable) as checkpoints:
        checkpoints.submit(snapshot(1))
        assert store.writing.wait(WAIT_S)
        checkpoints.poll()
        assert (durable, store.steps()) == ([], [])
        store.gate.set()
        checkpoints.wait()
        assert (durable, store.steps()) == ([1], [1])
        checkpoints.wait()
        checkpoints.poll()
        assert durable == [1], "told once"


def test_the_next_snapshot_waits_for_the_one_before(tmp_path):
    store, durable = GatedCheckpoints(tmp_path), []
    with writer(store, durable, keep_checkpoints=1, checkpoint_best_metric="loss") as checkpoints:
        checkpoints.submit(snapshot(1, metrics={"loss": 0.1}))
        threading.Timer(0.05, store.gate.set).start()
        checkpoints.submit(snapshot(2, metrics={"loss": 0.2}))
        assert durable == [1]
        checkpoints.submit(snapshot(3, metrics={"loss": 0.3}))
        checkpoints.wait()
    assert durable == [1, 2, 3]
    assert store.steps() == [1, 3], "the best and the newest"


def test_a_failed_write_is_an_error_of_the_next_step_that_says_what_to_do(tmp_path):
    store, durable = LocalCheckpoints(tmp_path), []
    with writer(store, durable) as checkpoints:
        checkpoints.submit(snapshot(1))
        checkpoints.submit(snapshot(2, OSError(28, "No space left on device")))
        with pytest.raises(CheckpointWriteError) as caught:
            checkpoints.wait()
        message = str(caught.value)
        assert f"{tmp_path}/step-000002 could not be written: OSError: [Errno 28] No space left on device" in message
        assert "resume the run from step-000001" in message
        with pytest.raises(CheckpointWriteError):
            checkpoints.poll()
        with pytest.raises(CheckpointWriteError):
            checkpoints.submit(snapshot(3))
    assert durable == [1]
    assert store.steps() == [1]


def test_a_folder_that_may_not_be_written_to_is_named(tmp_path):
    (tmp_path / "stage").write_text("not a folder")
    with writer(LocalCheckpoints(tmp_path / "stage"), []) as checkpoints:
        checkpoints.submit(snapshot(1))
        with pytest.raises(CheckpointWriteError, match=r"stage/step-000001 .*from the start of the stage"):
            checkpoints.wait()


def test_a_write_that_does_not_end_is_named(tmp_path):
    store = GatedCheckpoints(tmp_path)
    with writer(store, [], checkpoint_timeout_s=0.05) as checkpoints:
        checkpoints.submit(snapshot(1))
        with pytest.raises(TimeoutError, match=r"waited 0\.05 s for the checkpoint .*step-000001 to be written"):
            checkpoints.submit(snapshot(2))
        store.gate.set()


def test_a_stage_that_fails_still_gets_its_last_checkpoint(tmp_path):
    store = GatedCheckpoints(tmp_path)

    def fail() -> None:
        with writer(store, []) as checkpoints:
            checkpoints.submit(snapshot(1))
            threading.Timer(0.05, store.gate.set).start()
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        fail()
    assert store.steps() == [1]


def test_an_error_of_the_stage_is_not_hidden_by_one_of_its_checkpoint(tmp_path):
    def fail() -> None:
        with writer(LocalCheckpoints(tmp_path), []) as checkpoints:
            checkpoints.submit(snapshot(1, OSError(28, "No space left on device")))
            raise FloatingPointError("diverged")

    with pytest.raises(FloatingPointError, match="diverged") as caught:
        fail()
    assert "step-000001 could not be written either: [Errno 28]" in caught.value.__notes__[0]


@pytest.fixture
def stage(tmp_path) -> Callable[[], StageCheckpoints]:
    """Opens the checkpoints of a stage of a small model, as one process after the other does."""
    settings = LearnerSettings(checkpoint_best_metric="loss", keep_checkpoints=9)
    arguments = (LocalCheckpoints(tmp_path), settings, progress_at(0), make_model(), TOKENIZER, lambda _: None)
    return lambda: StageCheckpoints(Ranks(), *arguments)


def test_a_checkpoint_has_the_means_since_the_one_before_and_is_written_once(stage, tmp_path):
    with stage() as checkpoints:
        checkpoints.after_step({"loss": 1.0, "other": float("inf")})
        checkpoints.after_step({"loss": 2.0, "other": 1.0})
        checkpoints.save(2, dict, {}, 0)
        checkpoints.after_step({"loss": 5.0, "other": 3.0})
        checkpoints.save(3, dict, {"rows": 9}, 1)
        checkpoints.wait()
    with stage() as checkpoints:
        checkpoints.save(3, dict, {}, 7)
        checkpoints.wait()
    found = {step: LocalCheckpoints(tmp_path).progress(step) for step in (2, 3)}
    assert {step: progress.metrics for step, progress in found.items()} == {
        2: {"loss": 1.5},
        3: {"loss": 5.0, "other": 3.0},
    }
    assert (found[3].expert_stream, found[3].policy_version) == ({"rows": 9}, 1)


def test_a_metric_that_a_stage_lacks_is_refused_at_its_first_step(stage):
    with (
        stage() as checkpoints,
        pytest.raises(ValueError, match=r"metric=loss is no metric .* accuracy, los$"),
    ):
        checkpoints.after_step({"los": 1.0, "accuracy": 2.0})
