"""Where checkpoints lie: what a kill at any moment leaves behind, in a folder and in object storage; what is kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from learner.checkpoints.store import (
    PROGRESS_FILE,
    CheckpointStore,
    LocalCheckpoints,
    RemoteCheckpoints,
    open_checkpoints,
    remove_superseded,
)
from tests.checkpoints import progress_at

FILES = ("a.txt", "adapter/b.txt", "c.txt")
URL = "memory://bucket/runs"


def filler(step: int, mark: int, **changes: object) -> Callable[[Path], None]:
    """Writes a small checkpoint whose files all hold `mark`; the version in its progress is the mark too."""

    def fill(folder: Path) -> None:
        for name in FILES:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(str(mark))
        (folder / PROGRESS_FILE).write_text(progress_at(step, policy_version=mark, **changes).to_json())

    return fill


def mark_of(store: CheckpointStore, step: int) -> int:
    """What a checkpoint holds; all of its files are from one write."""
    folder = store.folder(step)
    marks = {int((folder / name).read_text()) for name in FILES}
    assert marks == {store.progress(step).policy_version}
    (mark,) = marks
    return mark


@pytest.fixture(params=["local", "memory"])
def opened(request, tmp_path) -> Callable[[], CheckpointStore]:
    """Opens the same place as often as one likes, as one process after the other does."""
    storage = fsspec.filesystem("memory")
    if storage.exists("/bucket"):
        storage.rm("/bucket", recursive=True)
    url = None if request.param == "local" else URL
    return lambda: open_checkpoints(url, tmp_path / "run", "pretrain")


def test_checkpoints_are_written_listed_read_and_removed(opened):
    store = opened()
    assert store.steps() == []
    for step in (7, 1_000_000, 999_999):
        store.write(step, filler(step, step))
    assert store.steps() == [7, 999_999, 1_000_000]
    again = opened()
    assert again.steps() == store.steps()
    assert [mark_of(again, step) for step in again.steps()] == [7, 999_999, 1_000_000]
    again.remove(999_999)
    assert opened().steps() == [7, 1_000_000]


def test_the_newest_and_the_best_are_kept(opened):
    store = opened()
    for step, loss in ((1, 0.5), (2, 0.3), (3, 0.3), (4, 0.9), (5, None), (6, 0.4)):
        store.write(step, filler(step, step, metrics={} if loss is None else {"loss": loss, "other": -loss}))
        remove_superseded(store, keep=2, best_metric="loss")
    assert store.steps() == [2, 5, 6], "of equals the earliest"
    remove_superseded(store, keep=2, best_metric="other")
    assert store.steps() == [5, 6], "the one that was best by this is gone, so the best is among the newest"
    remove_superseded(store, keep=1, best_metric=None)
    assert store.steps() == [6]
    with pytest.raises(AssertionError):
        remove_superseded(store, keep=0, best_metric=None)


def test_what_is_not_a_checkpoint_is_neither_listed_nor_removed(tmp_path):
    for name in ("step-7", "step-000001x", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000003").write_text("a file")
    store = LocalCheckpoints(tmp_path)
    for step in (7, 8):
        store.write(step, filler(step, step))
        remove_superseded(store, keep=1, best_metric=None)
    assert store.steps() == [8]
    assert {"step-000001x", "notes", "step-000003", "step-7"} <= {path.name for path in tmp_path.iterdir()}


def test_places_by_url(tmp_path):
    run = tmp_path / "run"
    assert open_checkpoints(None, run, "a").location(7) == str(run / "checkpoints/a/step-000007")
    for url in (f"{tmp_path}/x", f"file://{tmp_path}/x"):
        store = open_checkpoints(url, run, "a")
        assert isinstance(store, LocalCheckpoints)
        assert store.location(7) == f"{tmp_path}/x/run/a/step-000007"
    assert open_checkpoints(URL, run, "a").location(7) == f"{URL}/run/a/step-000007"
    with pytest.raises(ValueError, match="Protocol not known: nowhere"):
        open_checkpoints("nowhere://x", run, "a")


class KilledError(Exception):
    """Stands for the death of the process: nothing after it runs."""


def die_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    """Let the `call`-th use of a function (from 0) end the process instead."""
    original, calls = getattr(owner, name), iter(range(10**6))

    def dying(*args, **kwargs):
        if next(calls) == call:
            raise KilledError
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, dying)


LOCAL_MOMENTS = [
    (Path, "mkdir", 1),
    (os, "fsync", 0),
    (os, "fsync", 4),
    (Path, "rename", 0),
    (Path, "rename", 1),
    (shutil, "rmtree", 0),
    (os, "rmdir", 0),
    (os, "unlink", 2),
]
MEMORY = type(fsspec.filesystem("memory"))
REMOTE_MOMENTS = [
    (MEMORY, "put_file", 0),
    (MEMORY, "put_file", 3),
    (MEMORY, "pipe_file", 0),
    (MEMORY, "rm_file", 0),
    (MEMORY, "rm", 0),
    (Path, "rename", 0),
    (shutil, "rmtree", 0),
]


def check_kill(opened, monkeypatch, moment) -> None:
    """Kill the second of two writes, with keep=1; then a third process writes one more."""

    def write(step: int, mark: int) -> None:
        store = opened()
        store.write(step, filler(step, mark))
        remove_superseded(store, keep=1, best_metric=None)

    write(7, 3)
    with monkeypatch.context() as patch:
        die_at(patch, *moment)
        with pytest.raises(KilledError):
            write(8, 4)
    store = opened()
    assert store.steps(), "no checkpoint is left"
    for found in store.steps():
        assert mark_of(store, found) == (4 if found == 8 else 3)

    # The process that comes after it goes on from the newest, and ends with one checkpoint and nothing half-written.
    step = store.steps()[-1] + 1
    write(step, 5)
    assert store.steps() == [step]
    assert mark_of(store, step) == 5


@pytest.mark.parametrize("moment", LOCAL_MOMENTS, ids=lambda moment: f"{moment[1]}-{moment[2]}")
def test_a_kill_at_any_moment_leaves_a_complete_newest_checkpoint(tmp_path, monkeypatch, moment):
    check_kill(lambda: LocalCheckpoints(tmp_path), monkeypatch, moment)
    assert [path.name for path in tmp_path.iterdir()] in (["step-000008"], ["step-000009"])


@pytest.mark.parametrize("moment", REMOTE_MOMENTS, ids=lambda moment: f"{moment[1]}-{moment[2]}")
def test_a_kill_at_any_moment_leaves_a_complete_newest_checkpoint_in_storage(tmp_path, monkeypatch, moment):
    storage = fsspec.filesystem("memory")
    if storage.exists("/bucket"):
        storage.rm("/bucket", recursive=True)
    check_kill(lambda: RemoteCheckpoints(f"{URL}/run/pretrain", tmp_path), monkeypatch, moment)
    (name,) = {path.split("/")[5] for path in storage.find("/bucket")}
    assert name in ("step-000008", "step-000009")


def test_another_machine_fetches_what_was_uploaded(tmp_path):
    RemoteCheckpoints(f"{URL}/fetched", tmp_path / "a").write(7, filler(7, 1))
    other = RemoteCheckpoints(f"{URL}/fetched", tmp_path / "b")
    assert mark_of(other, 7) == 1
    # A copy whose own upload was killed is not taken for it.
    LocalCheckpoints(tmp_path / "c").write(7, filler(7, 2))
    assert mark_of(RemoteCheckpoints(f"{URL}/fetched", tmp_path / "c"), 7) == 1


def test_a_truncated_file_in_storage_is_named(tmp_path):
    RemoteCheckpoints(f"{URL}/cut", tmp_path / "a").write(7, filler(7, 12345))
    storage = fsspec.filesystem("memory")
    storage.pipe_file("/bucket/runs/cut/step-000007/c.txt", b"12")
    other = RemoteCheckpoints(f"{URL}/cut", tmp_path / "b")
    with pytest.raises(OSError, match=r"step-000007/c\.txt has 2 bytes instead of 5"):
        other.folder(7)
    assert not list((tmp_path / "b").glob("step-000007")), "nothing half-fetched looks complete"
