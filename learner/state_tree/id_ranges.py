"""Ids that are no actions, because no token has them (`TokenContract.ids_without_token`)."""

from __future__ import annotations

from torch import Tensor

from buffer.trajectory.schema import IdRanges


def fill_ids(values: Tensor, ranges: IdRanges, value: float, first_id: int = 0) -> None:
    """Set (in place) the columns of these ids. values: [..., W] whose columns are the ids from `first_id` on."""
    width = values.shape[-1]
    for begin, end in ranges:
        low, high = max(begin - first_id, 0), min(end - first_id, width)
        if low < high:
            values[..., low:high] = value
