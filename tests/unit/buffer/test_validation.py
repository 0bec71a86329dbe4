"""The door of the buffer: each invariant refused by name, the rest kept, any mixture against a plain loop."""

from __future__ import annotations

import dataclasses

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.trajectory.schema import trajectory_schema
from buffer.trajectory.validation import MAX_ROW_TOKENS, validate
from tests.trajectories import BACKSPACE, BORN, CONTRACT, EOS, SAMPLING, VOCAB, batch_of, expert_row, ids_of, row

NAN, INFINITY = float("nan"), float("inf")

GOOD = {
    "policy": row("a"),
    "ends in eos": row("a", [5, EOS]),
    "no action": row("a", []),
    "back to the floor and on": row("a", [5, 6, BACKSPACE, BACKSPACE, 7]),
    "log-probability rounded above zero": row("a", [5], logprobs=[1e-4]),
    "expert": expert_row("a"),
    "expert with noise": expert_row("a", [5, 6, BACKSPACE, 6, EOS], executed=[None, 9, None, None, None]),
    "noise instead of eos": expert_row("a", [5, EOS, BACKSPACE, EOS], executed=[None, 9, None, None]),
    "noise lifts a backspace off the floor": expert_row(
        "a", [BACKSPACE, BACKSPACE], executed=[9, None], finish_reason="max_length"
    ),
    "no sampling": row("a", sampling=None),
    "no backspace, as none was offered": row("a", [5, 6], sampling={**SAMPLING, "backspace": False}),
    "versions of three publications": row("a", [5, 6, 7], policy_version=[1, 2, 4]),
    "longest text": row("a", task="é" * 512),
    "reward and features": row("a", reward=-1.5, features=[0.0, 3e38]),
    "last id of the vocabulary": row("a", [VOCAB - 1, 0], prompt_ids=[VOCAB - 1, 0]),
}

