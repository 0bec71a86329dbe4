"""The wire contract between actors, buffer and learner: one Arrow row per trajectory.

A trajectory is one *action log*: the ids the policy chose, `<backspace>` included, in order. Its states follow by
replaying the log on a stack that starts at the prompt (`buffer.trajectory.replay`). Invariants, checked on
insert by `buffer.trajectory.validation`:

- `logprobs`, `policy_version` (policy rows) and `realised` (where present) are as long as `actions`;
- ids lie in [0, vocab_size) and have a token; `prompt_ids` and `realised` never hold backspace;
- what a step *appends* is `realised` where that is not null, else the action. `<eos>` is appended by the last step
  only, and exactly where `finish_reason` is `eos`. (An earlier *action* may be `<eos>`: the label of a step whose
  noise was appended instead.)
- replay is defined at every step: no backspace at the floor (the end of the prompt), and none at all where
  `sampling.floor_mask` says that it was never offered.

Version 2 is version 1 and, in stored rows, the number of the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

SCHEMA_VERSION = 2

ROW = "row"
"""Name of the column that only stored rows have: the number of the row in its shard."""

_WITHOUT_TOKEN = b"ids_without_token"
_OTHER_EOS = b"other_eos_ids"

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
        ranges = tuple((int(begin), int(end)) for begin, end in self.ids_without_token)  # JSON gives lists
        edges = [edge for both in ranges for edge in both]
        if edges != sorted(set(edges)) or not all(0 <= edge <= self.vocab_size for edge in edges):
            raise ValueError(f"ids_without_token={ranges} are no ascending ranges in [0, {self.vocab_size})")
        object.__setattr__(self, "ids_without_token", ranges)
        others = tuple(int(token_id) for token_id in self.other_eos_ids)
        object.__setattr__(self, "other_eos_ids", others)
        special = {self.backspace_id, *self.eos_ids}
        if len(special) != 2 + len(others) or not 0 <= min(special) <= max(special) < self.vocab_size:
            raise ValueError(
                f"backspace {self.backspace_id} and the <eos> ids {self.eos_ids} must differ and lie in "
                f"[0, {self.vocab_size})"
            )

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
        """Schema metadata, with the schema version; without the keys of fields that are empty."""
        ranges = " ".join(f"{begin}:{end}" for begin, end in self.ids_without_token)
        return {
            b"schema_version": str(SCHEMA_VERSION).encode(),
            b"vocab_size": str(self.vocab_size).encode(),
            b"backspace_id": str(self.backspace_id).encode(),
            b"eos_id": str(self.eos_id).encode(),
            b"tokenizer_hash": self.tokenizer_hash.encode(),
            **({_WITHOUT_TOKEN: ranges.encode()} if ranges else {}),
            **({_OTHER_EOS: " ".join(map(str, self.other_eos_ids)).encode()} if self.other_eos_ids else {}),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None) -> TokenContract:
        """Read the contract back from a schema's metadata.

        Raises:
            ValueError: the metadata is absent, incomplete, malformed, or of another schema version.
        """
        metadata = metadata or {}
        version = metadata.get(b"schema_version", b"none").decode()
        if version != str(SCHEMA_VERSION):
            raise ValueError(
                f"trajectory schema version {version} cannot be read; this program reads version {SCHEMA_VERSION}"
            )
        return cls(
            vocab_size=_read_int(metadata, "vocab_size"),
            backspace_id=_read_int(metadata, "backspace_id"),
            eos_id=_read_int(metadata, "eos_id"),
            tokenizer_hash=_read(metadata, "tokenizer_hash"),
            ids_without_token=_read_ranges(metadata),
            other_eos_ids=_read_ids(metadata, _OTHER_EOS),
        )


def _read(metadata: Mapping[bytes, bytes], name: str) -> str:
    value = metadata.get(name.encode())
    if value is None:
        raise ValueError(f"trajectory schema metadata lacks {name}")
    return value.decode()


def _read_int(metadata: Mapping[bytes, bytes], name: str) -> int:
    value = _read(metadata, name)
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"trajectory schema metadata holds {name}={value!r}, which is not a number") from None


def _read_ids(metadata: Mapping[bytes, bytes], name: bytes) -> tuple[int, ...]:
    text = metadata.get(name, b"").decode()
    try:
        return tuple(int(part) for part in text.split())
    except ValueError:
        raise ValueError(f"trajectory schema metadata holds {name.decode()}={text!r}, which are no ids") from None


def _read_ranges(metadata: Mapping[bytes, bytes]) -> IdRanges:
    text = metadata.get(_WITHOUT_TOKEN, b"").decode()
    try:
        pairs = [each.split(":") for each in text.split()]
        return tuple((int(begin), int(end)) for begin, end in pairs)
    except ValueError:
        raise ValueError(
            f"trajectory schema metadata holds {_WITHOUT_TOKEN.decode()}={text!r}, which are no ranges"
        ) from None


SAMPLING_TYPE = pa.struct(
    [
        pa.field("temperature", pa.float32(), nullable=False),
        pa.field("top_p", pa.float32(), nullable=False),
        # Backspace was masked at the floor alone; False: it was masked everywhere, so no action is one.
        pa.field("floor_mask", pa.bool_(), nullable=False),
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
    pa.field("realised", pa.list_(pa.int32())),
    # Of the processed distribution (temperature, top-p, masks) the action was drawn from; null for experts.
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


def without_rows(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A stored batch as it was handed in. No column is copied."""
    return batch.drop_columns([ROW])


def rows_of(batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
    """[n] row numbers of a stored batch."""
    rows: npt.NDArray[np.int64] = batch.column(ROW).to_numpy()
    return rows
