"""Staleness: how many publications old the weights behind a trajectory are.

Version v is the weights after the v-th publication, 0 the initial model. A trajectory may span several
versions, because actors load new weights in mid-rollout. Its staleness at policy version n is

    staleness = n - min(versions of its actions)

The oldest action decides, so a bound on staleness bounds every action of every row that is sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

NO_VERSION = -1
"""Stands for the version of a trajectory that no policy made; such a trajectory is never stale."""


@dataclass(frozen=True)
class VersionRange:
    """Oldest and newest policy version per row: [n] each, NO_VERSION where a row has none."""

    oldest: Int32
    newest: Int32

    @classmethod
    def from_batch(cls, batch: pa.RecordBatch) -> VersionRange:
        """Of each row of a validated trajectory batch."""
        column = batch.column("policy_version")
        if column.null_count == 0 and len(column):
            offsets = column.offsets.to_numpy()
            starts, versions = offsets[:-1], column.values.slice(0, offsets[-1]).to_numpy()
            if (starts < offsets[1:]).all():  # as actors send them
                return cls(np.minimum.reduceat(versions, starts), np.maximum.reduceat(versions, starts))
        lengths = column.value_lengths().fill_null(0).to_numpy()
        filled = np.flatnonzero(lengths)
        oldest = np.full(len(column), NO_VERSION, dtype=np.int32)
        newest = oldest.copy()
        if len(filled):
            versions, starts = column.flatten().to_numpy(), (np.cumsum(lengths) - lengths)[filled]
            oldest[filled] = np.minimum.reduceat(versions, starts)
            newest[filled] = np.maximum.reduceat(versions, starts)
        return cls(oldest, newest)


def staleness(policy_version: int | Int64, oldest: Int32) -> Int64:
    """[n] staleness at `policy_version`, one for all or [n], of rows with the version `oldest`; 0 where they have none,
    or are newer (an actor may load a publication before the learner's next sample)."""
    behind = policy_version - oldest.astype(np.int64)
    return np.where(oldest == NO_VERSION, 0, np.maximum(behind, 0))


def stale_rows(oldest: Int32, allowed: int) -> Bool:
    """[n] True for policy rows whose oldest version lies before `allowed`."""
    stale: Bool = (oldest != NO_VERSION) & (oldest < allowed)
    return stale
