"""Whether a batch as a whole can be read as trajectories of a token contract, whoever made it.

Nothing may follow an offset of a batch before `sound_buffers` looked at it: Arrow trusts what it is given, and a wild
offset reads foreign memory or ends the process.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from buffer.trajectory.schema import TokenContract, trajectory_schema

Bool = npt.NDArray[np.bool_]

_schema_of = lru_cache(maxsize=8)(trajectory_schema)


def conform(batch: pa.RecordBatch, contract: TokenContract) -> pa.RecordBatch:
    """The batch with exactly the contract's schema, columns in its order, nothing copied.

    Raises:
        ValueError: it follows another schema version or token contract, lacks a column, has one of another type or
            one too many.
    """
    schema = _schema_of(contract)
    if batch.schema.equals(schema, check_metadata=True):
        return batch
    theirs = TokenContract.from_metadata(batch.schema.metadata)
    for name in ("tokenizer_hash", "vocab_size", "backspace_id", "eos_id", "ids_without_token", "other_eos_ids"):
        if getattr(theirs, name) != getattr(contract, name):
            raise ValueError(
                f"trajectories with {name} {getattr(theirs, name)} do not belong into a buffer with {name} "
                f"{getattr(contract, name)}: their ids mean other tokens"
            )
    if missing := [name for name in schema.names if name not in batch.schema.names]:
        raise ValueError(f"the batch lacks column {', '.join(missing)}")
    if len(batch.schema.names) != len(schema.names):
        extra = [name for name in batch.schema.names if name not in schema.names]
        raise ValueError(f"the batch has a column too many: {', '.join(extra) or 'one appears twice'}")
    for field in schema:
        found = batch.schema.field(field.name).type
        if found != field.type:
            raise ValueError(f"column {field.name} is {found}, the schema says {field.type}")
    return pa.RecordBatch.from_arrays([batch.column(name) for name in schema.names], schema=schema)


def sound_buffers(batch: pa.RecordBatch) -> tuple[pa.RecordBatch, dict[str, Bool]]:
    """The batch, once offsets, sizes and text are checked; and, by column, the rows [n] whose text is no UTF-8.

    They hold null in its place.

    Raises:
        ValueError: the buffers of a column contradict one another.
    """
    broken: dict[str, Bool] = {}
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        for index, field in enumerate(batch.schema):
            column = batch.column(index)
            error = _contradiction(column)
            if error is not None and field.type == pa.string() and _contradiction(column.view(pa.binary())) is None:
                as_bytes = column.view(pa.binary())
                broken[field.name] = np.array([not _is_utf8(text) for text in as_bytes.to_pylist()], dtype=np.bool_)
                column = pc.if_else(pa.array(broken[field.name]), pa.scalar(None, pa.binary()), as_bytes)
                batch = batch.set_column(index, field, column.cast(pa.string()))
            elif error is not None:
                raise ValueError(f"column {field.name} is broken ({error}): no row of the batch can be read") from None
    return batch, broken


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
