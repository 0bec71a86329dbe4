"""The wire contract between actors, buffer and learner: one Arrow row per trajectory.

A trajectory is one *trajectory*: the ids the policy chose, `<backspace>` included, in order. Its states follow by
replaying the trajectory on a stack that starts at the prompt (`buffer.trajectory.replay`). Invariants, checked on
insert by `buffer.trajectory.validation`:

- `logprobs`, `policy_version` (policy rows) and `executed` (where present) are as long as `actions`;
- ids lie in [0, vocab_size) and have a token; `prompt_ids` and `executed` never hold backspace;
- what a step *appends* is `executed` where that is not null, else the action. `<eos>` is appended by the last step
  only, and exactly where `finish_reason` is `eos`. (An earlier *action* may be `<eos>`: the label of a step whose
  noise was appended instead.)
- replay is defined at every step: no backspace at the floor (the end of the prompt), and none at all where
  `sampling.backspace` says that it was never offered.

Stored rows also have the number of the row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from buffer.trajectory.staleness import NO_VERSION, Int64

Float32 = npt.NDArray[np.float32]

SCHEMA_VERSION = 3

ROW = "row"
"""Name of the column that only stored rows have: the number of the row in its shard."""

SOURCES = ("expert", "policy")
FINISH_REASONS = ("eos", "max_length", "max_actions", "aborted")

IdRanges = tuple[tuple[int, int], ...]
"""Ids as ascending, disjoint ranges [begin, end)."""


@dataclass(frozen=True)
class TokenContract:
    """What the ids of a trajectory mean; stored in the schema's metadata, so that every file says it of itself.

    vocab_size: rows of the model's embeddings. ids_without_token: of these rows, those that no token of the tokenizer
    has: padding at the end, holes in the middle. They are no actions: engine and learner give them no probability.
    eos_id: the tokenizer's, which ends demonstrations. other_eos_ids: where a model has several; each ends a rollout.
    """

    vocab_size: int
    backspace_id: int
    eos_id: int
    tokenizer_hash: str
    ids_without_token: IdRanges = ()
    other_eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # JSON gives lists.
        object.__setattr__(self, "other_eos_ids", tuple(int(token_id) for token_id in self.other_eos_ids))
        ranges = tuple((int(begin), int(end)) for begin, end in self.ids_without_token)
        object.__setattr__(self, "ids_without_token", ranges)
        special = {self.backspace_id, *self.eos_ids}
        if len(special) != 1 + len(self.eos_ids) or not 0 <= min(special) <= max(special) < self.vocab_size:
            raise ValueError(
                f"backspace {self.backspace_id} and the <eos> ids {self.eos_ids} must differ and lie in "
                f"[0, {self.vocab_size})"
            )
        edges = [edge for both in ranges for edge in both]
        if edges != sorted(set(edges)) or not all(0 <= edge <= self.vocab_size for edge in edges):
            raise ValueError(f"ids_without_token={ranges} are no ascending ranges in [0, {self.vocab_size})")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a rollout, the one of demonstrations first."""
        return (self.eos_id, *self.other_eos_ids)

    def has_token(self) -> npt.NDArray[np.bool_]:
        """[vocab_size] whether a token, or backspace, has the id."""
        has_token = np.ones(self.vocab_size, dtype=np.bool_)
        for begin, end in self.ids_without_token:
            has_token[begin:end] = False
        return has_token

    def to_metadata(self) -> dict[bytes, bytes]:
        """Schema metadata: the schema version, and the fields as JSON."""
        return {b"schema_version": str(SCHEMA_VERSION).encode(), b"contract": json.dumps(asdict(self)).encode()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None) -> TokenContract:
        """Read the contract back; ValueError where the metadata is absent, malformed, or of another schema version."""
        metadata = metadata or {}
        version = metadata.get(b"schema_version", b"none").decode()
        if version != str(SCHEMA_VERSION):
            raise ValueError(
                f"trajectory schema version {version} cannot be read; this program reads version {SCHEMA_VERSION}"
            )
        try:
            return cls(**json.loads(metadata.get(b"contract", b"{}")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"the metadata of the trajectory schema hold no token contract: {error}") from None


SAMPLING_TYPE = pa.struct(
    [
        pa.field("temperature", pa.float32(), nullable=False),
        pa.field("top_p", pa.float32(), nullable=False),
        # Backspace was masked at the floor alone; False: it was masked everywhere, so no action is one.
        pa.field("backspace", pa.bool_(), nullable=False),
    ]
)

_FIELDS = [
    pa.field("id", pa.string(), nullable=False),
    pa.field("source", pa.string(), nullable=False),  # one of SOURCES
    pa.field("task", pa.string(), nullable=False),
    pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
    # Ids as the policy (or the expert) chose them, backspace included.
    pa.field("actions", pa.list_(pa.int32()), nullable=False),
    # What the environment appended instead, where noise was injected; null elements (or a null list) where equal.
    pa.field("executed", pa.list_(pa.int32())),
    # Of the processed distribution (temperature, top-p, masks) the action was sampled from; null for experts.
    pa.field("logprobs", pa.list_(pa.float32())),
    # Version of the weights behind each action; null for experts.
    pa.field("policy_version", pa.list_(pa.int32())),
    pa.field("weights_fingerprint", pa.string()),  # of the newest version in the row
    pa.field("finish_reason", pa.string(), nullable=False),  # one of FINISH_REASONS
    pa.field("sampling", SAMPLING_TYPE),
    pa.field("reward", pa.float32()),
    pa.field("features", pa.list_(pa.float32())),
    pa.field("actor", pa.string(), nullable=False),
    pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),
]
_ROW_FIELD = pa.field(ROW, pa.int64(), nullable=False)


