"""Memory for the rows of open segments, cut from large blocks.

The first touch of a page costs several times what it costs to copy into it, and large blocks come in large pages. A
block lives as long as anything that was cut from it.
"""

from __future__ import annotations

import numpy as np

BLOCK_BYTES = 2**24
_ALIGNMENT_BYTES = 64  # of Arrow's buffers


class BlockMemory:
    """Gives out pieces of blocks, one after the other."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        """block_bytes: a larger piece has a block of its size."""
        self._block_bytes = block_bytes
        self._block = memoryview(b"")
        self._used_bytes = 0

    def offer(self, size_bytes: int) -> memoryview:
        """[size_bytes] to write to, contents undefined; offered again unless `keep` says how much of it is used."""
        if self._used_bytes + size_bytes > len(self._block):
            self._block, self._used_bytes = _new_block(max(size_bytes, self._block_bytes)), 0
        return self._block[self._used_bytes : self._used_bytes + size_bytes]

    def keep(self, size_bytes: int) -> None:
        """The first bytes of what was offered last are in use now."""
        self._used_bytes += -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _new_block(size_bytes: int) -> memoryview:
    return np.empty(size_bytes, dtype=np.uint8).data  # numpy asks the system for large pages
