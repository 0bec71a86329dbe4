"""Numbers of generated text, against values worked out by hand and against loops over tokens."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from buffer.experts.ragged import Ragged
from buffer.trajectory.schema import TokenContract
from launch.evaluation.rollout_metrics import (
    ReplayedRollouts,
    distinct_ngrams,
    diversity,
    ngram_entropy,
    rewrites,
    self_bleu,
    text_metrics,
)

CONTRACT = TokenContract(vocab_size=16, backspace_id=3, eos_id=2, tokenizer_hash="")


def ragged(*rows: list[int]) -> Ragged:
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return Ragged.from_lengths(lengths, np.array([token for row in rows for token in row], dtype=np.int32))


def random_rows(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 3, length).tolist() for length in rng.integers(0, 40, count)]


def grams_of(row: list[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(row[start : start + size]) for start in range(len(row) - size + 1)]


def batch_of(logs: list[list[int]], reasons: list[str]) -> ReplayedRollouts:
    int_list = pa.list_(pa.int32())
    batch = pa.record_batch(
        {
            "prompt_ids": pa.array([[9]] * len(logs), int_list),
            "actions": pa.array(logs, int_list),
            "executed": pa.array([None] * len(logs), int_list),
            "finish_reason": reasons,
        }
    )
    return ReplayedRollouts.of(batch, CONTRACT)


def test_numbers_of_three_texts() -> None:
    logs = [[4, 5, 3, 6, 2], [4, 5, 4, 5, 4, 5, 4], []]  # "4 6.", a loop, nothing
    found = text_metrics(batch_of(logs, ["eos", "max_length", "aborted"]))
    assert found["backspace_rate"].value == pytest.approx(1 / 12)
    assert found["backspace_rate"].count == 12
    assert found["actions_per_final_token"].value == pytest.approx(12 / 9)
    assert found["tokens_per_text"].value == pytest.approx(9 / 3)
    assert found["tokens_per_text"].standard_error == pytest.approx(np.std([2, 7, 0], ddof=1) / np.sqrt(3))
    assert found["distinct_4grams"].value == pytest.approx(2 / 4)  # 4545, 5454, 4545, 5454
    assert found["distinct_4grams"].count == 1
    assert found["diversity"].value == pytest.approx(2 / 6 * 2 / 5 * 2 / 4)
    assert found["truncated_rate"].value == pytest.approx(2 / 3)
    assert found["entropy_4gram_bits"].value == pytest.approx(1.0)
    assert found["self_bleu"].count == 1


def test_texts_with_forced_tokens_are_recovered_when_all_of_those_are_gone() -> None:
    logs = [
        [4, 3, 6, 2],  # gone at once
        [4, 5, 6, 3, 3, 3, 7, 2],  # later
        [4, 5, 3, 4, 2],  # the second one only
        [4, 3, 4, 5, 2],  # the same token written again is not the one that was forced
    ]
    reasons = ["eos"] * len(logs)
    one = text_metrics(batch_of(logs, reasons), num_forced=1)
    assert (one["recovery"].value, one["recovery"].count) == (3 / 4, len(logs))
    assert one["forced_tokens_deleted"].value == 3 / 4
    two = text_metrics(batch_of(logs[1:3], reasons[1:3]), num_forced=2)
    assert (two["recovery"].value, two["forced_tokens_deleted"].value) == (1 / 2, 3 / 4)
    with pytest.raises(ValueError, match="a rollout is shorter than the 5 tokens"):
        text_metrics(batch_of(logs, reasons), 5)
    assert "recovery" not in text_metrics(batch_of(logs, reasons))


def test_runs_equal_a_loop_over_actions() -> None:
    rng = np.random.default_rng(2)
    logs = []
    for _ in range(60):
        log: list[int] = []
        depth = 0
        for token in rng.choice([3, 3, 4, 5], 25).tolist():
            if token != 3 or depth:
                depth += -1 if token == 3 else 1
                log.append(token)
        logs.append(log)
    expected, num_rewritten = [], 0
    for log in logs:
        stack: list[int] = []
        run = {-2: 0, -1: 0}
        for time, token in enumerate(log):
            if token != 3:
                stack.append(token)
                run[time] = 0
                continue
            taken = stack.pop()
            run[time] = run[time - 2] + 1 if time + 1 < len(log) and log[time + 1] == taken else 0
        expected.append(max(run.values()))
        num_rewritten += sum(length > 0 for length in run.values())
    batch = batch_of(logs, ["max_actions"] * len(logs))
    rewritten, longest = rewrites(batch)
    assert longest.tolist() == expected
    assert rewritten.sum() == num_rewritten > 0
    found = text_metrics(batch)
    assert found["longest_rewrite_run"].value == pytest.approx(np.mean(expected))
    assert found["max_actions_rate"].value == 1.0


def test_repetition_and_entropy_equal_loops() -> None:
    rows = random_rows(50)
    shares = {
        size: [len(set(grams)) / len(grams) if (grams := grams_of(row, size)) else 0.0 for row in rows]
        for size in (2, 3, 4)
    }
    for size, expected in shares.items():
        found, has_some = distinct_ngrams(ragged(*rows), size)
        np.testing.assert_allclose(found, expected)
        assert has_some.tolist() == [len(row) >= size for row in rows]
    products, valid = diversity(ragged(*rows))
    np.testing.assert_allclose(products[valid], np.prod(list(shares.values()), axis=0)[valid])
    counts = np.array(list(Counter(gram for row in rows for gram in grams_of(row, 2)).values()))
    shares_of_all = counts / counts.sum()
    assert ngram_entropy(ragged(*rows), 2).value == pytest.approx(-(shares_of_all * np.log2(shares_of_all)).sum())


def test_error_of_the_entropy_is_its_spread_over_resampled_texts() -> None:
    rows = random_rows(300, seed=3)
    found = ngram_entropy(ragged(*rows), 1)
    rng = np.random.default_rng(0)
    resampled = [
        ngram_entropy(ragged(*(rows[i] for i in rng.integers(0, 300, 300))), 1).value or math.nan for _ in range(300)
    ]
    assert found.standard_error == pytest.approx(np.std(resampled), rel=0.2)


def bleu_by_loops(row: list[int], others: list[list[int]]) -> float:
    """BLEU-4 with smoothing 1 as its papers write it."""
    total = 0.0
    for size in (1, 2, 3, 4):
        counts = Counter(grams_of(row, size))
        matches = sum(min(n, max(grams_of(other, size).count(gram) for other in others)) for gram, n in counts.items())
        total += math.log((matches or 0.1) / sum(counts.values())) / 4
    reference = min((abs(len(other) - len(row)), len(other)) for other in others)[1]
    return math.exp(total + min(0.0, 1 - reference / len(row)))


def test_self_bleu_equals_a_loop() -> None:
    rng = np.random.default_rng(5)
    rows = [rng.integers(0, 6, length).tolist() for length in rng.integers(2, 15, 30)]
    expected = [bleu_by_loops(row, rows[:i] + rows[i + 1 :]) for i, row in enumerate(rows) if len(row) >= 4]
    found = self_bleu(ragged(*rows))
    assert found.value == pytest.approx(np.mean(expected))
    assert found.count == len(expected) < 30
    assert found.standard_error == pytest.approx(np.std(expected, ddof=1) / np.sqrt(len(expected)))
    rows = random_rows(250, seed=7)
    assert self_bleu(ragged(*rows)).value == pytest.approx(self_bleu(ragged(*rows[:200])).value), "whole blocks"
    assert self_bleu(ragged([1, 2, 3, 4], [1, 2, 3, 4])).value == pytest.approx(1.0)
    assert self_bleu(ragged([1, 2, 3, 4])).value is None  # nothing to resemble


@pytest.mark.parametrize("logs", [[[5, 2]], [[5, 2], [5, 2], [6, 2]], [[5, 3, 2], [2]], [[2]]])
def test_texts_of_one_token_or_none_have_all_numbers_that_they_can_have(logs: list[list[int]]) -> None:
    metrics = text_metrics(batch_of(logs, ["eos"] * len(logs)))
    assert metrics["tokens_per_text"].value is not None
    for name in ("self_bleu", "diversity", "distinct_4grams", "entropy_4gram_bits"):
        assert (metrics[name].value, metrics[name].count) == (None, 0)
    assert all(number.value is None or math.isfinite(number.value) for number in metrics.values())
