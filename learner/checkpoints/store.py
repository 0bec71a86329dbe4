"""The checkpoints of a stage: how far each is, where they lie, and which are kept. Nothing here needs torch.

A checkpoint is a folder `step-<n>`, complete or absent, whenever the process is killed: in a file system it is renamed
into place (`LocalCheckpoints`), in object storage a file COMPLETE is written last (`RemoteCheckpoints`). A step is
written once, since training goes on from the newest checkpoint.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import fsspec

from buffer.disk import is_disk_full, sync_folder, writing_to
from buffer.processes import run_id
from buffer.trajectory.schema import TokenContract
from learner.settings.held_out import STOPPED_EARLY

PROGRESS_FILE = "progress.json"
DURABLE_FILE = "checkpoints.json"
COMPLETE = "COMPLETE"
_CHECKPOINT = re.compile(r"step-(\d{6}|[1-9]\d{6,})")


@dataclass(frozen=True)
class Progress:
    """How far a checkpoint is, and what its token ids mean: a small file that people can read.

    policy_version: newest published; -1 before any. first_policy_version: what the stage's rollouts started with; -1
    in a stage without rollouts. expert_stream: position in the expert data. metrics: mean of each over the steps since
    the checkpoint before, and `held_out_loss` where it was measured at this step. held_out: `StageEvaluation.state`.
    """

    stage: str
    step: int
    stage_steps: int
    policy_version: int
    first_policy_version: int
    expert_stream: dict[str, int]
    contract: TokenContract
    metrics: dict[str, float] = field(default_factory=dict)
    held_out: dict[str, float] = field(default_factory=dict)

    @property
    def steps_done(self) -> int:
        """Those taken; all that the stage was to take where evaluations ended it early (`evaluation.patience`)."""
        return self.stage_steps if STOPPED_EARLY in self.held_out else self.step

    @property
    def finished(self) -> bool:
        return self.steps_done >= self.stage_steps

    def to_json(self) -> str:
        """As it stands in the file."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Progress:
        """Read it back. where: names the checkpoint in a ValueError: the text is not that of this program."""
        try:
            fields = json.loads(text)
            return cls(**{**fields, "contract": TokenContract(**fields["contract"])})
        except (KeyError, TypeError, ValueError) as error:  # other fields, or no JSON
            raise ValueError(f"{where} is not a training checkpoint: its {PROGRESS_FILE} is wrong ({error})") from error


def read_progress(checkpoint: Path) -> Progress:
    """Progress of one checkpoint. ValueError: the folder is not a checkpoint of this program."""
    file = checkpoint / PROGRESS_FILE
    if not file.is_file():
        raise ValueError(f"{checkpoint} is not a training checkpoint: it has no {PROGRESS_FILE}")
    return Progress.from_json(file.read_bytes(), str(checkpoint))


def check_contract(progress: Progress, contract: TokenContract, where: str) -> None:
    """Raise ValueError for a checkpoint whose token ids mean something else."""
    if progress.contract != contract:
        raise ValueError(
            f"checkpoint {where} was trained with other tokens ({progress.contract}) than this run has ({contract}): "
            "resume with the task, tokenizer and backspace token that it was trained with, or start a new run"
        )


def note_durable(run_folder: Path, progress: Progress) -> None:
    """Remember in the run folder that there is a checkpoint, wherever checkpoints lie. OSError, which names the file:
    the disk refused."""
    file = run_folder / DURABLE_FILE
    temporary = file.with_name(f"{file.name}.tmp")
    with writing_to(temporary):
        temporary.write_text(json.dumps(durable_steps(run_folder) | {progress.stage: progress.step}), encoding="utf-8")
    temporary.rename(file)


def durable_steps(run_folder: Path) -> dict[str, int]:
    """Step of the newest checkpoint that a run has written, by stage; whether it is still there is another matter."""
    file = run_folder / DURABLE_FILE
    steps: dict[str, int] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return steps


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:06d}"


class LocalCheckpoints:
    """The checkpoints of a stage in a folder, filled and emptied under a `.tmp` name only. One process writes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, ascending."""
        if not self._folder.is_dir():
            return []
        return _steps_of(path.name for path in self._folder.iterdir() if path.is_dir())

    def progress(self, step: int) -> Progress:
        """Progress of a checkpoint. ValueError: it is not one of this program."""
        return read_progress(self.folder(step))

    def folder(self, step: int) -> Path:
        """The folder that holds, or would hold, the checkpoint of a step."""
        return self._folder / step_name(step)

    def location(self, step: int) -> str:
        """Where the checkpoint of a step is, or would be, for people."""
        return str(self.folder(step))

    def write(self, step: int, fill: Callable[[Path], None]) -> None:
        """Let `fill` write the files into an empty folder, make them durable, and rename it into place. OSError: the
        disk refused."""
        for leftover in self._folder.glob("step-*.tmp"):  # of a process that was killed
            shutil.rmtree(leftover)
        temporary = self._folder / f"{step_name(step)}.tmp"
        temporary.mkdir(parents=True)
        try:
            fill(temporary)
            for path in (*temporary.rglob("*"), temporary):
                sync_folder(path)
        except Exception as error:
            if is_disk_full(error):  # the log of the run and the buffer need room to end well
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        temporary.rename(self.folder(step))
        sync_folder(self._folder)

    def remove(self, step: int) -> None:
        """Delete a checkpoint; renamed first, since a folder that is being emptied must not look complete."""
        path = self.folder(step)
        doomed = path.rename(path.with_name(f"{path.name}.removed.tmp"))
        shutil.rmtree(doomed)