def trajectory_schema(contract: TokenContract) -> pa.Schema:
    """The Arrow schema of trajectories whose ids follow `contract`."""
    return pa.schema(_FIELDS, metadata=contract.to_metadata())


def stored_schema(contract: TokenContract) -> pa.Schema:
    """The schema of stored trajectories: `row`, the last column, counts insertions into the shard over all sources.

    A number is never given to two rows, and rows ascend in a file. They need not be contiguous there: compaction
    leaves out rows that nobody needs any longer.
    """
    return trajectory_schema(contract).append(_ROW_FIELD)


def with_rows(batch: pa.RecordBatch, rows: npt.NDArray[np.int64]) -> pa.RecordBatch:
    """A trajectory batch as it is stored; rows: [n] its row numbers. No column is copied."""
    return batch.append_column(_ROW_FIELD, pa.array(rows))


def rows_of(batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
    """[n] row numbers of a stored batch."""
    rows: npt.NDArray[np.int64] = batch.column(ROW).to_numpy()
    return rows


@dataclass(frozen=True)
class Behavior:
    """The acting policy's record of each of A actions, in the order of `TrajectoryArrays`.

    An action's stored log-probability is that of the distribution it was sampled from: logits over a temperature, cut
    to a nucleus (top-p), with backspace masked at the floor or everywhere. All of that except the nucleus can be
    computed again from logits alone.

    log_prob: [A] as stored; 0 where none is (experts). version: [A] of the weights; NO_VERSION for experts.
    temperature: [A] that log_prob can be repeated at; 0 where it cannot be (none stored, or sampled from a nucleus).
    offers_backspace: [L] whether a row's actions were sampled with backspace among them; True for experts.
    """

    log_prob: Float32
    version: Int64
    temperature: Float32
    offers_backspace: npt.NDArray[np.bool_]

    @classmethod
    def from_batch(cls, batch: pa.RecordBatch) -> Behavior:
        """Of each row of a validated trajectory batch."""
        lengths = batch.column("actions").value_lengths().to_numpy(zero_copy_only=False)
        log_prob = np.zeros(int(lengths.sum()), dtype=np.float32)
        version = np.full(len(log_prob), NO_VERSION, dtype=np.int64)
        has_log_prob = _spread(batch.column("logprobs"), lengths, log_prob)
        _spread(batch.column("policy_version"), lengths, version)
        sampling = batch.column("sampling")
        whole = pc.equal(pc.struct_field(sampling, "top_p"), 1.0).fill_null(False)
        of_row = pc.if_else(whole, pc.struct_field(sampling, "temperature"), 0.0).fill_null(0.0)
        temperature = np.repeat(of_row.to_numpy(zero_copy_only=False).astype(np.float32), lengths)
        offers_backspace = pc.struct_field(sampling, "backspace").fill_null(True).to_numpy(zero_copy_only=False)
        return cls(log_prob, version, np.where(has_log_prob, temperature, np.float32(0.0)), offers_backspace)


def _spread(column: pa.ListArray, lengths: Int64, target: Float32 | Int64) -> npt.NDArray[np.bool_]:
    """Write a list column, null for some rows, to the places of the actions of the others; [A] which those are."""
    present: npt.NDArray[np.bool_] = np.repeat(column.is_valid().to_numpy(zero_copy_only=False), lengths)
    target[present] = column.flatten().to_numpy(zero_copy_only=False)
    return present
