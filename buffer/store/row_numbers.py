"""Sets of rows as ascending arrays of their numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

NO_ROWS: Int64 = np.empty(0, dtype=np.int64)


def contains(ascending: Int64, rows: Int64) -> Bool:
    """[n] whether each of `rows` is in the set `ascending`; takes O(n log m), unlike `numpy.isin`, which sorts both."""
    places = np.searchsorted(ascending, rows)
    found: Bool = places < len(ascending)
    found[found] = ascending[places[found]] == rows[found]
    return found
