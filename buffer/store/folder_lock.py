"""One process at a time per folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class FolderLock:
    """An exclusive lock on a folder, held until `release` or until the process dies, however it dies."""

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            ValueError: another process holds it.
        """
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
