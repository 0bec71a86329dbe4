"""Validation on insert: every invariant of `buffer.trajectory.schema`, checked for a whole batch at once.

A row that breaks an invariant is refused with the reason; the other rows are kept. What concerns the batch as
a whole (columns, types, token contract, broken buffers) is a `ValueError`, because then no row can be trusted.
Nothing may follow an offset of a batch before `_sound_buffers` looked at it: Arrow trusts what it is given, and a wild
offset reads foreign memory or ends the process.

Batches are small and nearly always good, so each check first asks a question about the whole batch (a count of
nulls, a smallest and a largest value) and looks for rows only if the answer is not the expected one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from buffer.trajectory.replay import TrajectoryArrays
from buffer.trajectory.schema import FINISH_REASONS, SOURCES, TokenContract, trajectory_schema

Bool = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

LOGPROB_SLACK = 1e-3
"""nats above 0 that rounding may leave in a log-probability."""

MAX_ROW_TOKENS = 2**18
"""Largest number of prompt ids and actions of one row, together; also of its features."""

MAX_TEXT_BYTES = 1024
"""Largest size of one text of a row, such as its id, in UTF-8."""

_REQUIRED = ("id", "source", "task", "prompt_ids", "actions", "finish_reason", "actor", "created_at")
_FREE_TEXTS = ("id", "task", "weights_fingerprint", "actor")
_NO_NULL_ELEMENTS = ("prompt_ids", "actions", "logprobs", "policy_version", "features")
_LISTS = (*_NO_NULL_ELEMENTS, "executed")
_SOURCES = pc.SetLookupOptions(value_set=pa.array(SOURCES))
_FINISH_REASONS = pc.SetLookupOptions(value_set=pa.array(FINISH_REASONS))
_POLICY, _EOS = SOURCES.index("policy"), FINISH_REASONS.index("eos")
_ALL_POLICY = pa.repeat("policy", 1024)
_FLOAT = np.finfo(np.float32)
_VALUES = (
    ("logprobs", _FLOAT.min, LOGPROB_SLACK, "a value that is no finite log-probability"),
    ("policy_version", 0, np.iinfo(np.int32).max, "a negative version"),
    ("features", _FLOAT.min, _FLOAT.max, "a value that is not finite"),
)
"""Smallest and largest of a list's elements; a NaN lies outside of both."""
_LATEST_US = 253_402_300_799_999_999  # the end of the year 9999, beyond which Python has no dates


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
    """First reason per row."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self.reasons: dict[int, str] = {}

    def refuse(self, mask: Bool, reason: str) -> None:
        if mask.any():
            self.refuse_rows(np.flatnonzero(mask), reason)

    def refuse_rows(self, rows: Int64, reason: str) -> None:
        for row in rows.tolist():
            self.reasons.setdefault(row, reason)

    def good_rows(self) -> Int64:
        """Those that no check has refused so far, ascending."""
        good = np.ones(self._num_rows, dtype=np.bool_)
        good[list(self.reasons)] = False
        return np.flatnonzero(good)


class _Lists:
    """A list column. offsets: [n+1] list i owns elements offsets[i]:offsets[i+1], a null list none; null: [n], None
    where no list is null; is_absent: all are.
    """

    def __init__(self, column: pa.ListArray) -> None:
        num_null = column.null_count
        self.is_absent = num_null == len(column) > 0
        self.null: Bool | None = None
        if num_null == 0:
            self.offsets: Int64 = column.offsets.to_numpy().astype(np.int64)
            self.elements = column.values
            if (first := self.offsets[0]) or self.offsets[-1] != len(self.elements):  # of a slice of a larger batch
                self.offsets -= first
                self.elements = self.elements.slice(first, self.offsets[-1])
        elif self.is_absent:
            self.offsets = np.zeros(num_null + 1, dtype=np.int64)
            self.elements = column.values.slice(0, 0)
            self.null = np.ones(num_null, dtype=np.bool_)
        else:
            self.offsets = np.concatenate([[0], np.cumsum(column.value_lengths().fill_null(0).to_numpy())])
            self.elements = column.flatten()
            self.null = column.is_null().to_numpy(zero_copy_only=False)

    @property
    def lengths(self) -> Int64:
        return self.offsets[1:] - self.offsets[:-1]

    def owners(self, mask: Bool) -> Int64:
        """Lists that own the elements where `mask` is True."""
        return np.searchsorted(self.offsets, np.flatnonzero(mask), side="right") - 1


class _Columns:
    """A batch, taken apart once for all checks. sources, finishes: [n] index in SOURCES, FINISH_REASONS; -1 = none."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch
        self.by_name = dict(zip(batch.schema.names, batch.columns, strict=True))
        self.lists = {name: _Lists(self.by_name[name]) for name in _LISTS}
        self.sources = source_codes(self.by_name["source"])
        self.finishes = _codes(self.by_name["finish_reason"], _FINISH_REASONS)


