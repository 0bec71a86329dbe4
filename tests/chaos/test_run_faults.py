"""One run of four lives: an actor that hangs and comes back when it was given up, then kill -9 of the driver; a learner
that hangs; a full disk; and the rest.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from learner.checkpoints.store import read_progress
from tests.chaos.run_lives import (
    LONG,
    STAGE,
    START_TIMEOUT_S,
    Life,
    assert_audit_is_clean,
    assert_failed,
    assert_same_steps,
    end_of_life,
    ended,
    newest_step,
    pool_events,
    shorten,
    steps_lost,
    wait_for_steps,
)
from tests.checkpoints import checkpoints_of
from tests.integration.train_process import ARITHMETIC, TINY, TrainProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a test has up to three lives to wait for

ACTOR_TIMEOUT_S, LEARNER_TIMEOUT_S = 8, 12
SILENT = f"actor-0 failed: silent for {ACTOR_TIMEOUT_S} s"
DISK_MIB = 64
MOUNT_TIMEOUT_S = 20.0
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
RAY_AGENTS_TIMEOUT_S = 120.0
"""After their node was killed they try for a minute to tell a head node that is gone, and then end by themselves."""

OVERRIDES = (
    *TINY,
    *LONG,
    "stages.pretrain.steps=5",
    "stages.mle_control.steps=2",
    f"actors.health_timeout_s={ACTOR_TIMEOUT_S}",
    f"learner.health_timeout_s={LEARNER_TIMEOUT_S}",
)


@dataclass(frozen=True)
class KilledDriver:
    """life: as it was when its processes had ended."""

    life: Life
    process: TrainProcess
    resumption: TrainProcess


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small disk of its own, where mounting is permitted; else a folder."""
    folder = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "sequencematch-test", str(folder)]
    subprocess.run(command, timeout=MOUNT_TIMEOUT_S, capture_output=True, check=False)
    yield folder
    if os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", str(folder)], timeout=MOUNT_TIMEOUT_S, check=True)


@pytest.fixture(scope="module")
def killed_driver(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KilledDriver]:
    """The run, whose actor hangs for a while, until its driver is killed; and its resumption, begun at once, while what
    the driver had started is still there.
    """
    with TrainProcess(disk / "runs", ARITHMETIC, "--no-evaluate", *OVERRIDES) as process:
        process.wait_until(lambda: process.step(STAGE) >= 13, START_TIMEOUT_S, "steps with rollouts")
        folder = process.folder
        (hung,) = process.processes("ray::RolloutActor")
        hung.suspend()
        process.wait_until(lambda: SILENT in pool_events(folder), START_TIMEOUT_S, "the fence")
        hung.resume()
        process.wait_until(
            lambda: hung not in process.processes(), START_TIMEOUT_S, "the end of the actor that was given up"
        )
        wait_for_steps(process, folder, beyond=newest_step(folder) + 10)
        process.kill()
        with TrainProcess(tmp_path_factory.mktemp("2nd"), "--no-evaluate", "--resume", str(folder)) as next_life:
            assert process.wait(START_TIMEOUT_S) == -signal.SIGKILL
            process.assert_nothing_left(besides=RAY_AGENTS)
            yield KilledDriver(end_of_life(folder, -signal.SIGKILL, process), process, next_life)


@pytest.fixture(scope="module")
def hung_learner(killed_driver: KilledDriver) -> Life:
    """That resumption, until its learner hangs; it never comes back."""
    before, process = killed_driver.life, killed_driver.resumption
    wait_for_steps(process, before.folder, beyond=before.step)
    (hung,) = process.processes("ray::LearnerWorker")
    hung.suspend()
    return ended(process, before.folder)


@pytest.fixture(scope="module")
def full_disk(disk: Path, hung_learner: Life, tmp_path_factory: pytest.TempPathFactory) -> Life | None:
    """The next resumption, until there is no room left; None where no disk may be mounted. There is room afterwards."""
    if not os.path.ismount(disk):
        return None
    folder = hung_learner.folder
    rest = disk / "rest"
    with TrainProcess(tmp_path_factory.mktemp("3rd"), "--no-evaluate", "--resume", str(folder)) as process:
        wait_for_steps(process, folder, beyond=hung_learner.step)
        fill(rest)
        life = ended(process, folder)
    fill(rest)  # what ended has given back some bytes
    with TrainProcess(tmp_path_factory.mktemp("full"), "--no-evaluate", "--resume", str(folder)) as too_early:
        assert too_early.wait(START_TIMEOUT_S) == 2, too_early.printed()
        too_early.assert_nothing_left()
        assert f"No space left on device: '{folder}/" in too_early.stderr.splitlines()[-1]
        assert "Traceback" not in too_early.printed()
    rest.unlink()
    return life


def test_a_driver_that_was_killed_leaves_no_process_and_the_actor_that_hung_was_replaced(
    killed_driver: KilledDriver, hung_learner: Life
) -> None:
    """Here the next life has ended too, which has given Ray's agents time."""
    killed_driver.process.assert_nothing_left(timeout_s=RAY_AGENTS_TIMEOUT_S)
    life = killed_driver.life
    told = pool_events(life.folder)
    fence = told.index(SILENT)
    assert "actor-0 starting" in told[fence:]
    assert life.step > life.checkpoint


def test_a_learner_that_hangs_ends_the_run_with_what_to_do(hung_learner: Life) -> None:
    assert_failed(hung_learner, f"the learner has been silent for {LEARNER_TIMEOUT_S} s")


def test_a_full_disk_ends_the_run_with_what_to_do(full_disk: Life | None) -> None:
    if full_disk is None:
        pytest.skip("a disk of known size needs the right to mount (CAP_SYS_ADMIN)")
    assert_failed(full_disk, "free space")  # whoever meets it first: learner, buffer, checkpoint or the driver's log
    assert str(full_disk.folder) in full_disk.errors[0]


def test_the_last_life_does_what_is_left_and_every_trajectory_is_accounted_for(
    killed_driver: KilledDriver, hung_learner: Life, full_disk: Life | None, tmp_path: Path
) -> None:
    lives = [killed_driver.life, hung_learner, *([full_disk] if full_disk is not None else [])]
    folder, total = lives[-1].folder, lives[-1].step + 20
    shorten(folder, total)
    with TrainProcess(tmp_path, "--no-evaluate", "--resume", str(folder)) as process:
        process.wait(START_TIMEOUT_S)
        assert ended(process, folder).code == 0, process.printed()
    assert_same_steps(folder, total, steps_lost(*lives))
    assert read_progress(checkpoints_of(folder / "checkpoints" / STAGE)[-1]).finished
    assert_audit_is_clean(folder)


def fill(path: Path) -> None:
    """Take all the room that is left on the disk of `path`; the file grows."""
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    block = bytes(2**20)
    try:
        while block:
            try:
                os.write(descriptor, block)
            except OSError:  # not so much any more
                block = block[: len(block) // 2]
    finally:
        os.close(descriptor)