class RemoteCheckpoints:
    """The checkpoints of a stage below an fsspec URL (s3://, gs://, memory://, ...), with the interface of
    `LocalCheckpoints`. The newest has a copy in a local folder, where it was written first."""

    def __init__(self, url: str, local_folder: Path) -> None:
        """ValueError: no file system goes by the URL's protocol. ImportError: the package for it is missing."""
        self._url = url.rstrip("/")
        self._files, self._root = fsspec.core.url_to_fs(self._url)
        self._copies = LocalCheckpoints(local_folder)

    def steps(self) -> list[int]:
        return [step for step in self._begun() if self._files.exists(f"{self._path(step)}/{COMPLETE}")]

    def progress(self, step: int) -> Progress:
        """As in a folder. OSError: it cannot be read."""
        return Progress.from_json(self._files.cat_file(f"{self._path(step)}/{PROGRESS_FILE}"), self.location(step))

    def folder(self, step: int) -> Path:
        """The local copy, fetched where there is none. OSError: it cannot be, or has other files than were written."""
        is_there = step in self._copies.steps()
        if not is_there or self._copies.progress(step) != self.progress(step):
            if is_there:
                self._copies.remove(step)
            self._copies.write(step, partial(self._fetch, self._path(step)))
        return self._copies.folder(step)

    def location(self, step: int) -> str:
        return f"{self._url}/{step_name(step)}"

    def write(self, step: int, fill: Callable[[Path], None]) -> None:
        """Fill a local folder, upload its files, and mark them complete. OSError: disk or storage refused."""
        for old in self._copies.steps():
            self._copies.remove(old)
        self._copies.write(step, fill)
        for leftover in set(self._begun()) - set(self.steps()):  # of processes that were killed
            self.remove(leftover)
        source, target = self._copies.folder(step), self._path(step)
        files = [path for path in source.rglob("*") if path.is_file()]
        sizes = {path.relative_to(source).as_posix(): path.stat().st_size for path in files}
        for parent in {f"{target}/{name}".rpartition("/")[0] for name in sizes}:
            self._files.makedirs(parent, exist_ok=True)
        self._files.put([str(path) for path in files], [f"{target}/{name}" for name in sizes])
        self._files.pipe_file(f"{target}/{COMPLETE}", json.dumps({"files": sizes}, indent=1).encode())

    def remove(self, step: int) -> None:
        """Delete a checkpoint, complete or not; the mark first, since what is being emptied must not look complete."""
        path = self._path(step)
        if self._files.exists(f"{path}/{COMPLETE}"):
            self._files.rm_file(f"{path}/{COMPLETE}")
        self._files.rm(path, recursive=True)

    def _fetch(self, path: str, folder: Path) -> None:
        sizes: dict[str, int] = json.loads(self._files.cat_file(f"{path}/{COMPLETE}"))["files"]
        self._files.get([f"{path}/{name}" for name in sizes], [str(folder / name) for name in sizes])
        for name, size_bytes in sizes.items():
            if (found := (folder / name).stat().st_size) != size_bytes:
                raise OSError(f"{path}/{name} has {found} bytes instead of {size_bytes}")

    def _path(self, step: int) -> str:
        return f"{self._root}/{step_name(step)}"

    def _begun(self) -> list[int]:
        """Steps of which there are files, ascending: complete, half uploaded or half removed."""
        self._files.invalidate_cache()
        try:
            paths = self._files.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        return _steps_of(path.rstrip("/").rpartition("/")[2] for path in paths)


CheckpointStore = LocalCheckpoints | RemoteCheckpoints


def open_checkpoints(url: str | None, run_folder: Path, stage: str) -> CheckpointStore:
    """The checkpoints of a run's stage: in the run folder, or below `url`, in a folder with the name that the run was
    given when it began. Raises as `RemoteCheckpoints`."""
    local_folder = run_folder / "checkpoints" / stage
    if url is None:
        return LocalCheckpoints(local_folder)
    files, root = fsspec.core.url_to_fs(url)
    if "file" in files.protocol:
        return LocalCheckpoints(Path(root) / run_id(run_folder) / stage)
    return RemoteCheckpoints(f"{url.rstrip('/')}/{run_id(run_folder)}/{stage}", local_folder)


def check_writable(url: str | None, run_folder: Path) -> None:
    """Write and remove a small file where the checkpoints of a run will lie. OSError, which names the place: that
    failed. Else it raises as `RemoteCheckpoints`."""
    files, root = fsspec.core.url_to_fs(str(run_folder / "checkpoints") if url is None else url)
    parent = root if url is None else f"{root.rstrip('/')}/{run_id(run_folder)}"
    file = f"{parent}/writable.tmp"
    try:
        files.makedirs(parent, exist_ok=True)
        files.pipe_file(file, b"yes")
        files.rm_file(file)
    except OSError as error:
        raise OSError(
            f"checkpoints cannot be written to {parent}: {error}; give permission there, or choose another place with "
            "learner.checkpoint_dir"
        ) from error


def remove_superseded(store: CheckpointStore, keep: int, best_metric: str | None) -> None:
    """Delete all checkpoints but the `keep` newest and, by the least mean of `best_metric`, the best (of equals the
    earliest)."""
    assert keep > 0
    steps = store.steps()
    kept = set(steps[-keep:])
    if best_metric is not None:
        means = {step: store.progress(step).metrics.get(best_metric) for step in steps}
        measured = {step: mean for step, mean in means.items() if mean is not None}
        kept |= set(sorted(measured, key=lambda step: (measured[step], step))[:1])
    for step in set(steps) - kept:
        store.remove(step)


def _steps_of(names: Iterable[str]) -> list[int]:
    return sorted(int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name)))
