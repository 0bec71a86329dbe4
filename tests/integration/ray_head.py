"""A real Ray cluster on this machine: a head with its job server and any number of further raylets, with a token."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import requests

from launch import RAY_START_TIMEOUT_S, RAY_START_VARIABLES
from tests.integration.fake_provider import HEAD_ENVIRONMENT, autoscaling_config
from tests.integration.train_process import name_of
from tests.processes import find_processes, send_to_all, wait_until

START_TIMEOUT_S = RAY_START_TIMEOUT_S + 60.0
STOP_TIMEOUT_S = 30.0
BIN = Path(sys.executable).parent

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Every node has them as long as it lives. Mostly they hide their environment and are not found by their token."""


class RayHead:
    """Started by `ray start --head`; a context manager. Every process of it knows its token, and ends by that."""

    def __init__(
        self,
        *,
        num_cpus: int,
        workers: tuple[int, ...] = (),
        node: str = "127.0.0.2",
        resources: Mapping[str, float] | None = None,
        system: Mapping[str, str] | None = None,
        grows_by: Mapping[str, float] | None = None,
    ) -> None:
        """num_cpus, node, resources: of the head node, which has the address `node`. workers: CPUs of each further
        node; the nodes have addresses of their own. system: settings of Ray itself, as environment variables (RAY_...).
        grows_by: resources of each node that Ray's autoscaler adds (see `tests.integration.fake_provider`).
        """
        self._system = dict(system or {})
        self.token = secrets.token_hex(16)
        # Ray's sockets lie in it, whose paths may have 107 characters.
        self._folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        self._port = _free_port()
        dashboard_port = _free_port()
        self.address = f"http://127.0.0.1:{dashboard_port}"
        self.gcs_address = f"{node}:{self._port}"
        autoscaling, environment = (), {}
        if grows_by is not None:
            config_file = self._folder / "autoscaling.yaml"
            config_file.write_text(json.dumps(autoscaling_config(self.gcs_address, grows_by)))
            autoscaling, environment = (f"--autoscaling-config={config_file}",), HEAD_ENVIRONMENT
        try:
            self._start(
                node,
                num_cpus,
                *autoscaling,
                f"--resources={json.dumps(dict(resources or {}))}",
                "--head",
                f"--port={self._port}",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={dashboard_port}",
                f"--temp-dir={self._folder}",
                environment=environment,
            )
            for number, cpus in enumerate(workers):
                self._start(f"127.0.0.{3 + number}", cpus, f"--address={self.gcs_address}")
            self._wait_for_nodes(node, *(f"127.0.0.{3 + number}" for number in range(len(workers))))
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
        ours = {
            key: value for key, value in os.environ.items() if not key.startswith("RAY_") or key in RAY_START_VARIABLES
        }
        return {
            **ours,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            **self._system,
        }

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Everything that lives by the token of this cluster, commands of tests included, by its command line."""

        def belongs(process: psutil.Process) -> bool:
            return process.pid != os.getpid() and process.environ().get("RAY_AUTH_TOKEN") == self.token

        return find_processes(belongs, title)

    def workers(self) -> list[psutil.Process]:
        """What Ray has started for actors and tasks, idle or not; without the agents of its nodes."""
        return [each for each in self.processes("ray::") if (name := name_of(each)) and name not in AGENTS]

    def add_node(self, node: str, num_cpus: int, resources: Mapping[str, float], within: Sequence[str] = ()) -> None:
        """Start one more node, with the address `node`; returns when the head knows of it.

        within: command that starts it in another place, such as `ip netns exec NAME`.
        """
        options = (f"--resources={json.dumps(dict(resources))}", f"--address={self.gcs_address}")
        self._start(node, num_cpus, *options, within=within)
        self._wait_for_nodes(node)

    def raylets(self) -> list[psutil.Process]:
        """Of all nodes."""
        return [each for each in self.processes("raylet") if name_of(each) == "raylet"]

    def live_nodes(self) -> set[str]:
        """Addresses of the nodes that the head takes for alive; none while it does not answer."""
        headers = {"Authorization": f"Bearer {self.token}"}
        answer = requests.get(f"{self.address}/nodes?view=summary", headers=headers, timeout=START_TIMEOUT_S)
        summary = answer.json()["data"]["summary"] if answer.ok else []
        return {each["ip"] for each in summary if each["raylet"].get("state") == "ALIVE"}

    def assert_idle(self) -> None:
        """No worker holds an actor or a task any more, after a moment; idle ones stay with their node."""

        def busy() -> list[psutil.Process]:
            return [each for each in self.workers() if "IDLE" not in name_of(each)]

        wait_until(lambda: not busy(), STOP_TIMEOUT_S, lambda: f"the end of {busy()}")

    def stop(self) -> None:
        """End every process of the cluster, whatever it does, and remove its folder."""

        def ended() -> bool:
            send_to_all(left := self.processes())
            return not left

        wait_until(ended, STOP_TIMEOUT_S, lambda: f"the end of {self.processes()}")
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(
        self,
        node: str,
        num_cpus: int,
        *options: str,
        within: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        command = [
            *within,
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
            env={**self.environment, **(environment or {})},
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def _wait_for_nodes(self, *nodes: str) -> None:
        wait_until(lambda: set(nodes) <= self.live_nodes(), START_TIMEOUT_S, f"the nodes {', '.join(nodes)}")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
