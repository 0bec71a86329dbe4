"""One run of four lives: kill -9 of the learner while it writes a checkpoint; a shard of the buffer that hangs, and
kill -9 of the other one again and again; two Ctrl-C at once; and the rest, in which each shard is killed once more.
"""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from buffer.reading.snapshot import read_shard
from buffer.service.shard import present_shards, shard_folder
from buffer.trajectory.staleness import VersionRange
from launch.run.buffer_shards import MAX_RESTARTS
from launch.run_folder.folder import BUFFER_FOLDER, CONFIG_FILE
from launch.settings.recipe import read_recipe
from learner.checkpoints.store import read_progress
from tests.chaos.run_lives import (
    LONG,
    STAGE,
    START_TIMEOUT_S,
    Life,
    assert_failed,
    assert_same_steps,
    ended,
    newest_step,
    shorten,
    steps_lost,
    wait_for_steps,
)
from tests.checkpoints import checkpoints_of
from tests.integration.train_process import ARITHMETIC, TINY, TrainProcess, metrics_of, refusal_of

pytestmark = pytest.mark.slow

CHECKPOINT_EVERY = 10
SHARD_TIMEOUT_S = 5
SILENT = re.compile(rf"shard 0 of the replay buffer was silent for {SHARD_TIMEOUT_S} s .*: its process (\d+) is ended")
RESTARTED = "shard {} of the replay buffer died .* restarted from its segments"
OVERRIDES = (
    *TINY,
    *LONG,
    "stages.pretrain.steps=5",
    "stages.mle_control.steps=2",
    "buffer.shards=2",
    f"buffer.health_timeout_s={SHARD_TIMEOUT_S}",
)


@pytest.fixture(scope="module")
def killed_learner(tmp_path_factory: pytest.TempPathFactory) -> Life:
    """The run, until its learner is killed in the middle of a checkpoint, of whatever step."""
    with TrainProcess(tmp_path_factory.mktemp("run"), ARITHMETIC, "--no-evaluate", *OVERRIDES) as process:
        process.wait_until(lambda: process.step(STAGE) > CHECKPOINT_EVERY, START_TIMEOUT_S, "steps with rollouts")
        checkpoints = process.folder / "checkpoints" / STAGE
        process.wait_until(lambda: bool(checkpoints_of(checkpoints)), START_TIMEOUT_S, "the first whole checkpoint")
        half_written = kill_in_mid_checkpoint(process, checkpoints)
        life = ended(process, process.folder)
    assert half_written.is_dir(), "the next life finds it"
    return life


@pytest.fixture(scope="module")
def killed_buffer(killed_learner: Life, tmp_path_factory: pytest.TempPathFactory) -> Life:
    """Its resumption, until a shard of the replay buffer has died more often than it is restarted. Before that the
    other one hangs, is ended for that, and the run goes on.
    """
    folder = killed_learner.folder
    with TrainProcess(tmp_path_factory.mktemp("2nd"), "--no-evaluate", "--resume", str(folder)) as process:
        wait_for_steps(process, folder, beyond=killed_learner.step)
        hung = shard_process(process, folder, 0)
        hung.suspend()
        wait_for_restart(process, 0, 1)
        assert SILENT.findall(process.stdout) == [str(hung.pid)]
        wait_for_steps(process, folder, beyond=newest_step(folder))
        for death in range(1, MAX_RESTARTS + 1):
            shard_process(process, folder, 1).kill()
            wait_for_restart(process, 1, death)
            wait_for_steps(process, folder, beyond=newest_step(folder))
        shard_process(process, folder, 1).kill()
        return ended(process, folder)


@pytest.fixture(scope="module")
def interrupted_twice(killed_buffer: Life, tmp_path_factory: pytest.TempPathFactory) -> Life:
    """The next resumption, until two Ctrl-C at once."""
    folder = killed_buffer.folder
    with TrainProcess(tmp_path_factory.mktemp("3rd"), "--no-evaluate", "--resume", str(folder)) as process:
        wait_for_steps(process, folder, beyond=killed_buffer.step)
        process.interrupt()
        process.interrupt()
        return ended(process, folder)


def test_the_death_of_the_learner_is_told_with_what_to_do(killed_learner: Life) -> None:
    assert killed_learner.step > killed_learner.checkpoint, "nothing would have to be repeated"
    assert_failed(killed_learner, "the learner died")


def test_a_shard_that_dies_too_often_ends_the_run_with_what_to_do(killed_buffer: Life) -> None:
    assert_failed(killed_buffer, "shard 1 of the replay buffer died")


def test_a_second_ctrl_c_ends_the_run_which_can_be_resumed(interrupted_twice: Life) -> None:
    assert interrupted_twice.code in (1, 130)
    assert "go on with: sequencematch train --resume" in interrupted_twice.stdout
    assert interrupted_twice.checkpoint <= interrupted_twice.step


