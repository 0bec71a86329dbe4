"""The stores that the buffer's benchmark compares, behind one interface."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import numpy as np
import pyarrow as pa

from actors.engine.action_log import FinishedLog
from buffer.settings import BufferSettings
from buffer.store.consumption_log import DrawKey
from buffer.store.replay_store import ReplayStore
from launch.bench.buffer_load import CONTRACT, LISTS, SCALARS, Padded, RolloutLoad, as_arrow, as_padded, scalars

if TYPE_CHECKING:
    import torch
    from tensordict import TensorDict

SideName = Literal["ours", "ours_fsync_batch", "torchrl", "torchrl_hand_padded", "cpprb"]
Packed: TypeAlias = "pa.RecordBatch | Padded | TensorDict"

SEED = 0
_MADV_DONTNEED = 4


class Side(Protocol):
    """A store with room for all rows of the benchmark; its files lie in a folder of its own."""

    folder: Path

    def pack(self, logs: Sequence[FinishedLog]) -> Packed:
        """Rollouts in the form that the store takes."""

    def insert(self, packed: Packed) -> None:
        """Store them. May be called from several threads."""

    def sample(self, count: int) -> Packed:
        """Draw `count` rows, all columns, as a batch in memory."""

    def close(self) -> None:
        """Let go of the files."""


class OurSide:
    """`ReplayStore`, in this process."""

    def __init__(self, folder: Path, num_rows: int, fsync: Literal["batch", "none"]) -> None:
        self.folder = folder
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
        """A logged draw, and now and then a checkpoint, as a learner makes them."""
        step = next(self._steps)
        drawn = self._store.draw(DrawKey("bench", step, "policy"), count, 0)
        assert drawn is not None
        if step % 10 == 9:
            self._store.checkpointed("bench", step + 1)
        return drawn.batch

    def close(self) -> None:
        """Make all durable."""
        self._store.close()


class TorchRLSide:
    """TorchRL's buffer of tensor dictionaries over memory-mapped files, rows padded to the longest."""

    def __init__(self, folder: Path, num_rows: int, load: RolloutLoad, pad_by_hand: bool) -> None:
        """pad_by_hand: fill padded arrays with numpy, which is several times as quick as `tensordict.pad_sequence`."""
        from torchrl.data import LazyMemmapStorage, TensorDictReplayBuffer

        logging.getLogger("torchrl").setLevel(logging.WARNING)  # it tells of every storage it makes
        self.folder = folder
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
        assert not isinstance(packed, dict)
        self._buffer.extend(packed)

    def _pad_sequence(self, logs: Sequence[FinishedLog]) -> dict[str, torch.Tensor]:
        """One tensor dictionary per rollout, padded by the library; then to the width of the storage."""
        import torch
        from tensordict import TensorDict, pad_sequence

        def rollout(log: FinishedLog) -> TensorDict:
            columns = {name: torch.from_numpy(getattr(log, name)) for name in LISTS}
            return TensorDict(columns, batch_size=[])

        padded = pad_sequence([rollout(log) for log in logs])
        widths = dict.fromkeys(LISTS, self._load.longest_log) | {"prompt_ids": self._load.longest_prompt}
        lists = {
            name: torch.nn.functional.pad(padded[name], (0, width - padded[name].shape[1]))
            for name, width in widths.items()
        }
        return lists | {name: torch.from_numpy(array) for name, array in scalars(logs).items()}

    def sample(self, count: int) -> Packed:
        """Uniform, with replacement (its default sampler)."""
        drawn: TensorDict = self._buffer.sample(count)
        return drawn

    def close(self) -> None:
        """Files of a storage live as long as it does."""
        del self._buffer


class CpprbSide:
    """cpprb's buffer over memory-mapped files, rows padded to the longest."""

    def __init__(self, folder: Path, num_rows: int, load: RolloutLoad) -> None:
        import cpprb

        self.folder = folder
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

    def close(self) -> None:
        """Files live as long as the buffer does."""
        del self._buffer


def open_side(name: SideName, folder: Path, num_rows: int, load: RolloutLoad) -> Side:
    """An empty store with room for `num_rows`."""
    match name:
        case "torchrl":
            return TorchRLSide(folder, num_rows, load, pad_by_hand=False)
        case "torchrl_hand_padded":
            return TorchRLSide(folder, num_rows, load, pad_by_hand=True)
        case "cpprb":
            return CpprbSide(folder, num_rows, load)
        case _:
            return OurSide(folder, num_rows, "batch" if name == "ours_fsync_batch" else "none")


def drawn_bytes(drawn: Packed) -> int:
    """Bytes of memory that the columns of a drawn batch take."""
    if isinstance(drawn, pa.RecordBatch):
        return int(drawn.nbytes)
    return sum(int(column.nbytes) for column in drawn.values())


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
