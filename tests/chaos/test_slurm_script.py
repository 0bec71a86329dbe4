"""docker/slurm.sbatch with a real Ray on this machine: only Slurm's commands and the run itself are stand-ins."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from tests.dockerfiles import ROOT

TIMEOUT_S = 240.0
pytestmark = pytest.mark.timeout(2 * TIMEOUT_S)

SRUN = """#!/usr/bin/env bash
# On "the node": what follows Slurm's own options.
while [ "${1:0:2}" = "--" ]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
echo only-node
"""
RUN = """#!{python}
import json, os, signal, sys, time
from pathlib import Path
import launch, ray
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))  # Ray has set one of its own
seen = dict(arguments=sys.argv[1:], resources=ray.cluster_resources(), token=len(os.environ["RAY_AUTH_TOKEN"]))
Path({seen!r}).write_text(json.dumps(seen))
if "--wait" in sys.argv:
    time.sleep({timeout_s})
sys.exit(3)
"""


class Allocation:
    """The script under way, with the folder of its stand-ins."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        binaries = folder / "bin"
        binaries.mkdir()
        self.seen = folder / "seen.json"
        run = RUN.format(python=sys.executable, seen=str(self.seen), timeout_s=TIMEOUT_S)
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sequencematch", run)):
            (binaries / name).write_text(text)
            (binaries / name).chmod(0o755)
        for name in ("python", "ray"):  # no links: Python looks for its environment beside the name it was called by
            (binaries / name).write_text(f'#!/bin/sh\nexec {Path(sys.executable).with_name(name)} "$@"\n')
            (binaries / name).chmod(0o755)
        # Not below `folder`: the path of a Unix socket has at most 107 bytes.
        self.ray_folder = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "BIN": str(binaries),
            "PORT": str(port),
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
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def kill(self) -> None:
        for process in self.left():
            with contextlib.suppress(psutil.NoSuchProcess):  # the death of one ends others
                process.kill()
        self.ray_folder.cleanup()


def none_left(allocation: Allocation) -> bool:
    deadline = time.monotonic() + 30.0
    while allocation.left() and time.monotonic() < deadline:
        time.sleep(0.2)
    return not allocation.left()


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_run_gets_a_cluster_with_a_token_and_its_exit_code_is_the_jobs(tmp_path: Path, interrupted: bool) -> None:
    allocation = Allocation(tmp_path, "recipe.yaml", "actors.count=2", *(["--wait"] if interrupted else []))
    try:
        if interrupted:
            deadline = time.monotonic() + TIMEOUT_S
            while not allocation.seen.is_file():
                assert time.monotonic() < deadline, "the run did not begin"
                assert allocation.process.poll() is None, allocation.end()
                time.sleep(0.2)
            allocation.process.send_signal(signal.SIGTERM)  # as --signal=B:TERM does: to the script alone
        code, output = allocation.end()
        assert code == (7 if interrupted else 3), output
        seen = json.loads(allocation.seen.read_text())
        assert seen["arguments"][:3] == ["train", "recipe.yaml", "actors.count=2"]
        assert seen["resources"]["training"] == 8.0
        assert seen["token"] == 64
        assert none_left(allocation), allocation.left()
    finally:
        allocation.kill()


def test_without_a_recipe_nothing_starts(tmp_path: Path) -> None:
    allocation = Allocation(tmp_path)
    try:
        code, output = allocation.end()
        assert code == 2
        assert "give what `sequencematch train` takes" in output
        assert none_left(allocation)
    finally:
        allocation.kill()