BAD = {
    "id is empty": row(""),
    "source is none of expert, policy": row("b", source="critic"),
    "finish_reason is none of": row("b", finish_reason="bored"),
    "prompt_ids is empty": row("b", prompt_ids=[]),
    "prompt_ids holds a null": row("b", prompt_ids=[5, None]),
    "actions holds a null": {**row("b", [5, 6]), "actions": [5, None]},
    "logprobs holds a null": row("b", [5], logprobs=[None]),
    "policy_version holds a null": row("b", [5], policy_version=[None]),
    "a policy trajectory without logprobs": row("b", logprobs=None),
    "a policy trajectory without policy_version": row("b", policy_version=None),
    "an expert trajectory with logprobs": expert_row("b", [5, EOS], logprobs=[-1.0, -1.0]),
    "an expert trajectory with policy_version": expert_row("b", [5, EOS], policy_version=[0, 0]),
    "logprobs is not as long as actions": row("b", [5, 6], logprobs=[-1.0]),
    "policy_version is not as long as actions": row("b", [5, 6], policy_version=[0, 0, 0]),
    "executed is not as long as actions": row("b", [5, 6], executed=[None]),
    "prompt_ids holds an id outside": row("b", prompt_ids=[VOCAB]),
    "actions holds an id outside": row("b", [5, -1]),
    "executed holds an id outside": row("b", [5], executed=[VOCAB]),
    "prompt_ids holds backspace": row("b", prompt_ids=[5, BACKSPACE]),
    "executed holds backspace": row("b", [5, 6], executed=[None, BACKSPACE]),
    "logprobs holds a value that is no finite": row("b", [5], logprobs=[NAN]),
    "policy_version holds a negative version": row("b", [5], policy_version=[-1]),
    "an action follows <eos>": row("b", [EOS, 5], finish_reason="max_actions"),
    "finish_reason is eos, but": row("b", [5], finish_reason="eos"),
    "the last action is <eos>, but": row("b", [EOS], finish_reason="max_actions"),
    "takes a token back, and sampling.backspace": row("b", sampling={**SAMPLING, "backspace": False}),
    "takes a token back at the floor": row("b", [5, BACKSPACE, BACKSPACE, 5, 5]),
    "task is longer than 1,024 bytes": row("b", task="é" * 513),
    "features holds a null": row("b", features=[None]),
    "features holds a value that is not finite": row("b", features=[0.0, INFINITY]),
    "reward is not finite": row("b", reward=NAN),
    "sampling.temperature is not finite": row("b", sampling={**SAMPLING, "temperature": INFINITY}),
    "sampling.top_p is not finite": row("b", sampling={**SAMPLING, "top_p": NAN}),
    "created_at lies outside": row("b", created_at=BORN.replace(year=1969)),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_rows_pass(name):
    batch = batch_of([GOOD[name]])
    validated = validate(batch, CONTRACT)
    assert validated.rejections == ()
    assert validated.good.equals(batch)


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_refused_by_name_and_the_others_kept(reason):
    batch = batch_of([row("first"), BAD[reason], row("last", [5, EOS])])
    validated = validate(batch, CONTRACT)
    (rejection,) = validated.rejections
    assert (rejection.row, rejection.id) == (1, BAD[reason]["id"])
    assert rejection.reason.startswith(reason)
    assert validated.good.equals(batch.take([0, 2]))


@pytest.mark.parametrize("value", [INFINITY, -INFINITY, 0.5])
def test_other_values_that_are_no_log_probabilities(value):
    (rejection,) = validate(batch_of([row("b", [5], logprobs=[value])]), CONTRACT).rejections
    assert "no finite log-probability" in rejection.reason


def test_each_eos_of_several_ends_a_text():
    contract = dataclasses.replace(CONTRACT, other_eos_ids=(9,))
    rows = [
        row("first", [5, EOS]),
        row("other", [5, 9], finish_reason="eos"),
        row("both", [9, EOS], finish_reason="eos"),
        row("goes on", [9, 5], finish_reason="max_actions"),
    ]
    rows.append(row("says another", [5, 9], finish_reason="max_actions"))
    validated = validate(batch_of(rows, contract), contract)
    assert ids_of(validated.good) == ["first", "other"]
    assert [rejection.reason.split(":")[0] for rejection in validated.rejections][:2] == ["an action follows <eos>"] * 2


def test_an_eos_at_the_end_that_noise_replaced_does_not_end_the_text():
    bad = expert_row("b", [5, EOS], executed=[None, 9])
    (rejection,) = validate(batch_of([bad]), CONTRACT).rejections
    assert rejection.reason.startswith("finish_reason is eos, but")


@pytest.mark.parametrize(
    "name", ["id", "source", "task", "prompt_ids", "actions", "finish_reason", "actor", "created_at"]
)
def test_nulls_in_required_columns(name):
    batch = batch_of([row("a"), row("b"), row("c")])
    column = pa.array(
        [*batch.column(name).to_pylist()[:1], None, *batch.column(name).to_pylist()[2:]], batch.schema.field(name).type
    )
    nullable = pa.schema([field.with_nullable(True) for field in batch.schema], metadata=batch.schema.metadata)
    arrays = [column if field.name == name else batch.column(field.name) for field in nullable]
    validated = validate(pa.RecordBatch.from_arrays(arrays, schema=nullable), CONTRACT)
    (rejection,) = validated.rejections
    assert (rejection.row, rejection.reason) == (1, f"{name} is null")
    assert rejection.id == (None if name == "id" else "b")
    assert ids_of(validated.good) == ["a", "c"]


def test_null_inside_sampling():
    inner = pa.StructArray.from_arrays(
        [pa.array([1.0, None], pa.float32()), pa.array([1.0, 1.0], pa.float32()), pa.array([True, True])],
        fields=list(trajectory_schema(CONTRACT).field("sampling").type),
    )
    batch = batch_of([row("a"), row("b")])
    batch = batch.set_column(batch.schema.get_field_index("sampling"), batch.schema.field("sampling"), inner)
    (rejection,) = validate(batch, CONTRACT).rejections
    assert (rejection.id, rejection.reason) == ("b", "sampling.temperature is null")


def test_a_huge_row_is_refused_by_name():
    longest = row("longest", [5] * (MAX_ROW_TOKENS - 2))
    huge = row("huge", [5] * (MAX_ROW_TOKENS - 1))
    features = row("features", features=[0.0] * (MAX_ROW_TOKENS + 1))
    validated = validate(batch_of([longest, huge, features]), CONTRACT)
    assert ids_of(validated.good) == ["longest"]
    assert [(rejection.id, rejection.reason) for rejection in validated.rejections] == [
        ("huge", "prompt and actions have more than 262,144 tokens"),
        ("features", "features has more than 262,144 numbers"),
    ]


def test_steps_without_noise_are_no_backspace_where_its_id_is_zero():
    contract = dataclasses.replace(CONTRACT, backspace_id=0)
    rows = [
        expert_row("a", [5, 6, 0, EOS], executed=[None, 9, None, None]),
        expert_row("b", [5, 6, 0, EOS], executed=[None, 0, None, None]),
    ]
    (rejection,) = validate(batch_of(rows, contract), contract).rejections
    assert (rejection.id, rejection.reason) == ("b", "executed holds backspace")


def test_an_id_counts_once_per_batch():
    validated = validate(batch_of([row("a", [5]), row("b"), row("a", [6]), row("a", [7])]), CONTRACT)
    assert [rejection.row for rejection in validated.rejections] == [2, 3]
    assert all(rejection.reason == "id appears earlier in the same batch" for rejection in validated.rejections)
    assert validated.good.column("actions").to_pylist()[0] == [5]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*GOOD, *BAD]), max_size=12), st.integers(0, 3), st.integers(0, 3))
