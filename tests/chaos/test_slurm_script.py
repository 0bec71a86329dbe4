"""docker/slurm.sbatch with a real Ray on this machine: only Slurm's commands and the run itself are stand-ins."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.dockerfiles import ROOT
from tests.processes import find_processes, in_session_of, send_to_all, wait_until

TIMEOUT_S = 240.0
pytestmark = pytest.mark.timeout(2 * TIMEOUT_S)

SRUN = """#!{python}
# On "the node": what follows Slurm's own options. Signals go to all processes of the step.
import signal, subprocess, sys
import psutil
words = sys.argv[1:]
while words[0].startswith("--"):
    del words[0]
task = subprocess.Popen(words)
def forward(number, frame):
    for each in [*psutil.Process(task.pid).children(recursive=True), task]:
        each.send_signal(number)
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, forward)
sys.exit(task.wait())
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
"show hostnames") echo only-node ;;
"show job") echo "   JobState=$JOB_STATE Dependency=(null)
   StartTime=Unknown EndTime=$(date -d "+$SECONDS_LEFT seconds" +%FT%T) Deadline=N/A" ;;
"requeue $SLURM_JOB_ID") echo requeued >>"${0%/*}/requeued" ;;
esac
"""
RUN = """#!{python}
import json, os, signal, sys, time
from pathlib import Path
import launch, ray
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
def stop(number, frame):  # Ray has set one of its own
    time.sleep(5)  # a checkpoint is written
    sys.exit(75 if ray.cluster_resources() == seen["resources"] else 9)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, stop)
seen = dict(arguments=sys.argv[1:], resources=ray.cluster_resources(), token=len(os.environ["RAY_AUTH_TOKEN"]))
Path({seen!r}).write_text(json.dumps(seen))
if "--wait" in sys.argv:
    time.sleep({timeout_s})
sys.exit(3)
"""


class Allocation:
    """The script under way, with the folder of its stand-ins."""

    def __init__(
        self, folder: Path, *arguments: str, job_state: str = "RUNNING Reason=None", seconds_left: int = 10**6
    ) -> None:
        binaries = folder / "bin"
        binaries.mkdir()
        self.seen = folder / "seen.json"
        self.requeued = binaries / "requeued"
        run = RUN.format(python=sys.executable, seen=str(self.seen), timeout_s=TIMEOUT_S)
        for name, text in (
            ("srun", SRUN.format(python=sys.executable)),
            ("scontrol", SCONTROL),
            ("sequencematch", run),
        ):
            (binaries / name).write_text(text)
            (binaries / name).chmod(0o755)
        for name in ("python", "ray"):  # no links: Python looks for its environment beside the name it was called by
            (binaries / name).write_text(f'#!/bin/sh\nexec {Path(sys.executable).with_name(name)} "$@"\n')
            (binaries / name).chmod(0o755)
        # Not below `folder`: the path of a Unix socket has at most 107 bytes.
        self.ray_folder = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        environment = os.environ | {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "BIN": str(binaries),
            "JOB_STATE": job_state,
            "SECONDS_LEFT": str(seconds_left),
            "SLURM_JOB_ID": "1",
            "SLURM_JOB_NODELIST": "only-node",
            "SLURM_CPUS_PER_TASK": "1",
            "RAY_TMPDIR": self.ray_folder.name,
        }
        self.process = subprocess.Popen(
            ["bash", str(ROOT / "docker" / "slurm.sbatch"), *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def end(self) -> tuple[int, str]:
        """Exit code and output."""
        output, _ = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, output

    def left(self) -> list[psutil.Process]:
        """Processes of its session."""
        return find_processes(in_session_of(self.process.pid))

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        wait_until(lambda: condition() or self.process.poll() is not None, TIMEOUT_S, what)
        assert self.process.poll() is None, self.end()

    def kill(self) -> None:
        send_to_all(self.left())
        self.ray_folder.cleanup()


@pytest.mark.parametrize(
    ("how", "job_state", "code", "requeued"),
    [
        ("it fails", "RUNNING Reason=None", 3, False),  # after a notice of the time limit that came before it began
        ("all are told", "COMPLETING Reason=None", 75, False),  # as by scancel
        ("all are told", "COMPLETING Reason=TimeLimit", 75, True),
        ("the time is up", "RUNNING Reason=None", 75, True),
    ],
)
def test_a_run_gets_a_cluster_with_a_token_and_its_exit_code_is_the_jobs(
    tmp_path: Path, how: str, job_state: str, code: int, requeued: bool
) -> None:
    """A run that is asked to stop finds Ray as it was, whoever else has received the signal."""
    options = [] if how == "it fails" else ["--wait"]
    allocation = Allocation(
        tmp_path,
        "recipe.yaml",
        "actors.count=2",
        *options,
        job_state=job_state,
        seconds_left=60 if how == "the time is up" else 10**6,
    )
    try:
        allocation.wait_until(lambda: catches(allocation.process.pid, signal.SIGUSR1), "the script to begin")
        if how == "it fails":
            allocation.process.send_signal(signal.SIGUSR1)
        else:
            allocation.wait_until(allocation.seen.is_file, "the run to begin")
        if how == "all are told":
            send_to_all(allocation.left(), signal.SIGTERM)
        found, output = allocation.end()
        assert found == code, output
        assert allocation.requeued.is_file() == requeued
        seen = json.loads(allocation.seen.read_text())
        assert seen["arguments"][:3] == ["train", "recipe.yaml", "actors.count=2"]
        assert seen["arguments"][-3:] == ["--name", "slurm-1", "--resume-if-exists"]
        assert seen["resources"]["training"] == 8.0
        assert seen["token"] == 64
        wait_until(lambda: not allocation.left(), 30.0, lambda: f"the end of {allocation.left()}")
    finally:
        allocation.kill()


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (caught,) = (int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (number - 1) & 1)


def test_without_a_recipe_nothing_starts(tmp_path: Path) -> None:
    allocation = Allocation(tmp_path)
    try:
        code, output = allocation.end()
        assert code == 2
        assert "give what `sequencematch train` takes" in output
        wait_until(lambda: not allocation.left(), 30.0, lambda: f"the end of {allocation.left()}")
    finally:
        allocation.kill()
