"""The schedule at its edges, and which parameters decay."""

from __future__ import annotations

import pytest
import torch

from learner.settings.stages import OptimizerSettings
from learner.trainer import DEFAULT_FINAL_FRACTION, learning_rate_factor, make_optimizer
from tests.tiny_models import tiny_model


def factors(steps: int, **changes) -> list[float]:
    settings = OptimizerSettings(**changes)
    return [learning_rate_factor(step, settings, steps) for step in range(steps + 1)]


def test_cosine_from_the_peak_to_the_final_fraction_at_the_last_step():
    values = factors(15, warmup_steps=4, final_fraction=0.2)
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]  # never 0: the first step moves too
    assert values[4] == 1.0
    assert values[9] == pytest.approx(0.6)  # halfway between peak and end
    assert values[14] == pytest.approx(0.2)
    assert values[15] == pytest.approx(0.2)  # a schedule is asked for one step more than is taken
    assert values[4:15] == sorted(values[4:15], reverse=True)


def test_final_fraction_has_a_default_and_may_be_zero():
    assert factors(10, warmup_steps=0)[9] == pytest.approx(DEFAULT_FINAL_FRACTION)
    assert factors(10, warmup_steps=0, final_fraction=0.0)[9] == pytest.approx(0.0, abs=1e-12)
    assert factors(10, warmup_steps=0, final_fraction=1.0) == [1.0] * 11


def test_constant_after_warmup():
    assert factors(5, warmup_steps=2, schedule="constant") == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("steps", "warmup", "expected"),
    [
        (1, 0, [1.0]),  # nothing to anneal over
        (2, 0, [1.0, DEFAULT_FINAL_FRACTION]),
        (3, 2, [0.5, 1.0, 1.0]),
        (3, 10, [0.1, 0.2, 0.3]),  # the stage ends before the warm-up
    ],
)
def test_short_stages(steps, warmup, expected):
    assert factors(steps, warmup_steps=warmup)[:steps] == pytest.approx(expected)


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("gpt2", True)])
def test_only_matrices_decay_and_each_parameter_is_held_once(kind, tied):
    model = tiny_model(kind, tied=tied)
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    settings = OptimizerSettings(learning_rate=0.5, weight_decay=0.1)
    optimizer = make_optimizer(model, settings)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len({id(parameter) for parameter in held}) == len(held)
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p is not frozen}

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in held:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # with no gradient, decay is all there is
    for name, parameter in model.named_parameters():
        decays = parameter is not frozen and parameter.dim() > 1
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if decays else 1.0), msg=name)
