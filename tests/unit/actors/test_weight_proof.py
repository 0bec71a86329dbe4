"""Whether an engine computes with the weights it was sent: the decision alone, with noise of all sizes."""

from __future__ import annotations

import numpy as np
import pytest

from actors.engine.weights import NOISE_MARGIN, Proof, prove
from buffer.weights import TensorEntry, WeightManifest, WeightMismatchError

TOKENS = 16
RANDOM = np.random.default_rng(0)
OLD = -10.0 + 0.1 * RANDOM.normal(size=TOKENS - 1)
ERRORS = RANDOM.normal(size=(3, TOKENS - 1))
ERRORS /= np.sqrt(np.mean(ERRORS**2, axis=1, keepdims=True))  # of root mean square 1


def manifest(logprobs: np.ndarray, dtype: str = "bfloat16", version: int = 7) -> WeightManifest:
    entry = TensorEntry("w", dtype, (1,))
    return WeightManifest(version, "", (entry,), tuple(range(TOKENS)), tuple(logprobs.tolist()))


def first_load(noise: float, dtype: str = "bfloat16", engine_dtype: str = "bfloat16") -> Proof:
    return prove(manifest(OLD, dtype), OLD + noise * ERRORS[0], None, engine_dtype)


@pytest.mark.parametrize("noise", [0.005, 0.02, 0.1])
def test_noise_of_the_first_load_is_no_error_later(noise):
    before = first_load(noise)
    assert before.error == pytest.approx(noise)
    assert before.margin == pytest.approx(NOISE_MARGIN * noise)
    new = OLD + 10 * before.margin * ERRORS[1]
    proof = prove(manifest(new), new + 2 * noise * ERRORS[2], before, "bfloat16")
    assert proof.margin == before.margin  # the noise of later loads does not widen it: else a left-out tensor would
    assert not proof.by_fingerprint_alone
    again = prove(manifest(OLD), OLD + 2 * noise * ERRORS[0], proof, "bfloat16")
    assert again.change == pytest.approx(10 * before.margin)


@pytest.mark.parametrize(("dtype", "engine_dtype"), [("float32", "float32"), ("bfloat16", "float32")])
def test_an_effect_beyond_the_noise_is_found(dtype, engine_dtype):
    before = first_load(1e-5 if dtype == "float32" else 0.01, dtype, engine_dtype)
    new = OLD + 20 * before.margin * ERRORS[1]
    left_out = new + 1.1 * before.margin * ERRORS[2]  # most of the way: nearer to the new weights than to the old ones
    with pytest.raises(WeightMismatchError, match="is noise of this engine; it is"):
        prove(manifest(new, dtype), left_out, before, engine_dtype)


def test_an_engine_that_stayed_is_found_even_where_the_change_is_little_more_than_the_margin():
    before = first_load(0.01)
    new = OLD + 1.05 * before.margin * ERRORS[1]
    stayed = OLD + 0.1 * before.margin * ERRORS[1]
    assert np.sqrt(np.mean((stayed - new) ** 2)) < before.margin
    with pytest.raises(WeightMismatchError, match="does not compute with the published weights"):
        prove(manifest(new), stayed, before, "bfloat16")


def test_where_the_change_is_below_the_noise_the_fingerprint_decides():
    before = first_load(0.01)
    new = OLD + 0.5 * before.margin * ERRORS[1]
    for engine in (new, OLD):
        assert prove(manifest(new), engine, before, "bfloat16").by_fingerprint_alone
    with pytest.raises(WeightMismatchError):
        prove(manifest(new), new + 2 * before.margin * ERRORS[2], before, "bfloat16")


def test_changes_that_are_each_below_the_noise_add_up():
    """The margin is for all of the engine's life, so one that takes nothing is found in the end."""
    proof = first_load(0.01)
    step = 0.3 * proof.margin * ERRORS[1]
    for number in (1, 2, 3):
        proof = prove(manifest(OLD + number * step), OLD, proof, "bfloat16")
    with pytest.raises(WeightMismatchError):
        prove(manifest(OLD + 4 * step), OLD, proof, "bfloat16")


@pytest.mark.parametrize(
    ("dtype", "engine_dtype", "taken", "refused"),
    [
        ("float32", "float32", 5e-4, 2e-3),
        ("bfloat16", "float32", 0.3, 0.8),
        ("float32", "float16", 0.3, 0.8),
        ("bfloat16", "bfloat16", 0.3, 0.8),
    ],
)
def test_the_first_load_is_bounded_by_the_number_formats(dtype, engine_dtype, taken, refused):
    first_load(taken, dtype, engine_dtype)
    with pytest.raises(WeightMismatchError, match="with its first weights"):
        first_load(refused, dtype, engine_dtype)


def test_a_quiet_first_load_leaves_room_for_the_noise_of_larger_logits():
    assert first_load(1e-7, "float32", "float32").margin == 2e-4
    assert first_load(1e-5, engine_dtype="float32").margin == 2e-4
    assert first_load(1e-5).margin == 0.02


def test_half_precision_may_be_noisier_where_the_learner_is_surer():
    """As a model from scratch in training; its noise is a fixed part of the spread of its logits."""
    before = first_load(0.0014)
    new = -9.0 + 3.0 * ERRORS[1]
    proof = prove(manifest(new), new + 0.06 * ERRORS[2], before, "bfloat16")
    assert (proof.noise, before.margin) == (before.noise, 0.02)
    assert 0.1 < proof.margin < 0.15
    with pytest.raises(WeightMismatchError, match="is noise of this engine"):
        prove(manifest(new), new + 0.2 * ERRORS[2], before, "bfloat16")
    in_float32 = first_load(1e-6, "float32", "float32")
    with pytest.raises(WeightMismatchError, match=r"0\.0002 is noise of this engine"):
        prove(manifest(new, "float32"), new + 1e-3 * ERRORS[2], in_float32, "float32")


def test_what_is_not_a_number_is_named():
    for value in (np.nan, -np.inf):
        found = OLD.copy()
        found[3] = value
        for before in (None, first_load(0.01)):
            with pytest.raises(WeightMismatchError, match=r"version 7: .* at token 4 \(engine (nan|-inf), learner"):
                prove(manifest(OLD), found, before, "bfloat16")
    with pytest.raises(WeightMismatchError, match="3 log-probabilities from the engine, 15 from the learner"):
        prove(manifest(OLD), np.zeros(3), None, "float32")
