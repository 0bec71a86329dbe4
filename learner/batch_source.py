"""Where the learner's trajectories come from: the seam between the training loop and the data."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import pyarrow as pa
import ray
from ray.actor import ActorHandle

from buffer.consumption_log import DrawKey
from buffer.counters import DrawResult
from buffer.staleness import VersionRange, staleness

POLL_S = 0.5
ANSWER_GRACE_S = 10.0


class StopRequestedError(Exception):
    """The run was asked to stop while the learner waited for data."""


class BufferLostError(RuntimeError):
    """The process of the replay buffer is gone."""


class BatchSource(Protocol):
    """Trajectories for one step; `buffer.experts.stream.ExpertStream` is one, `BufferSource` the other."""

    def draw(self, count: int) -> pa.RecordBatch:
        """Exactly `count` trajectories."""


class BufferSource:
    """Draws from the replay buffer through Ray."""

    def __init__(
        self,
        buffer: ActorHandle,
        stage: str,
        source: str,
        timeout_s: float,
        newest_version: Callable[[], int],
        stop_requested: Callable[[], bool],
    ) -> None:
        """Args:
        stage: of training; each of its steps makes one draw.
        source: "policy" or "expert".
        newest_version: the newest published version at the time of a draw; staleness counts from it.
        stop_requested: asked while waiting.
        """
        self._buffer = buffer
        self._stage = stage
        self._source = source
        self._step = 0
        self._timeout_s = timeout_s
        self._newest_version = newest_version
        self._stop_requested = stop_requested
        self.staleness = np.zeros(0, dtype=np.int64)  # of each trajectory of the newest draw, in published versions

    def seek(self, step: int) -> None:
        """Go on with the draw of a stage that has done `step` steps."""
        self._step = step

    def draw(self, count: int) -> pa.RecordBatch:
        """Wait for `count` trajectories.

        Raises:
            TimeoutError: the buffer could not give them in time; its message says what it holds.
            StopRequestedError: the run is to stop. BufferLostError: the buffer's process died.
        """
        key = DrawKey(self._stage, self._step, self._source)
        reference = self._buffer.draw.remote(key, count, self._newest_version(), timeout_s=self._timeout_s)
        deadline = time.monotonic() + self._timeout_s + ANSWER_GRACE_S
        while not ray.wait([reference], timeout=POLL_S)[0]:
            if self._stop_requested():
                raise StopRequestedError
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"the replay buffer did not answer the learner within {self._timeout_s + ANSWER_GRACE_S:.0f} s"
                )
        try:
            drawn: DrawResult = ray.get(reference, timeout=ANSWER_GRACE_S)
        except ray.exceptions.RayActorError as error:
            raise BufferLostError(
                f"the replay buffer died ({str(error).splitlines()[0]}); what it accepted is on disk: resume the run"
            ) from None
        self._step += 1
        self.staleness = staleness(drawn.policy_version, VersionRange.from_batch(drawn.batch).oldest)
        return drawn.batch
