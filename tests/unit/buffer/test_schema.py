"""The wire contract: what a trajectory file says of itself, and what is refused when it is read."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pytest

from buffer.trajectory.schema import (
    FINISH_REASONS,
    ROW,
    SCHEMA_VERSION,
    SOURCES,
    TokenContract,
    rows_of,
    stored_schema,
    trajectory_schema,
    with_rows,
)

CONTRACT = TokenContract(vocab_size=300, backspace_id=3, eos_id=2, tokenizer_hash="äß0123")


def row(**changes):
    values = {
        "id": "a/0",
        "source": SOURCES[1],
        "task": "t",
        "prompt_ids": [5],
        "actions": [6, 3, 2],
        "executed": [7, None, None],
        "logprobs": [-0.5, -1.0, -2.0],
        "policy_version": [0, 0, 1],
        "finish_reason": FINISH_REASONS[0],
        "sampling": {"temperature": 1.0, "top_p": 1.0, "backspace": True},
        "actor": "a",
        "created_at": 0,
    }
    return values | changes


def test_contract_comes_back_from_a_file(tmp_path):
    schema = trajectory_schema(CONTRACT)
    batch = pa.RecordBatch.from_pylist([row(), row(executed=None, sampling=None)], schema=schema)
    with pa.ipc.new_file(tmp_path / "segment.arrow", schema) as writer:
        writer.write_batch(batch)
    with pa.ipc.open_file(pa.memory_map(str(tmp_path / "segment.arrow"))) as reader:
        assert TokenContract.from_metadata(reader.schema.metadata) == CONTRACT
        assert reader.schema.equals(schema, check_metadata=True)
        assert reader.get_batch(0).equals(batch)


def test_ids_without_a_token_come_back(tmp_path):
    contract = replace(CONTRACT, ids_without_token=((4, 7), (290, 300)))
    assert TokenContract.from_metadata(contract.to_metadata()) == contract
    assert TokenContract(**json.loads(json.dumps(asdict(contract)))) == contract
    assert np.flatnonzero(~contract.has_token()).tolist() == [4, 5, 6, *range(290, 300)]
    assert CONTRACT.has_token().all()
    assert not trajectory_schema(contract).equals(trajectory_schema(CONTRACT), check_metadata=True)


@pytest.mark.parametrize(
    "ranges", [((4, 4),), ((7, 4),), ((290, 301),), ((-1, 4),), ((8, 9), (4, 5)), ((4, 7), (6, 9))]
)
def test_ids_without_a_token_are_ascending_ranges_of_the_vocabulary(ranges):
    with pytest.raises(ValueError, match="no ascending ranges in"):
        replace(CONTRACT, ids_without_token=ranges)


def test_schemas_of_other_tokens_differ_in_metadata_only():
    other = trajectory_schema(TokenContract(300, 3, 2, "another"))
    assert other.equals(trajectory_schema(CONTRACT))
    assert not other.equals(trajectory_schema(CONTRACT), check_metadata=True)


def test_several_eos_are_kept_in_the_metadata():
    contract = replace(CONTRACT, other_eos_ids=[9, 5])
    assert contract.eos_ids == (2, 9, 5)
    assert TokenContract.from_metadata(trajectory_schema(contract).metadata) == contract


@pytest.mark.parametrize("changes", [{"other_eos_ids": (3,)}, {"other_eos_ids": (300,)}, {"backspace_id": 2}])
def test_ids_with_a_meaning_of_their_own_differ_and_lie_in_the_vocabulary(changes):
    with pytest.raises(ValueError, match=r"must differ and lie in \[0, 300\)"):
        replace(CONTRACT, **changes)


@pytest.mark.parametrize(
    ("contract", "named"),
    [
        (b'{"vocab_size": 300, "backspace_id": 3, "eos_id": 2}', "tokenizer_hash"),
        (b'{"vocab_size": "three", "backspace_id": 3, "eos_id": 2, "tokenizer_hash": ""}', "str"),
        (b"{}", "vocab_size"),
        (b"[", "no token contract"),
    ],
)
def test_metadata_that_hold_no_contract_are_refused(contract, named):
    with pytest.raises(ValueError, match=named):
        TokenContract.from_metadata(CONTRACT.to_metadata() | {b"contract": contract})


@pytest.mark.parametrize("metadata", [None, {}, {b"vocab_size": b"300"}])
def test_metadata_that_is_not_ours(metadata):
    with pytest.raises(ValueError, match=f"schema version none cannot be read; .* version {SCHEMA_VERSION}"):
        TokenContract.from_metadata(metadata)


def test_another_version_is_refused_even_if_it_looks_alike():
    metadata = CONTRACT.to_metadata() | {b"schema_version": str(SCHEMA_VERSION + 1).encode()}
    with pytest.raises(ValueError, match=f"schema version {SCHEMA_VERSION + 1} cannot be read"):
        TokenContract.from_metadata(metadata)


def test_stored_rows_carry_their_number():
    batch = pa.RecordBatch.from_pylist([row(), row(id="b")], schema=trajectory_schema(CONTRACT))
    stored = with_rows(batch, np.array([4, 9]))
    assert stored.schema.equals(stored_schema(CONTRACT), check_metadata=True)
    assert rows_of(stored).tolist() == [4, 9]
    assert stored.drop_columns([ROW]).equals(batch)
