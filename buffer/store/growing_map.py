"""A file that grows, mapped into memory once.

What is written to a file shows in a mapping that was made before, also behind what was its end then, for as far as the
mapping reaches. Python's `mmap` maps no more than a file has; so the system is asked.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

import pyarrow as pa

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value

_GROWTH = 1.25
"""A mapping that is too short is made anew, for a file so many times as large."""


class GrowingMap:
    """The first bytes of a file whose end alone changes. What was read stays readable after the file's deletion."""

    def __init__(self, descriptor: int, room_bytes: int) -> None:
        """descriptor: of the file, open as long as `content` is called. room_bytes: how large it is expected to grow;
        takes addresses, but no memory."""
        self._descriptor = descriptor
        self._room_bytes = room_bytes
        self._mapping: _Mapping | None = None

    def content(self, size_bytes: int) -> pa.Buffer:
        """The first `size_bytes` of the file, which has them and never loses them while they are looked at.

        Raises:
            OSError: the file cannot be mapped.
        """
        if self._mapping is None or size_bytes > self._mapping.size_bytes:
            self._mapping = _Mapping(self._descriptor, max(self._room_bytes, int(_GROWTH * size_bytes)))
        return pa.foreign_buffer(self._mapping.address, size_bytes, self._mapping)


class _Mapping:
    """Ends when nobody holds it any more."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        address = _LIBC.mmap(None, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address == _FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self.address: int = address
        self.size_bytes = size_bytes
        weakref.finalize(self, _LIBC.munmap, address, size_bytes)
