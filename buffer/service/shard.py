"""The shards of a run's buffer as other processes see them: where they lie, what each holds, which one is near.

    RUN/buffer/shard-000/  shard-001/  ...      one folder per shard, also where there is one only

A shard holds its share of the capacity and waits for its share of the first rows, so that the settings of a run mean
the same with any number of shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from buffer.settings import BufferSettings

_FOLDER_PREFIX = "shard-"


class BufferLostError(RuntimeError):
    """The process of a shard is gone for good."""


@dataclass(frozen=True)
class Shard:
    """One shard. handle: of its actor (`buffer.service.service.ReplayBufferService`); node_id: where it was placed."""

    index: int
    handle: ActorHandle
    node_id: str

    @property
    def name(self) -> str:
        """For messages."""
        return shard_name(self.index)


def shard_name(index: int) -> str:
    """For messages."""
    return f"shard {index} of the replay buffer"


def shard_folder(buffer_folder: Path, index: int) -> Path:
    """Where a shard of the buffer in `buffer_folder` lies."""
    return buffer_folder / f"{_FOLDER_PREFIX}{index:03d}"


def present_shards(buffer_folder: Path) -> list[Path]:
    """Folders of the shards that exist, in their order; none before the run has made one."""
    return sorted(path for path in buffer_folder.glob(f"{_FOLDER_PREFIX}*") if path.is_dir())


def shard_settings(settings: BufferSettings, index: int) -> BufferSettings:
    """What a shard is born with: its share of what counts rows of the whole buffer, rounded up, and its own port."""
    shards, tolerance, flight = settings.shards, settings.samples_per_insert_tolerance, settings.flight
    return settings.model_copy(
        update={
            "capacity": -(-settings.capacity // shards),
            "min_size": -(-settings.min_size // shards),
            "samples_per_insert_tolerance": None if tolerance is None else tolerance / shards,
            "flight": flight.model_copy(update={"port": flight.port + index if flight.port else 0}),
        }
    )


def shard_seed(seed: int, index: int) -> int:
    """Seed of a shard's draws: the run's own for the first, others for the others."""
    return seed + (index << 32)


def nearest(shards: Sequence[Shard], node_id: str) -> list[Shard]:
    """The shards on a node; all of them where it has none."""
    return [shard for shard in shards if shard.node_id == node_id] or list(shards)
