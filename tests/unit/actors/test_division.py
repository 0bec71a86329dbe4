"""Over how many processes the layers of a model can be divided."""

from __future__ import annotations

import pytest

from actors.settings import check_division

LLAMA = {"num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 1024, "vocab_size": 100}


def test_fewer_heads_of_keys_and_values_than_ranks_are_on_several() -> None:
    for size in (1, 2, 4):
        check_division(size, LLAMA)
    with pytest.raises(ValueError, match=r"2 heads of keys and values: choose one of 1, 2, 4$"):
        check_division(3, LLAMA)


@pytest.mark.parametrize(
    ("size", "changes", "reason"),
    [
        (8, {}, "12 attention heads"),
        (4, {"intermediate_size": 1026}, "intermediate size of 1026"),
        (3, {"num_key_value_heads": 12, "intermediate_size": 1023}, "vocabulary, 128 ids with vLLM's padding"),
    ],
)
def test_what_cannot_be_divided_is_named(size: int, changes: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"actors.tensor_parallel_size={size} does not divide the model's {reason}: "):
        check_division(size, LLAMA | changes)


def test_a_model_with_other_names_is_left_to_the_engine() -> None:
    check_division(2, {"n_head": 12, "n_inner": None})
    with pytest.raises(ValueError, match="12 attention heads"):
        check_division(5, {"n_head": 12})
    check_division(5, {})