def test_any_mixture_in_any_slice(names, cut_front, cut_back):
    rows = []
    for index, name in enumerate(names):
        template = GOOD.get(name) or BAD[name]
        rows.append({**template, "id": str(index) if template["id"] else ""})
    batch = batch_of(rows)
    stop = max(len(rows) - cut_back, cut_front)
    sliced = batch.slice(cut_front, stop - cut_front)
    validated = validate(sliced, CONTRACT)
    names = names[cut_front:stop]
    found = {rejection.row: rejection.reason for rejection in validated.rejections}
    assert set(found) == {index for index, name in enumerate(names) if name in BAD}
    assert all(found[index].startswith(names[index]) for index in found)
    kept = [index for index, name in enumerate(names) if name in GOOD]
    assert validated.good.equals(sliced.take(pa.array(kept, pa.int64())))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.sampled_from([BACKSPACE, EOS, 3, 4]), max_size=6), min_size=1, max_size=5))
def test_replay_rules_against_a_plain_stack(trajectories):
    def defined(actions):
        depth = 0
        for index, action in enumerate(actions):
            if action == EOS and index + 1 < len(actions):
                return False
            depth += -1 if action == BACKSPACE else 1
            if depth < 0:
                return False
        return True

    validated = validate(batch_of([row(str(index), actions) for index, actions in enumerate(trajectories)]), CONTRACT)
    assert ids_of(validated.good) == [str(index) for index, actions in enumerate(trajectories) if defined(actions)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_hash": "other"}, "tokenizer_hash other"),
        ({"backspace_id": 3}, "backspace_id 3"),
        ({"eos_id": 4}, "eos_id 4"),
        ({"vocab_size": 33}, "vocab_size 33"),
        ({"other_eos_ids": (9,)}, r"other_eos_ids \(9,\)"),
        ({"ids_without_token": ((30, VOCAB),)}, "do not belong into a buffer with ids_without_token"),
    ],
)
def test_a_batch_of_another_contract_is_refused_as_a_whole(change, message):
    batch = batch_of([row("a")], dataclasses.replace(CONTRACT, **change))
    with pytest.raises(ValueError, match=message):
        validate(batch, CONTRACT)


def test_a_batch_of_another_schema_is_refused_as_a_whole():
    batch = batch_of([row("a")])
    with pytest.raises(ValueError, match="schema version none"):
        validate(batch.replace_schema_metadata(None), CONTRACT)
    with pytest.raises(ValueError, match="schema version 99"):
        validate(batch.replace_schema_metadata({**batch.schema.metadata, b"schema_version": b"99"}), CONTRACT)
    with pytest.raises(ValueError, match=r"batch has columns .*; needed: .*logprobs"):
        validate(batch.drop_columns(["logprobs"]), CONTRACT)
    with pytest.raises(ValueError, match=r"columns .*extra; needed"):
        validate(batch.append_column("extra", pa.array([1])), CONTRACT)
    with pytest.raises(ValueError, match=r"columns .*, id; needed"):
        validate(batch.append_column("id", pa.array(["x"])), CONTRACT)
    index = batch.schema.get_field_index("actions")
    wide = batch.set_column(index, "actions", batch.column("actions").cast(pa.list_(pa.int64())))
    with pytest.raises(ValueError, match=r"column actions is list<item: int64>"):
        validate(wide, CONTRACT)


def test_columns_in_another_order_are_put_in_order():
    batch = batch_of([row("a"), row("b")])
    shuffled = batch.select(batch.schema.names[::-1])
    assert validate(shuffled, CONTRACT).good.equals(batch)


def test_an_id_without_a_token_is_refused():
    contract = dataclasses.replace(CONTRACT, ids_without_token=((9, 11), (30, VOCAB)))
    rows = [
        row("good", [5, BACKSPACE, 8]),
        row("padding", [5, 31]),
        row("hole", [5, 9, BACKSPACE]),
        row("in the prompt", prompt_ids=[5, 10]),
        row("beside them", [8, 11, 29]),
        expert_row("as noise", [5, BACKSPACE, EOS], executed=[30, None, None]),
    ]
    result = validate(batch_of(rows, contract), contract)
    assert ids_of(result.good) == ["good", "beside them"]
    assert {rejection.id: rejection.reason for rejection in result.rejections} == {
        "padding": "actions holds an id that has no token",
        "hole": "actions holds an id that has no token",
        "in the prompt": "prompt_ids holds an id that has no token",
        "as noise": "executed holds an id that has no token",
    }
