"""A full disk, by whatever library it is met, as one kind of error that names the place."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    """Around whatever writes below `place`.

    Raises:
        OSError: in place of any error that says that the disk is full; it names a file, or `place`. Python's own names
            no file that was open already.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error) or (isinstance(error, OSError) and error.filename is not None):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place)) from error
