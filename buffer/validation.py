"""The door of the buffer: every invariant of `buffer.schema`, checked for a whole batch at once.

A row that breaks an invariant is refused with the reason; the other rows are kept. What concerns the batch as
a whole (columns, types, token contract) is a `ValueError`, because then no row can be trusted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from buffer.replay import ActionLogs
from buffer.schema import FINISH_REASONS, SOURCES, TokenContract, trajectory_schema

Bool = npt.NDArray[np.bool_]
Int64 = npt.NDArray[np.int64]

LOGPROB_SLACK = 1e-3
"""nats above 0 that rounding may leave in a log-probability."""

_REQUIRED = ("id", "source", "task", "prompt_ids", "actions", "finish_reason", "actor", "created_at")
_NO_NULL_ELEMENTS = ("prompt_ids", "actions", "logprobs", "policy_version")


@dataclass(frozen=True)
class Rejection:
    """A refused row. row: its index in the batch as sent; id: its id, None where it has none."""

    row: int
    id: str | None
    reason: str


@dataclass(frozen=True)
class ValidatedBatch:
    """good: the rows that hold every invariant, in their order; rejections: the others, by row."""

    good: pa.RecordBatch
    rejections: tuple[Rejection, ...]


class _Findings:
    """First reason per row: rows already refused are not looked at again."""

    def __init__(self, num_rows: int) -> None:
        self.bad: Bool = np.zeros(num_rows, dtype=np.bool_)
        self.reasons: dict[int, str] = {}

    def refuse(self, rows: Int64, reason: str) -> None:
        for row in rows[~self.bad[rows]].tolist():
            self.reasons[row] = reason
        self.bad[rows] = True


def validate(batch: pa.RecordBatch, contract: TokenContract) -> ValidatedBatch:
    """Split a trajectory batch into rows that hold every invariant of `buffer.schema` and rejections.

    Raises:
        ValueError: the batch follows another schema version or token contract, lacks a column, has one of
            another type or one too many, or its buffers are broken.
    """
    batch = _conform(batch, contract)
    findings = _Findings(batch.num_rows)
    _check_structure(batch, findings)
    sound = np.flatnonzero(~findings.bad)
    if len(sound):
        _check_tokens(_take(batch, sound), sound, contract, findings)
    if not findings.reasons:
        return ValidatedBatch(batch, ())
    ids = batch.column("id")
    rejections = tuple(Rejection(row, ids[row].as_py(), reason) for row, reason in sorted(findings.reasons.items()))
    return ValidatedBatch(_take(batch, np.flatnonzero(~findings.bad)), rejections)


def _take(batch: pa.RecordBatch, rows: Int64) -> pa.RecordBatch:
    return batch if len(rows) == batch.num_rows else batch.take(pa.array(rows))


def _conform(batch: pa.RecordBatch, contract: TokenContract) -> pa.RecordBatch:
    """The batch with exactly the contract's schema, columns in its order, nothing copied."""
    theirs = TokenContract.from_metadata(batch.schema.metadata)
    for name in ("tokenizer_hash", "vocab_size", "backspace_id", "eos_id"):
        if getattr(theirs, name) != getattr(contract, name):
            raise ValueError(
                f"trajectories with {name} {getattr(theirs, name)} do not belong into a buffer with {name} "
                f"{getattr(contract, name)}: their ids mean other tokens"
            )
    schema = trajectory_schema(contract)
    if missing := [name for name in schema.names if name not in batch.schema.names]:
        raise ValueError(f"the batch lacks column {', '.join(missing)}")
    if len(batch.schema.names) != len(schema.names):
        extra = [name for name in batch.schema.names if name not in schema.names]
        raise ValueError(f"the batch has a column too many: {', '.join(extra) or 'one appears twice'}")
    for field in schema:
        found = batch.schema.field(field.name).type
        if found != field.type:
            raise ValueError(f"column {field.name} is {found}, the schema says {field.type}")
    batch = pa.RecordBatch.from_arrays([batch.column(name) for name in schema.names], schema=schema)
    # Offsets and text are checked before anything follows them; ArrowInvalid is a ValueError.
    batch.validate(full=True)
    return batch


