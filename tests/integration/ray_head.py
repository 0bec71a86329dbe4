"""A real Ray cluster on this machine: a head with its job server and any number of further raylets, with a token."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import requests

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.2
BIN = Path(sys.executable).parent


class RayHead:
    """Started by `ray start --head`; a context manager. Every process of it knows its token, and ends by that."""

    def __init__(self, *, num_cpus: int, workers: tuple[int, ...] = ()) -> None:
        """num_cpus: of the head node. workers: CPUs of each further node; the nodes have addresses of their own."""
        self.token = secrets.token_hex(16)
        # Ray's sockets lie in it, whose paths may have 107 characters.
        self._folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        self._port = _free_port()
        dashboard_port = _free_port()
        self.address = f"http://127.0.0.1:{dashboard_port}"
        self._num_nodes = 1 + len(workers)
        try:
            self._start(
                "127.0.0.2",
                num_cpus,
                "--head",
                f"--port={self._port}",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={dashboard_port}",
                f"--temp-dir={self._folder}",
            )
            for number, cpus in enumerate(workers):
                self._start(f"127.0.0.{3 + number}", cpus, f"--address=127.0.0.2:{self._port}")
            self._wait_for_nodes()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> RayHead:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        """For a command that speaks to the cluster, from any directory."""
        ours = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        return {
            **ours,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Everything that lives by the token of this cluster, commands of tests included, by its command line."""
        found = []
        for process in psutil.process_iter():
            try:
                theirs = process.environ().get("RAY_AUTH_TOKEN") == self.token
                if theirs and process.pid != os.getpid() and title in " ".join(process.cmdline()):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def stop(self) -> None:
        """End every process of the cluster, whatever it does, and remove its folder."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while left := self.processes():
            assert time.monotonic() < deadline, f"the cluster does not end: {left}"
            for process in left:
                try:
                    process.send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(left, timeout=POLL_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, node: str, num_cpus: int, *options: str) -> None:
        command = [
            str(BIN / "ray"),
            "start",
            *options,
            f"--node-ip-address={node}",
            f"--num-cpus={num_cpus}",
            f"--dashboard-agent-listen-port={_free_port()}",
            "--min-worker-port=0",
            "--max-worker-port=0",
            f"--object-store-memory={200 * 2**20}",
            "--disable-usage-stats",
        ]
        done = subprocess.run(
            command,
            env=self.environment,
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def _wait_for_nodes(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        headers = {"Authorization": f"Bearer {self.token}"}
        while True:
            answer = requests.get(f"{self.address}/nodes?view=summary", headers=headers, timeout=START_TIMEOUT_S)
            if answer.ok and len(answer.json()["data"]["summary"]) == self._num_nodes:
                return
            assert time.monotonic() < deadline, f"the nodes did not come: {answer.text}"
            time.sleep(POLL_S)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
