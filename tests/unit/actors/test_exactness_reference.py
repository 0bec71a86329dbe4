"""The comparison of engine tests under top-p: either side of a border will do, another set of tokens will not."""

from __future__ import annotations

import math

import pytest
import torch

from actors.engine.interface import SamplingSettings
from tests.integration.reference import allowed_logprobs

NUCLEUS = SamplingSettings(max_new_tokens=8, max_actions=8, top_p=0.9)


def allowed(probs: list[float], action: int) -> list[float]:
    return allowed_logprobs(torch.tensor(probs).log(), NUCLEUS, action)


@pytest.mark.parametrize("excess", [-3e-6, 0.0, 3e-6])
def test_a_token_on_the_border_may_belong_to_the_nucleus_or_not(excess: float) -> None:
    probs = [0.5, 0.4 + excess, 0.06 - excess, 0.04]
    assert allowed(probs, 0) == pytest.approx([math.log(0.5 / 0.9), math.log(0.5 / 0.96)], abs=1e-4)
    assert allowed(probs, 2) == pytest.approx([math.log(0.06 / 0.96)], abs=1e-3)
    assert allowed(probs, 3) == []


@pytest.mark.parametrize(("excess", "kept"), [(1e-3, 0.901), (-1e-3, 0.96)])
def test_away_from_the_border_there_is_one_nucleus(excess: float, kept: float) -> None:
    assert allowed([0.5, 0.4 + excess, 0.061 - excess - 1e-3, 0.04], 0) == pytest.approx(
        [math.log(0.5 / kept)], abs=1e-5
    )


def test_of_two_equally_probable_tokens_either_may_be_the_last() -> None:
    probs = [0.5, 0.2, 0.15, 0.075 + 1e-8, 0.075 - 1e-8]  # 0.85 without, 0.925 with the first of the two
    expected = pytest.approx([math.log(0.075 / 0.925)], abs=1e-5)
    assert allowed(probs, 3) == expected
    assert allowed(probs, 4) == expected


def test_without_a_nucleus_every_action_has_one_log_probability() -> None:
    for sampling in (SamplingSettings(temperature=0.5), SamplingSettings(temperature=0.0, top_p=0.9)):
        scale = sampling.temperature or 1.0
        expected = (torch.tensor([0.5, 0.3, 0.2]).log() / scale).log_softmax(-1)
        found = [allowed_logprobs(torch.tensor([0.5, 0.3, 0.2]).log(), sampling, action) for action in range(3)]
        assert found == [pytest.approx([value]) for value in expected.tolist()]
