"""The stores that the buffer's benchmark compares, and what each of them does in a repetition."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from actors.engine.interface import FinishedRollout
from buffer.settings import BufferSettings
from buffer.store.shard import SampleKey
from buffer.store.store import ReplayStore
from tests.benchmarks.backend import Stopwatch, Timed
from tests.benchmarks.buffer_load import (
    CONTRACT,
    LISTS,
    SCALARS,
    SENT_ROWS,
    Rollouts,
    as_arrow,
    as_padded,
    scalars,
    take,
    width,
)

StoreName = Literal["ours", "ours_fsync_batch", "torchrl", "torchrl_hand_padded", "cpprb"]
Packed = Any
"""Rollouts in the form that a store takes and gives."""

INSERT_SIZES = (8, 64, 256)
DRAWN_ROWS = (64, 128, 256)
DRAWS = 600
COLD_DRAWS = 3
WRITERS = 4
_MADV_DONTNEED = 4


class OurStore:
    """`ReplayStore`, in this process.

    Every store has a folder of its own and room for all rows. It packs rollouts in the form that it takes, inserts
    them, also from several threads, and samples rows as a batch in memory.
    """

    def __init__(self, folder: Path, num_rows: int, fsync: Literal["batch", "none"]) -> None:
        settings = BufferSettings(capacity=num_rows, min_size=1, fsync=fsync)
        self._store = ReplayStore(folder, CONTRACT, settings, seed=0)
        self._steps = count()
        self._lock = Lock()
        self.pack, self.close = as_arrow, self._store.close

    def insert(self, packed: Packed) -> None:
        with self._lock:
            result = self._store.insert(packed)
        assert not result.rejections, result.rejections[0]

    def sample(self, count: int) -> Packed:
        """A logged draw, and after every tenth a checkpoint, as a learner makes them."""
        step = next(self._steps)
        drawn = self._store.sample(SampleKey("bench", step, "policy"), count, 0)
        assert drawn is not None
        if step % 10 == 9:
            self._store.checkpointed("bench", step + 1)
        return drawn.batch


class TorchRLStore:
    """TorchRL's buffer of tensor dictionaries over memory-mapped files, rows padded to the longest."""

    def __init__(self, folder: Path, num_rows: int, pad_by_hand: bool) -> None:
        """pad_by_hand: fill padded arrays with numpy, which is several times as quick as `tensordict.pad_sequence`."""
        from torchrl.data import LazyMemmapStorage, TensorDictReplayBuffer

        logging.getLogger("torchrl").setLevel(logging.WARNING)  # it tells of every storage it makes
        self._pad_by_hand = pad_by_hand
        self._buffer = TensorDictReplayBuffer(storage=LazyMemmapStorage(num_rows, scratch_dir=folder))
        # Draws are uniform, with replacement: its default sampler.
        self.insert, self.sample = self._buffer.extend, self._buffer.sample

    def pack(self, logs: Sequence[FinishedRollout]) -> Packed:
        import torch
        from tensordict import TensorDict, pad_sequence

        arrays = as_padded(logs) if self._pad_by_hand else scalars(logs)
        columns = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if not self._pad_by_hand:  # one tensor dictionary per rollout, padded by the library; then to the full width
            tensors = ({name: torch.from_numpy(getattr(log, name)) for name in LISTS} for log in logs)
            padded = pad_sequence([TensorDict(each, batch_size=[]) for each in tensors])
            for name in LISTS:
                columns[name] = torch.nn.functional.pad(padded[name], (0, width(name) - padded[name].shape[1]))
        return TensorDict(columns, batch_size=[len(logs)])

    def close(self) -> None:
        """The files live as long as the buffer."""


class CpprbStore:
    """cpprb's buffer over memory-mapped files, rows padded to the longest."""

    def __init__(self, folder: Path, num_rows: int) -> None:
        import cpprb

        folder.mkdir()
        columns = {name: {"shape": width(name), "dtype": number} for name, number in LISTS.items()}
        columns |= {name: {"dtype": number} for name, number in SCALARS.items()}
        self._buffer = cpprb.ReplayBuffer(num_rows, columns, mmap_prefix=str(folder / "rows"))
        self._lock = Lock()  # it has none of its own
        self.pack, self.sample = as_padded, self._buffer.sample  # uniform, with replacement

    def insert(self, packed: Packed) -> None:
        with self._lock:
            self._buffer.add(**packed)

    def close(self) -> None:
        """The files live as long as the buffer."""


Store = OurStore | TorchRLStore | CpprbStore


