"""Runs as jobs of a real Ray cluster of two nodes, submitted from a directory that is not the repository."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launch.run_folder.folder import CLUSTER_FILE, RAY_JOB_VARIABLE
from tests.integration.ray_head import BIN, RayHead
from tests.integration.train_process import ARITHMETIC, ROOT, metrics_of
from tests.processes import wait_until

TIMEOUT_S = 240.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with RayHead(num_cpus=0, workers=(2,)) as started:
        yield started


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with a recipe of one short stage that needs no actors, and nothing else."""
    recipe = yaml.safe_load((ROOT / ARITHMETIC).read_text())
    recipe["model"] |= {"hidden_size": 64, "num_heads": 2, "num_layers": 1}
    recipe["task"] |= {"train_questions": 200, "held_out_questions": 20}
    (pretrain,) = (stage for stage in recipe["stages"] if stage["name"] == "pretrain")
    recipe["stages"] = [pretrain | {"steps": 20, "batch_size": 8}]
    del recipe["result"]  # a stage that is left out
    recipe |= {"runs_folder": str(tmp_path / "runs"), "evaluation": {}}
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "short.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def start(
    head: RayHead, folder: Path, *arguments: str, program: tuple[str, ...] = ("sequencematch", "submit"), **more: str
) -> subprocess.Popen[str]:
    """`sequencematch submit ...` in that folder. more: environment variables."""
    return subprocess.Popen(
        [str(BIN / program[0]), *program[1:], *arguments, "--address", head.address],
        cwd=folder,
        env=head.environment | more,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code and both outputs."""
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"did not end within {TIMEOUT_S:.0f} s: {process.communicate()}") from None
    return process.returncode, out, err


def run(head: RayHead, folder: Path, *arguments: str) -> tuple[int, str, str]:
    """`sequencematch submit ...` in that folder, to its end."""
    return ended(start(head, folder, *arguments))


def ray_job(head: RayHead, *arguments: str) -> str:
    """What Ray's own command prints, which the documentation shows."""
    code, out, err = ended(start(head, ROOT, *arguments, program=("ray", "job")))
    assert code == 0, out + err
    return out + err


def command_output(head: RayHead, *arguments: str) -> str:
    """Of a command that is not about the job server, on a node of the cluster."""
    command = [str(BIN / "sequencematch"), *arguments]
    return subprocess.run(
        command, env=head.environment, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=True
    ).stdout


def drivers(head: RayHead, name: str) -> list[int]:
    """Processes that drive a run."""
    return [process.pid for process in head.processes("launch.cli") if name in process.cmdline()]


def test_a_recipe_runs_on_the_cluster_and_its_log_and_end_are_told_here(head: RayHead, elsewhere: Path) -> None:
    code, out, err = run(head, elsewhere, "short.yaml", "--name", "done", "--no-evaluate")
    assert code == 0, out + err
    assert "run folder:" in out
    assert "run done: SUCCEEDED" in err
    assert "exit code 0" in err
    folder = elsewhere.parent / "runs" / "done"
    assert max(row["step"] for row in metrics_of(folder)) == 20
    assert not (folder / CLUSTER_FILE).exists()
    # By the tree that was sent, though the same packages are installed on the cluster.
    assert "working_dir_files" in (folder / "environment.txt").read_text().splitlines()[0]
    assert "succeeded" in ray_job(head, "status", "done")
    assert "run folder:" in ray_job(head, "logs", "done")
    assert "done" in ray_job(head, "list")
    code, out, err = run(head, elsewhere, "short.yaml", "--name", "done")
    assert (code, out) == (2, "")
    assert "choose another --name" in err
    assert not drivers(head, "done")


def test_ctrl_c_ends_the_following_and_stop_ends_the_run_which_can_be_resumed(head: RayHead, elsewhere: Path) -> None:
    long = ("short.yaml", "stages.pretrain.steps=1000000", "learner.checkpoint_every_steps=1000000", "--no-evaluate")
    folder = elsewhere.parent / "runs" / "endless"

    # The address that is given goes before that of the environment, other than in Ray's own client.
    job = (*long, "--name", "endless", "--env", "COLUMNS=77")
    follower = start(head, elsewhere, *job, RAY_ADDRESS="http://127.0.0.1:1")
    wait_until(lambda: len(metrics_of(folder)) > 0, TIMEOUT_S, "the run to take steps")
    (driver, *_) = head.processes("recipe.yaml --name endless")
    assert driver.environ()["COLUMNS"] == "77"
    assert RAY_JOB_VARIABLE in driver.environ()
    os.killpg(follower.pid, signal.SIGINT)
    code, _, err = ended(follower)
    assert code == 130
    assert "the run goes on" in err
    assert f"ray job stop endless --address {head.address}" in err
    assert "RUNNING" in ray_job(head, "status", "endless")
    assert json.loads(command_output(head, "status", str(folder), "--json"))["learner"]["stage"] == "pretrain"

    code, out, err = run(head, elsewhere, *long, "--name", "endless")
    assert (code, out) == (2, "")
    assert "on that cluster already (RUNNING)" in err

    ray_job(head, "stop", "endless")
    assert "stopped" in ray_job(head, "status", "endless")
    assert not drivers(head, "endless")
    assert not (folder / CLUSTER_FILE).exists()
    (checkpoint,) = (folder / "checkpoints" / "pretrain").glob("step-*")
    stopped_at = int(checkpoint.name.removeprefix("step-"))

    assert run(head, elsewhere, "--resume", str(folder), "--no-wait")[0] == 0
    wait_until(lambda: metrics_of(folder)[-1]["step"] > stopped_at, TIMEOUT_S, "the resumed run to take steps")
    (again,) = {name for name in ray_job(head, "list").split("'") if name.startswith("endless-")}
    ray_job(head, "stop", again)
    assert "stopped" in ray_job(head, "status", again)


def test_a_run_that_the_cluster_has_no_room_for_ends_with_2_here_too(head: RayHead, elsewhere: Path) -> None:
    code, out, err = run(head, elsewhere, "short.yaml", "learner.num_cpus=99", "--name", "huge")
    assert code == 2
    assert "error: the plan needs" in out
    assert "exit code 2" in err
    assert not (elsewhere.parent / "runs" / "huge" / CLUSTER_FILE).exists()
    assert not drivers(head, "huge")


def test_a_command_without_token_or_with_another_one_is_told_so(head: RayHead, elsewhere: Path) -> None:
    for token in ("", "another"):
        # At home a token of the user's would lie.
        process = start(head, elsewhere, "short.yaml", HOME=str(elsewhere), RAY_AUTH_TOKEN=token)
        code, out, err = ended(process)
        assert (code, out) == (2, "")
        assert "wants another token" in err
    assert not (elsewhere.parent / "runs").exists()


def test_rays_own_command_runs_the_repository(head: RayHead, elsewhere: Path) -> None:
    train = ("python", "-m", "launch.cli", "train", str(elsewhere / "short.yaml"), "--name", "plain", "--no-evaluate")
    command = [str(BIN / "ray"), "job", "submit", "--address", head.address, "--working-dir", ".", "--", *train]
    done = subprocess.run(
        command, cwd=ROOT, env=head.environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(row["step"] for row in metrics_of(elsewhere.parent / "runs" / "plain")) == 20
