"""What this program asks of a disk: one process per folder, names and bytes that are durable, and one kind of error
that names the place where a disk is full, by whatever library that is met.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

LOCAL_FILE_SYSTEMS = frozenset(
    {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}
)
"""Types of file systems that only one host mounts; all others count as shared."""

_RUST_WORDS = "(os error 28)"
"""Libraries in Rust (tokenizers, safetensors) raise errors of their own that quote the number of the system's."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, says that a disk is full, or the share of it that a user may have."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if _RUST_WORDS in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def writing_to(place: Path) -> Iterator[None]:
    """Around whatever writes below `place`. OSError in place of any error that says that the disk is full: it names a
    file, or `place` (Python's own names no file that was open already)."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error) or (isinstance(error, OSError) and error.filename is not None):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place)) from error


class FolderLock:
    """An exclusive lock on a folder, held until `release` or until the process dies, however it dies."""

    def __init__(self, folder: Path) -> None:
        """Take the lock; ValueError where another process holds it."""
        self._descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise ValueError(
                f"{folder} is in use by another process: end that run first, or use another run folder"
            ) from None

    def release(self) -> None:
        """Let others have the folder."""
        os.close(self._descriptor)


def is_shared(folder: Path) -> bool:
    """Whether other hosts may have the file system of `folder` mounted, too; so it is taken where nobody knows."""
    place, found, depth = folder.resolve(), "unknown", -1
    for mount in psutil.disk_partitions(all=True):
        parts = Path(mount.mountpoint).parts
        if place.is_relative_to(mount.mountpoint) and len(parts) >= depth:  # a later mount hides an earlier one
            found, depth = mount.fstype, len(parts)
    return found not in LOCAL_FILE_SYSTEMS


def sync_folder(folder: Path) -> None:
    """Make new names in `folder` durable; of a file, its content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_later(descriptor: int) -> Callable[[], None]:
    """A function that makes durable what is in a file, and closes the descriptor; it may run in any thread."""

    def sync() -> None:
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    return sync
