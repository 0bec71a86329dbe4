"""Every phi alone: its shape, its tangent, and the divergence that it is the conjugate of."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from learner.objectives.sequencematch import DIVERGENCES
from learner.settings.objectives import DIVERGENCES_WITH_DOMAIN
from tests import oracle

MARGIN = 0.1
NAMES = sorted(DIVERGENCES)


def test_the_settings_know_which_divergences_have_a_domain():
    assert {name for name in NAMES if DIVERGENCES[name].penalty_slope is not None} == set(DIVERGENCES_WITH_DOMAIN)


@pytest.mark.parametrize("name", NAMES)
def test_phi_is_normalized_and_concave(name):
    """phi(0) = 0, phi'(0) = 1, phi'' <= 0: what the collapsed form takes for granted."""
    phi = DIVERGENCES[name].phi
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(phi(zero, MARGIN), zero)
    assert float(phi(zero.detach(), MARGIN)) == 0.0
    assert float(slope) == pytest.approx(1.0)
    x = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    assert (phi(x, MARGIN).diff().diff() <= 1e-12).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_penalty_keeps_its_digits_near_zero(name):
    """Arguments at `<eos>` are of the order of 1e-4: x - phi(x) in float32 must not be noise there."""
    x = torch.tensor([-1e-2, -1e-3, 1e-3, 1e-2])
    exact = DIVERGENCES[name].penalty(x.double(), MARGIN)
    torch.testing.assert_close(DIVERGENCES[name].penalty(x, MARGIN).double(), exact, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("margin", [1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8])
@pytest.mark.parametrize("name", NAMES)
def test_float32_has_the_value_and_gradient_of_float64_at_any_margin(name, margin):
    """The slope of the tangent is up to 1e16 here: inside the domain it must not be added and taken away again."""
    low = oracle.PHI[name][1]
    border = 0.0 if low == -math.inf else low
    near = [border + sign * factor * margin for sign in (-1, 1) for factor in (0.5, 1.0, 1.5, 4.0)]
    x = torch.tensor([0.5, 0.0, 3.0, -0.2, -0.6, -0.9, -2.0, border, *near], requires_grad=True)
    exact = x.detach().double().requires_grad_()
    expected = torch.stack([oracle.phi(name, one, margin) for one in exact])
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    for found, value, gradient in (
        (DIVERGENCES[name].phi(x, margin), expected, slope),
        (DIVERGENCES[name].penalty(x, margin), exact - expected, 1 - slope),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=1e-6)
        (found_gradient,) = torch.autograd.grad((found + 0 * x).sum(), x)  # the penalty of mle is constant
        torch.testing.assert_close(found_gradient.double(), gradient, rtol=1e-5, atol=1e-6)
    assert torch.equal(DIVERGENCES[name].outside(x, margin), exact < low + margin)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


DEFINITIONS = {
    "chi2": lambda data, model: (data * (model / data - 1) ** 2).sum(),
    "kl": kl,
    "reverse_kl": lambda data, model: kl(model, data),
    "js": lambda data, model: kl(data, (data + model) / 2) + kl(model, (data + model) / 2),
    "hellinger": lambda data, model: ((data.sqrt() - model.sqrt()) ** 2).sum(),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_the_conjugate_of_phi_is_the_divergence(name, seed):
    """sup_r E_data[phi(r)] - E_model[r], found numerically on random distributions over six states."""
    generator = torch.Generator().manual_seed(seed)
    data, model = (torch.rand(6, generator=generator, dtype=torch.float64).add(0.2) for _ in range(2))
    data, model = data / data.sum(), model / model.sum()
    r = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([r], max_iter=300, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        gap = (model * r).sum() - (data * DIVERGENCES[name].phi(r, 1e-3)).sum()
        gap.backward()
        return gap

    optimizer.step(closure)
    found = -closure().item()
    assert found == pytest.approx(DEFINITIONS[name](data, model).item(), rel=1e-6)
    assert found > 0.01
