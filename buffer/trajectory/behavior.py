"""What the policy that acted said of its actions, read from trajectories.

An action's stored log-probability is that of the distribution it was drawn from: logits over a temperature, cut to a
nucleus (top-p), without backspace at the floor or anywhere. All of that but the nucleus can be repeated from logits
alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from buffer.trajectory.replay import Int64
from buffer.trajectory.staleness import NO_VERSION

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Behaviour:
    """Of each of A actions, in the order of `ActionLogs`.

    log_prob: [A] as stored; 0 where none is (experts). version: [A] of the weights; NO_VERSION for experts.
    temperature: [A] that log_prob can be repeated at; 0 where it cannot be (none stored, or drawn from a nucleus).
    offers_backspace: [L] whether a row's actions were drawn with backspace among them; True for experts.
    """

    log_prob: Float32
    version: Int64
    temperature: Float32
    offers_backspace: npt.NDArray[np.bool_]

    @classmethod
    def from_batch(cls, batch: pa.RecordBatch) -> Behaviour:
        """Read the columns of the trajectory schema."""
        lengths = batch.column("actions").value_lengths().to_numpy(zero_copy_only=False)
        log_prob = np.zeros(int(lengths.sum()), dtype=np.float32)
        version = np.full(len(log_prob), NO_VERSION, dtype=np.int64)
        has_log_prob = _spread(batch.column("logprobs"), lengths, log_prob)
        _spread(batch.column("policy_version"), lengths, version)
        sampling = batch.column("sampling")
        whole = pc.equal(pc.struct_field(sampling, "top_p"), 1.0).fill_null(False)
        of_row = pc.if_else(whole, pc.struct_field(sampling, "temperature"), 0.0).fill_null(0.0)
        temperature = np.repeat(of_row.to_numpy(zero_copy_only=False).astype(np.float32), lengths)
        offers_backspace = pc.struct_field(sampling, "floor_mask").fill_null(True).to_numpy(zero_copy_only=False)
        return cls(log_prob, version, np.where(has_log_prob, temperature, np.float32(0.0)), offers_backspace)


def newest_version(batch: pa.RecordBatch) -> int:
    """Newest policy version of all actions of a batch; NO_VERSION without any."""
    versions = batch.column("policy_version").flatten()
    return NO_VERSION if len(versions) == 0 else int(pc.max(versions).as_py())


def _spread(column: pa.ListArray, lengths: Int64, target: Float32 | Int64) -> npt.NDArray[np.bool_]:
    """Write a list column, null for some rows, to the places of the actions of the others; [A] which those are."""
    present: npt.NDArray[np.bool_] = np.repeat(column.is_valid().to_numpy(zero_copy_only=False), lengths)
    target[present] = column.flatten().to_numpy(zero_copy_only=False)
    return present