def validate(batch: pa.RecordBatch, contract: TokenContract) -> ValidatedBatch:
    """Split a trajectory batch into rows that hold every invariant of `buffer.trajectory.schema` and rejections.
    ValueError where the batch follows another schema version or token contract, lacks a column, has one of another type
    or one too many, or its buffers are broken."""
    findings = _Findings(batch.num_rows)
    batch = _sound_buffers(_conform(batch, contract), findings)
    columns = _Columns(batch)
    _check_texts(columns, findings)
    _check_structure(columns, findings)
    sound = findings.good_rows()
    if findings.reasons:
        columns = _Columns(batch.take(pa.array(sound)))
    _check_values(columns, sound, contract, findings)
    if not findings.reasons:
        return ValidatedBatch(batch, ())
    ids = batch.column("id")
    rejections = tuple(Rejection(row, ids[row].as_py(), reason) for row, reason in sorted(findings.reasons.items()))
    return ValidatedBatch(batch.take(pa.array(findings.good_rows())), rejections)


def source_codes(sources: pa.StringArray) -> Int32:
    """[n] index of each in `SOURCES`, -1 where it is none of them."""
    if sources.equals(_ALL_POLICY.slice(0, len(sources))):  # as actors send them
        return np.full(len(sources), _POLICY, dtype=np.int32)
    return _codes(sources, _SOURCES)


_schema_of = lru_cache(maxsize=8)(trajectory_schema)


def _conform(batch: pa.RecordBatch, contract: TokenContract) -> pa.RecordBatch:
    """The batch with exactly the contract's schema, columns in its order, nothing copied."""
    schema = _schema_of(contract)
    if batch.schema.equals(schema, check_metadata=True):
        return batch
    theirs = TokenContract.from_metadata(batch.schema.metadata)
    for name, value in vars(contract).items():
        if getattr(theirs, name) != value:
            raise ValueError(
                f"trajectories with {name} {getattr(theirs, name)} do not belong into a buffer with {name} {value}: "
                "their ids mean other tokens"
            )
    if sorted(batch.schema.names) != sorted(schema.names):
        raise ValueError(f"the batch has columns {', '.join(batch.schema.names)}; needed: {', '.join(schema.names)}")
    for field in schema:
        found = batch.schema.field(field.name).type
        if found != field.type:
            raise ValueError(f"column {field.name} is {found}, the schema says {field.type}")
    return pa.RecordBatch.from_arrays([batch.column(name) for name in schema.names], schema=schema)


def _sound_buffers(batch: pa.RecordBatch, findings: _Findings) -> pa.RecordBatch:
    """The batch, once offsets, sizes and text are checked; text that is no UTF-8 is refused, and null stands there."""
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        for index, field in enumerate(batch.schema):
            column = batch.column(index)
            error = _contradiction(column)
            if error is not None and field.type == pa.string() and _contradiction(column.view(pa.binary())) is None:
                as_bytes = column.view(pa.binary())
                broken = np.array([not _is_utf8(text) for text in as_bytes.to_pylist()], dtype=np.bool_)
                findings.refuse(broken, f"{field.name} is no UTF-8 text")
                column = pc.if_else(pa.array(broken), pa.scalar(None, pa.binary()), as_bytes)
                batch = batch.set_column(index, field, column.cast(pa.string()))
            elif error is not None:
                raise ValueError(f"column {field.name} is broken ({error}): no row of the batch can be read") from None
    return batch


def _contradiction(column: pa.Array) -> str | None:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        return str(error)
    return None


def _is_utf8(text: bytes | None) -> bool:
    try:
        return text is None or text.decode() is not None
    except UnicodeDecodeError:
        return False