def _check_structure(batch: pa.RecordBatch, findings: _Findings) -> None:
    """Nulls, enumerations and list lengths: what the checks of tokens rely on."""
    for name in _REQUIRED:
        findings.refuse(_rows(pc.is_null(batch.column(name))), f"{name} is null")
    ids = batch.column("id")
    findings.refuse(_rows(pc.equal(ids, "")), "id is empty")
    findings.refuse(_repeated(ids), "id appears earlier in the same batch")
    for name, allowed in (("source", SOURCES), ("finish_reason", FINISH_REASONS)):
        known = pc.is_in(batch.column(name), value_set=pa.array(allowed))
        findings.refuse(_rows(pc.invert(known)), f"{name} is none of {', '.join(allowed)}")
    for name in _NO_NULL_ELEMENTS:
        column = batch.column(name)
        values = column.flatten()
        if values.null_count:
            findings.refuse(_owners(column)[_rows(values.is_null())], f"{name} holds a null")
    sampling = batch.column("sampling")
    for index, field in enumerate(sampling.type):
        inner_null = pc.and_(sampling.is_valid(), sampling.field(index).is_null())
        findings.refuse(_rows(inner_null), f"sampling.{field.name} is null")
    findings.refuse(np.flatnonzero(_lengths(batch.column("prompt_ids")) == 0), "prompt_ids is empty")
    from_policy = pc.equal(batch.column("source"), "policy").fill_null(False).to_numpy(zero_copy_only=False)
    num_actions = _lengths(batch.column("actions"))
    for name in ("logprobs", "policy_version", "realised"):
        column = batch.column(name)
        present = column.is_valid().to_numpy(zero_copy_only=False)
        if name != "realised":
            findings.refuse(np.flatnonzero(from_policy & ~present), f"a policy trajectory without {name}")
            findings.refuse(np.flatnonzero(~from_policy & present), f"an expert trajectory with {name}")
        differ = present & (_lengths(column) != num_actions)
        findings.refuse(np.flatnonzero(differ), f"{name} is not as long as actions")


def _check_tokens(batch: pa.RecordBatch, rows: Int64, contract: TokenContract, findings: _Findings) -> None:
    """Values and replay of structurally sound rows; rows: [n] index of each in the batch as sent."""
    for name in ("prompt_ids", "actions", "realised"):
        column = batch.column(name)
        values = column.flatten().fill_null(0).to_numpy(zero_copy_only=False)
        outside = (values < 0) | (values >= contract.vocab_size)
        findings.refuse(rows[_owners(column)[outside]], f"{name} holds an id outside [0, {contract.vocab_size})")
        if name != "actions":
            findings.refuse(rows[_owners(column)[values == contract.backspace_id]], f"{name} holds backspace")
    logprobs = batch.column("logprobs")
    values = logprobs.flatten().to_numpy()
    wrong = ~(np.isfinite(values) & (values <= LOGPROB_SLACK))
    findings.refuse(rows[_owners(logprobs)[wrong]], "logprobs holds a value that is no finite log-probability")
    versions = batch.column("policy_version")
    negative = versions.flatten().to_numpy() < 0
    findings.refuse(rows[_owners(versions)[negative]], "policy_version holds a negative version")
    _check_replay(batch, rows, contract, findings)


def _check_replay(batch: pa.RecordBatch, rows: Int64, contract: TokenContract, findings: _Findings) -> None:
    """The text that results: `<eos>` only as its last token, no backspace at the floor.

    What counts is the realised token: noise may stand in for an `<eos>` that the expert chose.
    """
    logs = ActionLogs.from_batch(batch)
    log = np.repeat(np.arange(logs.num_logs), logs.lengths)
    is_eos = logs.realised == contract.eos_id
    is_last = np.zeros(len(log), dtype=np.bool_)
    filled = np.flatnonzero(logs.lengths)
    is_last[logs.offsets[1:][filled] - 1] = True
    findings.refuse(rows[log[is_eos & ~is_last]], "an action follows <eos>")

    ends = np.zeros(logs.num_logs, dtype=np.bool_)
    ends[log[is_eos & is_last]] = True
    says = pc.equal(batch.column("finish_reason"), "eos").to_numpy(zero_copy_only=False)
    findings.refuse(rows[says & ~ends], "finish_reason is eos, but the last action is not <eos>")
    findings.refuse(rows[ends & ~says], "the last action is <eos>, but finish_reason is not eos")

    steps = np.where(logs.realised == contract.backspace_id, -1, 1)
    running = np.cumsum(steps)
    before_log = np.concatenate([[0], running])[logs.offsets[:-1]]
    below_floor = running - before_log[log] < 0
    findings.refuse(rows[log[below_floor]], "takes a token back at the floor (the end of its prompt)")


def _rows(mask: pa.Array) -> Int64:
    return np.flatnonzero(mask.fill_null(False).to_numpy(zero_copy_only=False))


def _lengths(column: pa.ListArray) -> Int64:
    lengths: Int64 = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths


def _owners(column: pa.ListArray) -> Int64:
    """[elements] row that each element of `column.flatten()` belongs to."""
    return np.repeat(np.arange(len(column)), _lengths(column))


def _repeated(ids: pa.StringArray) -> Int64:
    """Rows whose id stands in an earlier row; null ids do not count."""
    codes = ids.dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
    if len(codes) == 0 or (codes.max() + 1 == len(codes)):
        return np.empty(0, dtype=np.int64)
    _, first = np.unique(codes, return_index=True)
    repeated = np.ones(len(codes), dtype=np.bool_)
    repeated[first] = False
    return np.flatnonzero(repeated & (codes >= 0))
