"""Low-rank updates (LoRA, arXiv 2106.09685): how they are merged into the weight they belong to.

Learner, exports and actors all merge by `merge_low_rank`, so that they get the same bits from the same tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LowRankUpdate:
    """One update, by the names of its tensors: W [out, in], A [rank, in], B [out, rank].

    transposed: W is stored as [in, out], as GPT-2 does.
    """

    weight: str
    a: str
    b: str
    scaling: float
    transposed: bool


def merge_low_rank(weight: Tensor, a: Tensor, b: Tensor, scaling: float, transposed: bool) -> Tensor:
    """W + scaling B A, added in the format of A and B and rounded once to that of W; a new tensor."""
    update = (b @ a) * scaling
    if transposed:
        update = update.T
    return (weight.to(update.dtype) + update).to(weight.dtype)
