"""Stored rows of the previous schema version, made into rows of this one.

    version 1    no `row` column: rows of a file are contiguous, numbered from the `first_row` of its manifest entry
                 (of the open segment: the manifest's `next_row`)
    version 2    `row` is the last column (see `buffer.trajectory.schema.stored_schema`)

One version back is readable and no more: whoever skips two upgrades the rows with the program between.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from buffer.trajectory.schema import SCHEMA_VERSION, TokenContract, stored_schema, trajectory_schema, with_rows

PREVIOUS_VERSION = 1

_VERSION_KEY = b"schema_version"


def stored_version(schema: pa.Schema) -> int:
    """The schema version that a file of stored rows says it has.

    Raises:
        ValueError: it says none, or one that this program does not read.
    """
    text = (schema.metadata or {}).get(_VERSION_KEY, b"none").decode(errors="replace")
    if text not in (str(PREVIOUS_VERSION), str(SCHEMA_VERSION)):
        later = text.isdigit() and int(text) > SCHEMA_VERSION
        raise ValueError(
            f"rows of schema version {text} cannot be read; this program reads versions {PREVIOUS_VERSION} and "
            f"{SCHEMA_VERSION}" + (": use the version of the program that wrote them, or a later one" if later else "")
        )
    return int(text)


def stored_contract(schema: pa.Schema) -> TokenContract:
    """The token contract of a file of stored rows.

    Raises:
        ValueError: see `stored_version`; or the metadata of the schema are incomplete.
    """
    stored_version(schema)
    return TokenContract.from_metadata({**schema.metadata, _VERSION_KEY: str(SCHEMA_VERSION).encode()})


def schema_of_version(contract: TokenContract, version: int) -> pa.Schema:
    """The schema that a file of stored rows of `version` begins with, metadata included."""
    if version == SCHEMA_VERSION:
        return stored_schema(contract)
    assert version == PREVIOUS_VERSION, "`stored_version` lets nothing else through"
    return trajectory_schema(contract).with_metadata(
        {**contract.to_metadata(), _VERSION_KEY: str(PREVIOUS_VERSION).encode()}
    )


def upgrade(batches: Sequence[pa.RecordBatch], first_row: int) -> list[pa.RecordBatch]:
    """All batches of one file in the form that this program writes; no column is copied.

    first_row: number of the file's first row, by which rows without a number are counted.

    Raises:
        ValueError: the file follows no schema that this program reads.
    """
    upgraded: list[pa.RecordBatch] = []
    for batch in batches:
        version = stored_version(batch.schema)
        contract = stored_contract(batch.schema)
        if not batch.schema.equals(schema_of_version(contract, version), check_metadata=True):
            raise ValueError(f"rows that call themselves schema version {version} have other columns than it")
        upgraded.append(batch if version == SCHEMA_VERSION else _numbered(batch, contract, first_row))
        first_row += batch.num_rows
    return upgraded


def _numbered(batch: pa.RecordBatch, contract: TokenContract, first_row: int) -> pa.RecordBatch:
    rows = np.arange(first_row, first_row + batch.num_rows, dtype=np.int64)
    return with_rows(batch.replace_schema_metadata(contract.to_metadata()), rows)
