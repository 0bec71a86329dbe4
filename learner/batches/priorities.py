"""What a step says of the trajectories it was given, for a buffer that draws by priority."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from learner.ranks.group import Ranks

Float32 = npt.NDArray[np.float32]


def priorities_of_draw(
    drawn: pa.RecordBatch, ids: Sequence[tuple[str, ...]], priorities: Sequence[Tensor], ranks: Ranks
) -> Float32:
    """[n] the priority of each drawn trajectory, in the order of the draw; all ranks call this together.

    ids, priorities: one entry for each pass of this rank, of its logs. Every drawn log was in a pass of one rank.
    """
    own_ids = pa.array([name for of_pass in ids for name in of_pass], pa.string())
    own = np.concatenate([np.zeros(0, dtype=np.float32), *(each.float().cpu().numpy() for each in priorities)])
    place = pc.index_in(drawn.column("id"), value_set=own_ids).fill_null(-1).to_numpy()
    of_rows = np.where(place >= 0, np.append(own, np.float32(0.0))[place], np.float32(0.0))
    summed: Float32 = ranks.sum_vector(torch.from_numpy(of_rows)).numpy()
    return summed
