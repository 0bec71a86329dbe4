"""The stores that the buffer's benchmark compares, and what each of them does in a repetition."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import pyarrow as pa

from actors.engine.interface import FinishedLog
from buffer.settings import BufferSettings
from buffer.store.shard import DrawKey
from buffer.store.store import ReplayStore
from tests.benchmarks.backend import Stopwatch, Timed
from tests.benchmarks.buffer_load import (
    CONTRACT,
    LISTS,
    SCALARS,
    SENT_ROWS,
    Padded,
    RolloutLoad,
    as_arrow,
    as_padded,
    scalars,
)

if TYPE_CHECKING:
    import torch
    from tensordict import TensorDict

BackendName = Literal["ours", "ours_fsync_batch", "torchrl", "torchrl_hand_padded", "cpprb"]
Packed: TypeAlias = "pa.RecordBatch | Padded | TensorDict"

INSERT_ROWS = (8, 64, 256)
DRAWN_ROWS = (64, 128, 256)
DRAWS = 600
COLD_DRAWS = 3
WRITERS = 4
SEED = 0
_MADV_DONTNEED = 4


class Store(ABC):
    """A store with room for all rows of the benchmark; its files lie in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def pack(self, logs: Sequence[FinishedLog]) -> Packed:
        """Rollouts in the form that the store takes."""

    @abstractmethod
    def insert(self, packed: Packed) -> None:
        """Store them. May be called from several threads."""

    @abstractmethod
    def sample(self, count: int) -> Packed:
        """Draw `count` rows, all columns, as a batch in memory."""

    def close(self) -> None:  # noqa: B027  # files of the other libraries live as long as their buffers do
        """Make all durable and let go of the files."""


class OurStore(Store):
    """`ReplayStore`, in this process."""

    def __init__(self, folder: Path, num_rows: int, fsync: Literal["batch", "none"]) -> None:
        super().__init__(folder)
        settings = BufferSettings(capacity=num_rows, min_size=1, fsync=fsync)
        self._store = ReplayStore(folder, CONTRACT, settings, SEED)
        self._steps = count()
        self._lock = Lock()

    def pack(self, logs: Sequence[FinishedLog]) -> Packed:
        """An Arrow batch."""
        return as_arrow(logs)

    def insert(self, packed: Packed) -> None:
        """Validate and store."""
        assert isinstance(packed, pa.RecordBatch)
        with self._lock:
            result = self._store.insert(packed)
        assert not result.rejections, result.rejections[0]

    def sample(self, count: int) -> Packed:
        """A logged draw, and after every tenth a checkpoint, as a learner makes them."""
        step = next(self._steps)
        drawn = self._store.draw(DrawKey("bench", step, "policy"), count, 0)
        assert drawn is not None
        if step % 10 == 9:
            self._store.checkpointed("bench", step + 1)
        return drawn.batch

    def close(self) -> None:
        """Make all durable."""
        self._store.close()


class TorchRLStore(Store):
    """TorchRL's buffer of tensor dictionaries over memory-mapped files, rows padded to the longest."""

    def __init__(self, folder: Path, num_rows: int, load: RolloutLoad, pad_by_hand: bool) -> None:
        """pad_by_hand: fill padded arrays with numpy, which is several times as quick as `tensordict.pad_sequence`."""
        from torchrl.data import LazyMemmapStorage, TensorDictReplayBuffer

        super().__init__(folder)
        logging.getLogger("torchrl").setLevel(logging.WARNING)  # it tells of every storage it makes
        self._load = load
        self._pad_by_hand = pad_by_hand
        self._buffer = TensorDictReplayBuffer(storage=LazyMemmapStorage(num_rows, scratch_dir=folder))

    def pack(self, logs: Sequence[FinishedLog]) -> Packed:
        """A padded tensor dictionary."""
        import torch
        from tensordict import TensorDict

        if self._pad_by_hand:
            padded = {name: torch.from_numpy(array) for name, array in as_padded(logs, self._load).items()}
        else:
            padded = self._pad_sequence(logs)
        return TensorDict(padded, batch_size=[len(logs)])

    def insert(self, packed: Packed) -> None:
        """Copy the tensors into the files."""
        self._buffer.extend(packed)

    def sample(self, count: int) -> Packed:
        """Uniform, with replacement (its default sampler)."""
        drawn: TensorDict = self._buffer.sample(count)
        return drawn

    def _pad_sequence(self, logs: Sequence[FinishedLog]) -> dict[str, torch.Tensor]:
        """One tensor dictionary per rollout, padded by the library; then to the width of the storage."""
        import torch
        from tensordict import TensorDict, pad_sequence

        rollouts = [
            TensorDict({name: torch.from_numpy(getattr(log, name)) for name in LISTS}, batch_size=[]) for log in logs
        ]
        padded = pad_sequence(rollouts)
        widths = dict.fromkeys(LISTS, self._load.longest_log) | {"prompt_ids": self._load.longest_prompt}
        lists = {
            name: torch.nn.functional.pad(padded[name], (0, width - padded[name].shape[1]))
            for name, width in widths.items()
        }
        return lists | {name: torch.from_numpy(array) for name, array in scalars(logs).items()}