def open_store(name: StoreName, folder: Path, num_rows: int) -> Store:
    """An empty store in a new folder."""
    if name.startswith("torchrl"):
        return TorchRLStore(folder, num_rows, pad_by_hand=name == "torchrl_hand_padded")
    if name == "cpprb":
        return CpprbStore(folder, num_rows)
    return OurStore(folder, num_rows, "batch" if name == "ours_fsync_batch" else "none")


class StoreBackend:
    """One kind of store; each repetition fills new stores and samples from one of them.

    noted: by repetition, `disk_bytes_per_row` after the inserts, `disk_bytes_per_sampled_row` that a draw adds, and
    `cold_major_faults`: page faults that read from the disk in the draws with an empty page cache.
    """

    def __init__(self, name: StoreName, root: Path, num_rows: int, rollouts: Rollouts) -> None:
        self._name, self._root, self._num_rows, self._rollouts = name, root, num_rows, rollouts
        self._stores = count()
        self.noted: dict[str, list[float]] = defaultdict(list)

    def measure(self) -> Mapping[str, Timed]:
        """Rows: `insert_N` with packing and `insert_packed_N` without, N at a time; `insert`, `insert_packed` and, by
        several threads, `insert_4_writers`, as many at a time as an actor sends; `sample_warm_N`; `sample_warm` of all
        sizes; `sample_cold` with an empty page cache.
        """
        watch = Stopwatch()
        for size in INSERT_SIZES:  # each in a store of its own, so that each pays for the files that its rows fill
            folder, store = self._open()
            for first in range(0, self._num_rows, size):
                logs = take(self._rollouts, first, min(size, self._num_rows - first))
                with watch.time(f"pack_{size}", 0):
                    packed = store.pack(logs)
                with watch.time(f"insert_packed_{size}", len(logs)):
                    store.insert(packed)
            if size == SENT_ROWS:
                self._sample(folder, store, watch)
            store.close()
        self._insert_with_writers(watch)
        timed = watch.timed
        timed |= {f"insert_{size}": timed[f"pack_{size}"] + timed[f"insert_packed_{size}"] for size in INSERT_SIZES}
        timed |= {"insert": timed[f"insert_{SENT_ROWS}"], "insert_packed": timed[f"insert_packed_{SENT_ROWS}"]}
        return timed | {"sample_warm": sum((timed[f"sample_warm_{n}"] for n in DRAWN_ROWS), Timed(0, 0.0, 0.0))}

    def _open(self) -> tuple[Path, Store]:
        folder = self._root / f"{self._name}-{next(self._stores)}"
        return folder, open_store(self._name, folder, self._num_rows)

    def _sample(self, folder: Path, store: Store, watch: Stopwatch) -> None:
        stored_bytes = disk_bytes(folder)
        for size in DRAWN_ROWS:
            store.sample(size)
            with watch.time(f"sample_warm_{size}", DRAWS * size):
                for _ in range(DRAWS):
                    store.sample(size)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        for _ in range(COLD_DRAWS):
            drop_page_cache(folder)
            with watch.time("sample_cold", DRAWN_ROWS[-1]):
                store.sample(DRAWN_ROWS[-1])
        num_sampled = (DRAWS + 1) * sum(DRAWN_ROWS) + COLD_DRAWS * DRAWN_ROWS[-1]
        self.noted["cold_major_faults"].append(resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults)
        self.noted["disk_bytes_per_row"].append(stored_bytes / self._num_rows)
        self.noted["disk_bytes_per_sampled_row"].append((disk_bytes(folder) - stored_bytes) / num_sampled)

    def _insert_with_writers(self, watch: Stopwatch) -> None:
        (_, store), share = self._open(), self._num_rows // WRITERS

        def write(writer: int) -> None:
            for first in range(writer * share, (writer + 1) * share, SENT_ROWS):
                store.insert(store.pack(take(self._rollouts, first, min(SENT_ROWS, (writer + 1) * share - first))))

        with watch.time("insert_4_writers", WRITERS * share), ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(write, range(WRITERS)))
        store.close()


def disk_bytes(folder: Path) -> int:
    """Bytes that the files of a folder occupy; a file with two names counts once."""
    found = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return 512 * sum({each.st_ino: each.st_blocks for each in found}.values())


def drop_page_cache(folder: Path) -> None:
    """Have the next read of the folder's files come from the disk, also where this process has them mapped."""
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)  # span of addresses, permissions, offset, device, inode, path
        if len(fields) == 6 and fields[5].startswith(str(folder)):
            start, end = (int(bound, 16) for bound in fields[0].split("-"))
            if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED):
                raise OSError(ctypes.get_errno(), "madvise failed", fields[5])
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
