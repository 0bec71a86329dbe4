"""`sequencematch train` as people start it: a process of its own, from whose session everything it starts is found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa

from buffer.reading.snapshot import read_shard
from buffer.service.shard import present_shards
from buffer.trajectory.schema import ROW
from launch.monitoring.run_log import LOG_FILE
from launch.run_folder.folder import BUFFER_FOLDER, CLUSTER_FILE
from tests.processes import find_processes, in_session_of, send_to_all, wait_until

ROOT = Path(__file__).parents[2]
ARITHMETIC = "launch/recipes/arithmetic_cpu.yaml"
LEFTOVER_TIMEOUT_S = 30.0
REFUSAL_TIMEOUT_S = 120.0

# A run of seconds: one small layer, a few dozen steps, every version of the weights kept as a checkpoint.
TINY = (
    "model.hidden_size=64",
    "model.num_heads=2",
    "model.num_layers=1",
    "task.train_questions=200",
    "task.held_out_questions=20",
    "stages.pretrain.steps=20",
    "stages.pretrain.batch_size=8",
    "stages.sequencematch.steps=40",
    "stages.sequencematch.batch_size=8",
    "stages.sequencematch.rollout_batch_size=8",
    "stages.mle_control.steps=5",
    "stages.mle_control.batch_size=8",
    "learner.checkpoint_every_steps=10",
    "learner.keep_checkpoints=9",
    "actors.max_concurrent=16",
    "actors.insert_batch_size=8",
    "buffer.min_size=16",
    "buffer.max_staleness=2",
    "buffer.samples_per_insert=2",
    "buffer.fsync=none",
    "cluster.num_cpus=4",
    "cluster.object_store_gib=0.25",
)


class TrainProcess:
    """A running `sequencematch train`; a context manager that ends whatever is left of it."""

    def __init__(
        self,
        runs_folder: Path,
        *arguments: str,
        command: str = "train",
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        """command: of `sequencematch`; arguments, environment: its. The run folder will lie in `runs_folder`, as will
        what the command prints.
        """
        runs_folder.mkdir(parents=True, exist_ok=True)
        self._runs_folder = runs_folder
        words = [str(Path(sys.executable).with_name("sequencematch")), command, *arguments]
        if "--resume" not in arguments:
            words.append(f"runs_folder={runs_folder}")
        self._stdout_file = runs_folder / "stdout.txt"
        self._stderr_file = runs_folder / "stderr.txt"
        with self._stdout_file.open("w") as stdout, self._stderr_file.open("w") as stderr:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                cwd=ROOT,
                env={**environment, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
                start_new_session=True,
            )

    def __enter__(self) -> TrainProcess:
        return self

    def __exit__(self, *error: object) -> None:
        send_to_all(self.processes())
        self._process.wait(timeout=LEFTOVER_TIMEOUT_S)

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._stdout_file.read_text()

    @property
    def stderr(self) -> str:
        """What it has printed as errors so far."""
        return self._stderr_file.read_text()

    @property
    def folder(self) -> Path:
        """The run folder, once it is there."""
        (folder,) = (path for path in self._runs_folder.iterdir() if path.is_dir())
        return folder

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Processes of the run, the command itself included, whose command line contains `title`."""
        return find_processes(in_session_of(self._process.pid), title)

    def interrupt(self) -> None:
        """Ctrl-C: SIGINT to the whole foreground process group."""
        os.killpg(self._process.pid, signal.SIGINT)

    def terminate(self) -> None:
        """What a job system sends to the command alone."""
        self._process.terminate()

    def terminate_all(self) -> None:
        """What systemd and `scancel` send to every process at once."""
        send_to_all(self.processes(), signal.SIGTERM)

    def kill(self) -> None:
        """kill -9 of the command alone: it can end nothing that it started."""
        self._process.kill()

    def wait(self, timeout_s: float) -> int:
        """The exit code."""
        try:
            code = self._process.wait(timeout=timeout_s)
            assert "(raylet)" not in self.stdout, f"Ray printed into the display\n{self.printed()}"
            return code
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run did not end within {timeout_s:.0f} s\n{self.printed()}") from None

    def wait_until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait for something the run does; fails at once where the run ends before."""

        def reached() -> bool:
            if condition():
                return True
            assert self._process.poll() is None, f"the run ended while the test waited for {what}\n{self.printed()}"
            return False

        wait_until(reached, timeout_s, lambda: f"{what}\n{self.printed()}")

    def assert_nothing_left(self, besides: Sequence[str] = (), timeout_s: float = LEFTOVER_TIMEOUT_S) -> None:
        """Every process of the run ends; the last ones see the end of the others and need a moment.

        besides: names of those that may take longer.
        """

        def left() -> list[psutil.Process]:
            return [process for process in self.processes() if name_of(process) not in besides]

        wait_until(lambda: not left(), timeout_s, lambda: f"the end of {left()}")

    def printed(self) -> str:
        """Both outputs, for messages."""
        return f"stdout:\n{self.stdout}\nstderr:\n{self.stderr}"

    def step(self, stage: str) -> int:
        """Newest logged step of a stage; 0 before the first."""
        folders = [path for path in self._runs_folder.iterdir() if path.is_dir()]
        return max((int(row["step"]) for row in metrics_of(folders[0], stage)), default=0) if folders else 0


def name_of(process: psutil.Process) -> str:
    """Empty where it has ended."""
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def refusal_of(runs_folder: Path, *arguments: str) -> str:
    """The one error line of a command that must refuse what it was given, and leave nothing behind."""
    with TrainProcess(runs_folder, *arguments) as process:
        code = process.wait(REFUSAL_TIMEOUT_S)
        process.assert_nothing_left()
        lines = [line for line in process.stderr.splitlines() if line.strip()]
        assert code == 2, process.printed()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:], process.printed()
        assert "Traceback" not in process.stdout + process.stderr
    assert not list(runs_folder.glob(f"*/{CLUSTER_FILE}"))
    return lines[-1]


def metrics_of(folder: Path, stage: str | None = None) -> list[dict[str, float]]:
    """Complete lines of a run's metrics, of one stage or of all."""
    return [row for row in _lines(folder / "metrics.jsonl") if stage in (None, row["stage"])]


def trajectory_of(folder: Path, event: str | None = None) -> list[dict[str, Any]]:
    """Complete lines of a run's log, of one kind of event or of all."""
    return [line for line in _lines(folder / LOG_FILE) if event in (None, line["event"])]


def _lines(file: Path) -> list[dict[str, Any]]:
    complete = file.read_text(encoding="utf-8").rpartition("\n")[0] if file.is_file() else ""
    return [json.loads(line) for line in complete.splitlines()]


def trajectories_of(folder: Path) -> list[pa.RecordBatch]:
    """Every batch in the segment files of a run, of all shards, as it was handed in."""
    shards = [read_shard(shard) for shard in present_shards(folder / BUFFER_FOLDER)]
    return [batch.drop_columns([ROW]) for shard in shards for batch in shard.stored.to_batches()]