def _check_texts(columns: _Columns, findings: _Findings) -> None:
    """Nulls, sizes and enumerations."""
    by_name = columns.by_name
    for name in _REQUIRED:
        if (column := by_name[name]).null_count:
            findings.refuse(_mask(column.is_null()), f"{name} is null")
    for name in _FREE_TEXTS:
        if _longest_text_bytes(column := by_name[name]) > MAX_TEXT_BYTES:
            sizes = pc.binary_length(column)
            sizes_bytes = (sizes.fill_null(0) if sizes.null_count else sizes).to_numpy()
            findings.refuse(sizes_bytes > MAX_TEXT_BYTES, f"{name} is longer than {MAX_TEXT_BYTES:,} bytes")
    ids = by_name["id"].to_pylist()
    if len(set(ids)) < len(ids) or "" in ids:
        findings.refuse(np.array([id_ == "" for id_ in ids]), "id is empty")
        first = {id_: row for row, id_ in reversed(list(enumerate(ids)))}
        repeated = [id_ is not None and first[id_] < row for row, id_ in enumerate(ids)]
        findings.refuse(np.array(repeated), "id appears earlier in the same batch")
    findings.refuse(columns.sources < 0, f"source is none of {', '.join(SOURCES)}")
    findings.refuse(columns.finishes < 0, f"finish_reason is none of {', '.join(FINISH_REASONS)}")


def _check_structure(columns: _Columns, findings: _Findings) -> None:
    """List lengths and nulls in lists: what the checks of values rely on."""
    lists = columns.lists
    for name in _NO_NULL_ELEMENTS:
        if (elements := lists[name].elements).null_count:
            findings.refuse_rows(lists[name].owners(_mask(elements.is_null())), f"{name} holds a null")
    sampling = columns.by_name["sampling"]
    for index, field in enumerate(sampling.type):
        if sampling.field(index).null_count:
            inner_null = pc.and_(sampling.is_valid(), sampling.field(index).is_null())
            findings.refuse(_mask(inner_null), f"sampling.{field.name} is null")
    actions = lists["actions"]
    num_actions, prompt_lengths = actions.lengths, lists["prompt_ids"].lengths
    findings.refuse(prompt_lengths == 0, "prompt_ids is empty")
    too_long = prompt_lengths + num_actions > MAX_ROW_TOKENS
    findings.refuse(too_long, f"prompt and actions have more than {MAX_ROW_TOKENS:,} tokens")
    if not lists["features"].is_absent:
        too_long = lists["features"].lengths > MAX_ROW_TOKENS
        findings.refuse(too_long, f"features has more than {MAX_ROW_TOKENS:,} numbers")
    from_policy = columns.sources == _POLICY
    all_from_policy = bool(from_policy.all())
    for name in ("logprobs", "policy_version", "executed"):
        of_name, may_be_absent = lists[name], name == "executed"
        if of_name.is_absent and may_be_absent:
            continue
        if all_from_policy and of_name.null is None and np.array_equal(of_name.offsets, actions.offsets):
            continue  # as actors send them
        present = np.True_ if of_name.null is None else ~of_name.null
        if not may_be_absent and np.any(present != from_policy):
            findings.refuse(from_policy & ~present, f"a policy trajectory without {name}")
            findings.refuse(~from_policy & present, f"an expert trajectory with {name}")
        findings.refuse((of_name.lengths != num_actions) & present, f"{name} is not as long as actions")


def _check_values(columns: _Columns, rows: Int64, contract: TokenContract, findings: _Findings) -> None:
    """Values and replay of structurally sound rows; rows: [n] index of each in the batch as sent."""
    by_name, lists = columns.by_name, columns.lists
    for name in ("prompt_ids", "actions", "executed"):
        _check_ids(name, lists[name], rows, contract, findings)
    for name, least, greatest, reason in _VALUES:
        values = lists[name].elements.to_numpy()
        if len(values) and not (values.min() >= least and values.max() <= greatest):
            outside = ~((values >= least) & (values <= greatest))
            findings.refuse_rows(rows[lists[name].owners(outside)], f"{name} holds {reason}")
    sampling = by_name["sampling"]
    for name, column in (
        ("reward", by_name["reward"]),
        ("sampling.temperature", sampling.field(0)),
        ("sampling.top_p", sampling.field(1)),
    ):
        if (num_null := column.null_count) < len(column):
            values = (column.fill_null(0.0) if num_null else column).to_numpy()
            if not (finite := np.isfinite(values)).all():
                findings.refuse_rows(rows[~finite], f"{name} is not finite")
    created_us = by_name["created_at"].view(pa.int64()).to_numpy()
    outside = (created_us < 0) | (created_us > _LATEST_US)
    findings.refuse_rows(rows[outside], "created_at lies outside of the years 1970 to 9999")
    _check_replay(columns, rows, contract, findings)


