"""What the buffer keeps in memory of each row to decide by; the row itself stays where its bytes are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from buffer.trajectory.staleness import VersionRange

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class RowFacts:
    """Of n stored rows, in ascending order.

    row: [n] numbers. oldest_version: [n] of the policy, over the actions; NO_VERSION where there is none.
    created_us: [n] microseconds since the epoch. task: [n] names.
    """

    row: Int64
    oldest_version: Int32
    created_us: Int64
    task: pa.StringArray

    @classmethod
    def from_batch(cls, batch: pa.RecordBatch, versions: VersionRange | None = None) -> RowFacts:
        """Of a batch of stored rows (the schema with the column `row`). versions: of the batch, if known already."""
        return cls(
            row=batch.column("row").to_numpy(),
            oldest_version=(versions or VersionRange.from_batch(batch)).oldest,
            created_us=batch.column("created_at").view(pa.int64()).to_numpy(),
            task=batch.column("task"),
        )

    def __len__(self) -> int:
        return len(self.row)

    def where(self, mask: Bool) -> RowFacts:
        """The rows where `mask` [n] is True."""
        if mask.all():
            return self
        return RowFacts(
            self.row[mask], self.oldest_version[mask], self.created_us[mask], self.task.filter(pa.array(mask))
        )
