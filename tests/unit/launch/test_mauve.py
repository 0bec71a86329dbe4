"""MAUVE with the authors' package, on features whose distance is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from buffer.experts.tasks import load_task
from buffer.settings import ArithmeticTaskSettings
from launch.evaluation.mauve_score import check_mauve, encoder_features, mauve_score
from launch.settings.evaluation import MauveSettings
from launch.statistics import change_by_example

pytest.importorskip("mauve", reason="needs the extra `mauve`")


def features(center: float, count: int = 120, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, 8)) + center * np.eye(8)[0]).astype(np.float32)


def test_score_falls_with_distance_and_repeats() -> None:
    reference = features(0.0, seed=1)
    same, near, far = (mauve_score(reference, features(center, seed=2), 6, 0) for center in (0.0, 2.0, 20.0))
    assert same.value > 0.9
    assert same.value > near.value > far.value
    assert far.value < 0.05
    assert near.standard_error > 0.0
    assert (near.count, near.influence) == (120, None)
    assert mauve_score(reference, features(2.0, seed=2), 6, 0) == near
    assert mauve_score(reference, features(2.0, seed=2), 6, 1) != near


def test_error_is_near_the_spread_over_fresh_samples() -> None:
    found = mauve_score(features(0.0, seed=1), features(1.5, seed=2), 6, 0)
    fresh = [
        mauve_score(features(0.0, seed=10 + index), features(1.5, seed=50 + index), 6, index).value
        for index in range(5)
    ]
    assert 0.3 < found.standard_error / np.std(fresh, ddof=1) < 3.0


def test_a_difference_is_of_the_same_draws() -> None:
    reference = features(0.0, seed=1)
    near, farther, of_others = (
        mauve_score(reference, generated, 6, 0)
        for generated in (features(1.5, seed=2), features(1.8, seed=2), features(1.5, count=100, seed=2))
    )
    change = change_by_example(farther, near)
    assert change is not None
    assert change.value == farther.value - near.value
    assert 0.0 < change.standard_error < 0.8 * np.hypot(near.standard_error, farther.standard_error)
    assert change_by_example(near, near).standard_error == 0.0
    assert change_by_example(of_others, near) is None


def test_the_encoder_knows_what_texts_are_about() -> None:
    found = encoder_features(
        ["The army crossed the river.", "Soldiers went over the stream.", "Butter, sugar, eggs.", ""]
    )
    assert found.shape == (4, 384)
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    assert unit[0] @ unit[1] > unit[0] @ unit[2] + 0.2


def test_too_few_texts_are_told_with_how_many_are_needed() -> None:
    answers = load_task(ArithmeticTaskSettings(max_digits=1, train_questions=10, held_out_questions=8))
    texts = dataclasses.replace(answers, is_correct=None)
    with pytest.raises(ValueError, match="right or wrong"):
        check_mauve(MauveSettings(), answers, 1000)
    with pytest.raises(
        ValueError,
        match=r"with 50 clusters needs 500 texts .* has 64 of the 8 .*raise task.held_out_fraction, or .* to 6",
    ):
        check_mauve(MauveSettings(), texts, 64)
    check_mauve(MauveSettings(clusters=6), texts, 64)
    check_mauve(None, answers, 1)
