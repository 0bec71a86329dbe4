"""One batch for all ranks: rank 0 draws, the others receive the same bytes, and all of them stop together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch

from learner.batches.source import BatchSource, StopRequestedError
from learner.ranks.group import RankLostError, Ranks

_BATCH, _STOP, _FAILURE = range(3)


class SharedBatchSource:
    """A batch source for every rank, around the one that only rank 0 has.

    Batches travel as Arrow streams; each comes after an announcement of its size, or of why there is none.
    """

    def __init__(
        self, ranks: Ranks, source: BatchSource | None, stop_requested: Callable[[], bool] = lambda: False
    ) -> None:
        """Args:
        source: at rank 0; None elsewhere.
        stop_requested: asked at rank 0 before each draw.
        """
        assert (source is not None) == ranks.leads
        self._ranks = ranks
        self._source = source
        self._stop_requested = stop_requested

    def draw(self, count: int) -> pa.RecordBatch:
        """Exactly `count` trajectories, the same at every rank.

        Raises:
            StopRequestedError: the run is to stop; at every rank. RankLostError: rank 0 could not draw (rank 0 raises
            the reason itself), or cannot be reached.
        """
        if self._source is None:
            return self._receive()
        if self._ranks.size == 1:
            return self._draw(self._source, count)
        announcement, size_bytes, payload = _FAILURE, 0, None
        try:
            batch = self._draw(self._source, count)
            payload = _to_stream(batch)
            announcement, size_bytes = _BATCH, payload.size
        except StopRequestedError:
            announcement = _STOP
            raise
        finally:  # also where the draw fails: the others wait for this
            self._ranks.broadcast_numbers([announcement, size_bytes])
        # A copy: torch takes no read-only memory.
        self._ranks.broadcast_bytes(torch.from_numpy(np.frombuffer(payload, dtype=np.uint8).copy()))
        return batch

    def _draw(self, source: BatchSource, count: int) -> pa.RecordBatch:
        if self._stop_requested():
            raise StopRequestedError
        return source.draw(count)

    def _receive(self) -> pa.RecordBatch:
        announcement, size_bytes = self._ranks.broadcast_numbers([_FAILURE, 0])
        if announcement == _STOP:
            raise StopRequestedError
        if announcement == _FAILURE:
            raise RankLostError(f"learner rank {self._ranks.rank}: rank 0 could not draw a batch")
        payload = self._ranks.broadcast_bytes(torch.empty(size_bytes, dtype=torch.uint8))
        with pa.ipc.open_stream(pa.py_buffer(payload.numpy())) as stream:
            return stream.read_next_batch()


def _to_stream(batch: pa.RecordBatch) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue()
