"""Checkpoints at any fsspec URL (s3://, gs://, memory://, ...), where nothing can be renamed at one stroke.

    <url>/step-000400.1/   the files of a checkpoint, and COMPLETE, written last, with their names and sizes

The number after the dot counts the times that the step was written: what is there is never written over, so a
checkpoint stays complete until the one that replaces it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import fsspec

from buffer.run_identity import run_id
from learner.checkpoints.progress import PROGRESS_FILE, Progress
from learner.checkpoints.store import CheckpointStore, LocalCheckpoints, step_name

COMPLETE = "COMPLETE"
_ATTEMPT = re.compile(r"step-(\d{6,})\.(\d+)")


class RemoteCheckpoints:
    """Checkpoints of a stage below a URL; the newest has a copy in a local folder, where it was written first."""

    def __init__(self, url: str, local_folder: Path) -> None:
        """url: of the stage. local_folder: for the copy.

        Raises:
            ValueError: no file system goes by the URL's protocol. ImportError: the package for it is missing.
        """
        self._url = url.rstrip("/")
        self._files, self._root = fsspec.core.url_to_fs(self._url)
        self._local = LocalCheckpoints(local_folder)

    def steps(self) -> list[int]:
        return sorted(self._complete())

    def progress(self, step: int) -> Progress:
        return Progress.from_json(
            self._files.cat_file(f"{self._complete()[step]}/{PROGRESS_FILE}").decode(), self.location(step)
        )

    def folder(self, step: int) -> Path:
        """The local copy, fetched where there is none. OSError: it cannot be, or has other files than were written."""
        if step not in self._local.steps() or self._local.progress(step) != self.progress(step):
            remote = self._complete()[step]
            self._local.write(step, lambda folder: self._fetch(remote, folder))
        return self._local.folder(step)

    def location(self, step: int) -> str:
        """URL of the checkpoint, without the number of the attempt."""
        return f"{self._url}/{step_name(step)}"

    def write(self, step: int, fill: Callable[[Path], None]) -> None:
        """Fill a local folder, upload its files, and mark them complete. OSError: disk or storage refused; what was
        there before is still there."""
        self._local.write(step, fill)
        for other in self._local.steps():
            if other != step:
                self._local.remove(other)
        attempts = self._attempts()
        current = self._complete()
        # Also what killed processes left behind: uploads that did not end, deletions that did not begin.
        superseded = [path for (at, _), path in attempts.items() if at == step or current.get(at) != path]
        number = 1 + max((number for at, number in attempts if at == step), default=0)
        target = f"{self._root}/{step_name(step)}.{number}"
        source = self._local.folder(step)
        sizes = {}
        for path in sorted(source.rglob("*")):
            if path.is_file():
                name = path.relative_to(source).as_posix()
                self._files.makedirs(f"{target}/{name}".rpartition("/")[0], exist_ok=True)
                self._files.put_file(str(path), f"{target}/{name}")
                sizes[name] = path.stat().st_size
        self._files.pipe_file(f"{target}/{COMPLETE}", json.dumps({"files": sizes}, indent=1).encode())
        for old in superseded:
            self._delete(old)

    def remove(self, step: int) -> None:
        """Delete a checkpoint, and what was left of earlier attempts at it."""
        for (at, _), path in self._attempts().items():
            if at == step:
                self._delete(path)

    def _fetch(self, remote: str, folder: Path) -> None:
        sizes: dict[str, int] = json.loads(self._files.cat_file(f"{remote}/{COMPLETE}"))["files"]
        for name, size_bytes in sizes.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            self._files.get_file(f"{remote}/{name}", str(file))
            if file.stat().st_size != size_bytes:
                raise OSError(f"{remote}/{name} has {file.stat().st_size} bytes instead of {size_bytes}")

    def _attempts(self) -> dict[tuple[int, int], str]:
        """Path by (step, number of the attempt), complete or not."""
        self._files.invalidate_cache()
        try:
            paths = self._files.ls(self._root, detail=False)
        except FileNotFoundError:
            return {}
        found = {}
        for path in paths:
            if match := _ATTEMPT.fullmatch(path.rstrip("/").rpartition("/")[2]):
                found[int(match[1]), int(match[2])] = path.rstrip("/")
        return found

    def _complete(self) -> dict[int, str]:
        """Path of the newest complete attempt by step."""
        return {
            step: path
            for (step, _), path in sorted(self._attempts().items())
            if self._files.exists(f"{path}/{COMPLETE}")
        }

    def _delete(self, path: str) -> None:
        """The mark first: what is being emptied must not look complete."""
        if self._files.exists(f"{path}/{COMPLETE}"):
            self._files.rm_file(f"{path}/{COMPLETE}")
        self._files.rm(path, recursive=True)


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
