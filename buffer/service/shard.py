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

from buffer.remote_call import RemoteCall
from buffer.service.router import DrawRequest, Offer
from buffer.store.results import DrawResult

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from buffer.settings import BufferSettings

ANSWER_TIMEOUT_S = 120.0
"""Beyond the time that a call itself may wait: a shard that died needs some to come back, more with a large folder."""

_FOLDER_PREFIX = "shard-"


@dataclass(frozen=True)
class Shard:
    """One shard. handle: of its actor (`buffer.service.service.ReplayBufferService`); node_id: where it was placed.

    Its methods are those of the service, called from another process; they raise as `RemoteCall.answer`, too.
    """

    index: int
    handle: ActorHandle
    node_id: str = ""

    @property
    def name(self) -> str:
        """For messages."""
        return f"shard {self.index} of the replay buffer"

    async def offer(self, request: DrawRequest) -> Offer:
        """See `ReplayBufferService.offer`."""
        return await RemoteCall[Offer](self.name, self.handle.offer.remote(request)).answer(ANSWER_TIMEOUT_S)

    async def take(self, request: DrawRequest, part: int) -> DrawResult | None:
        """See `ReplayBufferService.take`."""
        reference = self.handle.take.remote(request, part)
        return await RemoteCall[DrawResult | None](self.name, reference).answer(ANSWER_TIMEOUT_S)

    async def wait_for_rows(self, inserts: int, timeout_s: float) -> bool:
        """See `ReplayBufferService.wait_for_rows`."""
        reference = self.handle.wait_for_rows.remote(inserts, timeout_s)
        return await RemoteCall[bool](self.name, reference).answer(timeout_s + ANSWER_TIMEOUT_S)


def shard_folder(buffer_folder: Path, index: int) -> Path:
    """Where a shard of the buffer in `buffer_folder` lies."""
    return buffer_folder / f"{_FOLDER_PREFIX}{index:03d}"


def present_shards(buffer_folder: Path) -> list[Path]:
    """Folders of the shards that exist, in their order; none before the run has made one."""
    return sorted(path for path in buffer_folder.glob(f"{_FOLDER_PREFIX}*") if path.is_dir())


def shard_settings(settings: BufferSettings, index: int) -> BufferSettings:
    """What a shard starts with: its share of what counts rows of the whole buffer, rounded up, and its own port."""
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
