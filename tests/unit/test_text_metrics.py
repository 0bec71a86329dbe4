"""Numbers of generated text, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from buffer.experts.ragged import Ragged
from buffer.schema import TokenContract
from launch.evaluation.estimates import ratio
from launch.evaluation.text_metrics import distinct_ngrams, text_metrics

CONTRACT = TokenContract(vocab_size=16, backspace_id=3, eos_id=2, tokenizer_hash="")


def ragged(*rows: list[int]) -> Ragged:
    lengths = np.array([len(row) for row in rows])
    return Ragged.from_lengths(lengths, np.array([token for row in rows for token in row], dtype=np.int32))


def test_numbers_of_three_texts() -> None:
    int_list = pa.list_(pa.int32())
    logs = [[4, 5, 3, 6, 2], [4, 5, 4, 5, 4, 5, 4], []]  # "4 6.", a loop, nothing
    batch = pa.record_batch(
        {
            "prompt_ids": pa.array([[9]] * 3, int_list),
            "actions": pa.array(logs, int_list),
            "realised": pa.array([None] * 3, int_list),
            "finish_reason": ["eos", "max_length", "aborted"],
        }
    )
    found = text_metrics(batch, CONTRACT)
    assert found["backspace_rate"].value == pytest.approx(1 / 12)
    assert found["backspace_rate"].count == 12
    assert found["actions_per_final_token"].value == pytest.approx(12 / 9)
    assert found["tokens_per_text"].value == pytest.approx(9 / 3)
    assert found["tokens_per_text"].standard_error == pytest.approx(np.std([2, 7, 0], ddof=1) / np.sqrt(3))
    assert found["distinct_4grams"].value == pytest.approx(2 / 4)  # 4545, 5454, 4545, 5454
    assert found["distinct_4grams"].count == 1
    assert found["truncated_rate"].value == pytest.approx(2 / 3)


def test_distinct_ngrams_equal_a_loop() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 3, length).tolist() for length in rng.integers(0, 40, 50)]
    expected = []
    for row in rows:
        grams = [tuple(row[start : start + 4]) for start in range(len(row) - 3)]
        expected += [len(set(grams)) / len(grams)] if grams else []
    np.testing.assert_allclose(distinct_ngrams(ragged(*rows)), expected)


def test_texts_too_short_for_a_4gram_have_no_share() -> None:
    assert len(distinct_ngrams(ragged([1, 2, 3], []))) == 0
    assert len(distinct_ngrams(ragged())) == 0


def test_ratio_of_nothing_and_of_one() -> None:
    assert ratio(np.array([1.0]), np.array([0.0])).value is None
    one = ratio(np.array([3.0]), np.array([2.0]))
    assert (one.value, one.standard_error, one.count) == (1.5, None, 1)


def test_error_of_a_ratio_equals_the_spread_of_resampled_ratios() -> None:
    rng = np.random.default_rng(1)
    denominators = rng.integers(1, 20, 400).astype(np.float64)
    numerators = denominators * rng.uniform(1.0, 2.0, 400)
    found = ratio(numerators, denominators)
    draws = rng.integers(0, 400, (2000, 400))
    spread = (numerators[draws].sum(1) / denominators[draws].sum(1)).std()
    assert found.standard_error == pytest.approx(spread, rel=0.1)