class CpprbStore(Store):
    """cpprb's buffer over memory-mapped files, rows padded to the longest."""

    def __init__(self, folder: Path, num_rows: int, load: RolloutLoad) -> None:
        import cpprb

        super().__init__(folder)
        self._load = load
        self._lock = Lock()
        folder.mkdir()
        columns = {
            "prompt_ids": {"shape": load.longest_prompt, "dtype": np.int32},
            "actions": {"shape": load.longest_log, "dtype": np.int32},
            "logprobs": {"shape": load.longest_log, "dtype": np.float32},
            "policy_version": {"shape": load.longest_log, "dtype": np.int32},
            **{name: {"dtype": number_type} for name, number_type in SCALARS.items()},
        }
        self._buffer = cpprb.ReplayBuffer(num_rows, columns, mmap_prefix=str(folder / "rows"))

    def pack(self, logs: Sequence[FinishedLog]) -> Packed:
        """Padded arrays."""
        return as_padded(logs, self._load)

    def insert(self, packed: Packed) -> None:
        """Copy the arrays into the files; it has no lock of its own."""
        assert isinstance(packed, dict)
        with self._lock:
            self._buffer.add(**packed)

    def sample(self, count: int) -> Packed:
        """Uniform, with replacement."""
        drawn: Padded = self._buffer.sample(count)
        return drawn


class StoreBackend:
    """One kind of store; each repetition fills new stores and samples from one of them.

    disk_row_bytes: bytes on disk per row after the inserts, of each repetition. disk_drawn_row_bytes: what a drawn row
    adds. cold_major_faults: page faults that read from the disk in the draws with an empty page cache.
    """

    def __init__(self, name: BackendName, root: Path, num_rows: int, load: RolloutLoad) -> None:
        self._name = name
        self._root = root
        self._num_rows = num_rows
        self._load = load
        self._stores = count()
        self.disk_row_bytes: list[float] = []
        self.disk_drawn_row_bytes: list[float] = []
        self.cold_major_faults: list[int] = []

    def open(self) -> Store:
        """An empty store."""
        folder = self._root / f"{self._name}-{next(self._stores)}"
        match self._name:
            case "torchrl" | "torchrl_hand_padded":
                return TorchRLStore(folder, self._num_rows, self._load, self._name == "torchrl_hand_padded")
            case "cpprb":
                return CpprbStore(folder, self._num_rows, self._load)
            case _:
                return OurStore(folder, self._num_rows, "batch" if self._name == "ours_fsync_batch" else "none")

    def measure(self) -> Mapping[str, Timed]:
        """Rows: `insert_N` with packing and `insert_packed_N` without, N at a time; `insert`, `insert_packed` and, by
        several threads, `insert_4_writers`, as many at a time as an actor sends; `sample_warm_N`; `sample_warm` of all
        sizes; `sample_cold` with an empty page cache.
        """
        watch = Stopwatch()
        for size in INSERT_ROWS:  # each in a store of its own, so that each pays for the files that its rows fill
            store = self.open()
            for first in range(0, self._num_rows, size):
                logs = self._load.rollouts(first, min(size, self._num_rows - first))
                with watch.time(f"pack_{size}", 0):
                    packed = store.pack(logs)
                with watch.time(f"insert_packed_{size}", len(logs)):
                    store.insert(packed)
            if size == SENT_ROWS:
                self._sample(store, watch)
            store.close()
        self._insert_with_writers(watch)
        timed = watch.timed
        timed |= {f"insert_{size}": timed[f"pack_{size}"] + timed[f"insert_packed_{size}"] for size in INSERT_ROWS}
        timed |= {"insert": timed[f"insert_{SENT_ROWS}"], "insert_packed": timed[f"insert_packed_{SENT_ROWS}"]}
        return timed | {"sample_warm": sum((timed[f"sample_warm_{n}"] for n in DRAWN_ROWS), Timed(0, 0.0, 0.0))}

    def _sample(self, store: Store, watch: Stopwatch) -> None:
        stored_bytes = disk_bytes(store.folder)
        for size in DRAWN_ROWS:
            store.sample(size)
            with watch.time(f"sample_warm_{size}", DRAWS * size):
                for _ in range(DRAWS):
                    store.sample(size)
        faults = major_faults()
        for _ in range(COLD_DRAWS):
            drop_page_cache(store.folder)
            with watch.time("sample_cold", DRAWN_ROWS[-1]):
                store.sample(DRAWN_ROWS[-1])
        self.cold_major_faults.append(major_faults() - faults)
        num_drawn = (DRAWS + 1) * sum(DRAWN_ROWS) + COLD_DRAWS * DRAWN_ROWS[-1]
        self.disk_row_bytes.append(stored_bytes / self._num_rows)
        self.disk_drawn_row_bytes.append((disk_bytes(store.folder) - stored_bytes) / num_drawn)

    def _insert_with_writers(self, watch: Stopwatch) -> None:
        store, share = self.open(), self._num_rows // WRITERS

        def write(writer: int) -> None:
            for first in range(writer * share, (writer + 1) * share, SENT_ROWS):
                store.insert(store.pack(self._load.rollouts(first, min(SENT_ROWS, (writer + 1) * share - first))))

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


def major_faults() -> int:
    """Page faults of this process that read from the disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