def test_a_damaged_catalog_is_named(interrupted_twice: Life, tmp_path: Path) -> None:
    """Runs before the last life, on a copy."""
    folder = tmp_path / "copy"
    shutil.copytree(interrupted_twice.folder, folder)
    catalog = shard_folder(folder / BUFFER_FOLDER, 0) / "catalog.db"
    content = bytearray(catalog.read_bytes())
    page = slice(len(content) // 2, len(content) // 2 + 4096)
    content[page] = bytes(byte ^ 0xFF for byte in content[page])
    catalog.write_bytes(content)
    error = refusal_of(tmp_path, "--resume", str(folder))
    assert str(catalog) in error
    assert "restore it from a copy" in error


def test_the_last_life_does_what_is_left_and_all_lives_took_the_same_steps(
    killed_learner: Life, killed_buffer: Life, interrupted_twice: Life, tmp_path: Path
) -> None:
    """Number for number, although the actors made other rollouts in each life, and both shards die in this one."""
    folder = interrupted_twice.folder
    total = interrupted_twice.step + 60
    shorten(folder, total)
    with TrainProcess(tmp_path, "--no-evaluate", "--resume", str(folder)) as process:
        for index in range(2):
            wait_for_steps(process, folder, beyond=interrupted_twice.step + 10 * index)
            shard_process(process, folder, index).kill()
        process.wait(START_TIMEOUT_S)
        assert ended(process, folder).code == 0, process.printed()
    assert_same_steps(folder, total, steps_lost(killed_learner, killed_buffer, interrupted_twice))
    for stage, steps in (("pretrain", 5), ("mle_control", 2)):
        assert [row["step"] for row in metrics_of(folder, stage)] == list(range(1, steps + 1))
    for stage in ("pretrain", STAGE, "mle_control"):
        assert read_progress(checkpoints_of(folder / "checkpoints" / stage)[-1]).finished
    assert_every_draw_keeps_the_rules(folder)


def assert_every_draw_keeps_the_rules(folder: Path) -> None:
    """Over all lives: each draw once and whole, of distinct rows of its source, fresh enough, within the samples per
    insert; nothing that was acknowledged is lost, and no rollout is there twice.
    """
    settings = read_recipe(folder / CONFIG_FILE)
    parts: dict[tuple[str, int, str], int] = {}
    ids: list[str] = []
    num_sampled = 0
    shards = [read_shard(shard) for shard in present_shards(folder / BUFFER_FOLDER)]
    assert len(shards) == 2
    for shard in shards:
        rows = shard.stored.combine_chunks().to_batches()[0]
        numbers = rows.column("row").to_numpy()
        assert np.array_equal(numbers, np.arange(shard.next_row)), "every row that was ever inserted is there"
        ids += rows.column("id").to_pylist()
        oldest = VersionRange.from_batch(rows).oldest
        draws = [event for event in shard.events.to_pylist() if event["event"] == "draw"]
        for draw in draws:
            key = (draw["stage"], draw["step"], draw["source"])
            drawn = np.array(draw["rows"])
            assert len(set(draw["rows"])) == len(drawn)
            parts[key] = parts.get(key, 0) + len(drawn)
            num_sampled += len(drawn)
            assert draw["whole"] == 8
            assert (draw["policy_version"] - oldest[drawn]).max() <= settings.buffer.max_staleness
            assert {rows.column("source")[number].as_py() for number in draw["rows"]} == {draw["source"]}
    assert len(ids) == len(set(ids))
    newest = max(step for _, step, _ in parts)
    assert {step for _, step, _ in parts} == set(range(newest + 1))
    assert set(parts.values()) == {8}
    assert num_sampled <= settings.buffer.samples_per_insert * len(ids)


def wait_for_restart(process: TrainProcess, shard: int, deaths: int) -> None:
    told = re.compile(RESTARTED.format(shard))
    process.wait_until(
        lambda: len(told.findall(process.stdout)) == deaths, START_TIMEOUT_S, f"shard {shard} to restart"
    )


def shard_process(process: TrainProcess, folder: Path, index: int) -> psutil.Process:
    """The processes of the shards have one title; which is which tells the lock that each holds."""
    lock = str(shard_folder(folder / BUFFER_FOLDER, index) / "lock")
    shards = process.processes("ray::ReplayBufferService")
    (found,) = (each for each in shards if lock in [file.path for file in each.open_files()])
    return found


def kill_in_mid_checkpoint(process: TrainProcess, checkpoints: Path) -> Path:
    """Stop the learner as soon as a folder shows that is being written, and kill it if it is not complete yet; else let
    it go on to the next one. Gives the folder.
    """
    (learner,) = process.processes("ray::LearnerWorker")
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if not (half_written := being_written(checkpoints)):
            time.sleep(0.001)
            continue
        learner.suspend()
        if half_written := being_written(checkpoints):
            learner.kill()
            return half_written[0]
        learner.resume()
    raise AssertionError(f"no checkpoint was caught half-written within {START_TIMEOUT_S:.0f} s\n{process.printed()}")


def being_written(checkpoints: Path) -> list[Path]:
    """Folders with a part of a checkpoint, apart from those that are being removed."""
    return [path for path in checkpoints.glob("step-*.tmp") if not path.name.endswith(".removed.tmp")]