def _check_ids(name: str, lists: _Lists, rows: Int64, contract: TokenContract, findings: _Findings) -> None:
    values, present = lists.elements, None
    if values.null_count:  # in `executed`: nothing was injected there
        present = _mask(values.is_valid())
        values = values.fill_null(0)
    values = values.to_numpy()
    if len(values) == 0:
        return
    if values.min() < 0 or values.max() >= contract.vocab_size:
        outside = (values < 0) | (values >= contract.vocab_size)
        findings.refuse_rows(rows[lists.owners(outside)], f"{name} holds an id outside [0, {contract.vocab_size})")
    if contract.ids_without_token and values.max() >= contract.ids_without_token[0][0]:
        no_token = np.zeros(len(values), dtype=np.bool_)
        for begin, end in contract.ids_without_token:
            no_token |= (values >= begin) & (values < end)
        findings.refuse_rows(rows[lists.owners(no_token)], f"{name} holds an id that has no token")
    if name != "actions":
        backspace = values == contract.backspace_id
        if present is not None:
            backspace &= present
        if backspace.any():
            findings.refuse_rows(rows[lists.owners(backspace)], f"{name} holds backspace")


def _check_replay(columns: _Columns, rows: Int64, contract: TokenContract, findings: _Findings) -> None:
    """The text that results: `<eos>` only as its last token, no backspace at the floor or where none was offered. What
    counts is the executed token: noise may stand in for an `<eos>` that the expert chose."""
    actions = columns.lists["actions"]
    if not columns.lists["executed"].is_absent and columns.lists["executed"].lengths.any():
        executed = TrajectoryArrays.from_batch(columns.batch).executed
    else:
        executed = actions.elements.to_numpy()
    ends = np.zeros(len(rows), dtype=np.bool_)
    is_eos = np.zeros(len(executed), dtype=np.bool_)
    for eos_id in contract.eos_ids:  # few: quicker than `np.isin`
        is_eos |= executed == eos_id
    if is_eos.any():
        eos = np.flatnonzero(is_eos)
        trajectory = np.searchsorted(actions.offsets, eos, side="right") - 1
        is_last = eos == actions.offsets[trajectory + 1] - 1
        findings.refuse_rows(rows[trajectory[~is_last]], "an action follows <eos>")
        ends[trajectory[is_last]] = True
    says = columns.finishes == _EOS
    findings.refuse_rows(rows[says & ~ends], "finish_reason is eos, but the last action is not <eos>")
    findings.refuse_rows(rows[ends & ~says], "the last action is <eos>, but finish_reason is not eos")

    if len(backspaces := np.flatnonzero(executed == contract.backspace_id)):
        # After t actions, k of them backspaces, the text is t - 2k tokens long: none is left to take back if t <= 2k.
        # For the j-th backspace of the batch, at place p, and the first one f of its trajectory, which begins at place
        # b, that is p - b <= 2 (j - f).
        firsts = np.searchsorted(backspaces, actions.offsets)
        floors = np.repeat(actions.offsets[:-1] - 2 * firsts[:-1], np.diff(firsts))
        at_floor = backspaces - 2 * np.arange(len(backspaces)) <= floors
        trajectory = np.searchsorted(actions.offsets, backspaces[at_floor], side="right") - 1
        findings.refuse_rows(rows[trajectory], "takes a token back at the floor (the end of its prompt)")
        sampling = columns.by_name["sampling"]
        if sampling.field("backspace").false_count:  # also of what stands under a null
            never_offered = ~_mask(pc.struct_field(sampling, "backspace").fill_null(True))
            reason = "takes a token back, and sampling.backspace says that backspace was never offered"
            findings.refuse_rows(rows[never_offered & (np.diff(firsts) > 0)], reason)


def _longest_text_bytes(column: pa.StringArray) -> int:
    """At least as many as the longest text has; what stands under a null counts too."""
    if not len(column):
        return 0
    bounds = np.frombuffer(column.buffers()[1], np.int32, len(column) + 1, 4 * column.offset)
    return int((bounds[1:] - bounds[:-1]).max())


def _mask(mask: pa.Array) -> Bool:
    """[n] as numpy; null counts as False."""
    return np.asarray((mask.fill_null(False) if mask.null_count else mask).to_numpy(zero_copy_only=False))


def _codes(column: pa.StringArray, allowed: pc.SetLookupOptions) -> Int32:
    """[n] index of each text in the set `allowed`, -1 where it is none of them."""
    codes = pc.call_function("index_in", [column], allowed)
    return np.asarray((codes.fill_null(-1) if codes.null_count else codes).to_numpy())
