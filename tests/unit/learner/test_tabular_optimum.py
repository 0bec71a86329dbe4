"""What each divergence converges to on a table with exact expectations, against what theory says it must be."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from learner.objectives import make_objective
from learner.objectives.base import EvaluatedTrajectories
from learner.objectives.sequencematch import DIVERGENCES
from learner.settings.objectives import SequenceMatchSettings
from learner.state_tree.policy import ActionValues
from tests.objectives import counts_of
from tests.oracle import Log
from tests.tabular import BACKSPACE, EOS, LETTERS, Occupancy, Table
from tests.unit.learner.test_state_tree import BACKSPACE as BACKSPACE_ID
from tests.unit.learner.test_state_tree import EOS as EOS_ID
from tests.unit.learner.test_state_tree import build, text_of

NAMES = list(DIVERGENCES)
MARGIN = 0.1


def minimize(table: Table, name: str, alpha: float, data: Occupancy) -> Tensor:
    """The optimum under data that visit everything: convex, so Newton's neighbor finds it. The mixture's rollouts are
    those of the newest policy, again and again until nothing moves."""
    divergence, parameters = DIVERGENCES[name], table.zeros()
    rounds, iterations = (15, 60) if divergence.penalizes_rollouts else (1, 500)
    for _ in range(rounds):
        model = None
        if divergence.penalizes_rollouts:
            with torch.no_grad():
                model = table.occupancy(table.policy(parameters))
        optimizer = torch.optim.LBFGS(
            [parameters],
            max_iter=iterations,
            history_size=30,
            tolerance_grad=1e-10,
            tolerance_change=1e-16,
            line_search_fn="strong_wolfe",
        )

        def closure(optimizer=optimizer, model=model) -> Tensor:
            optimizer.zero_grad()
            loss = table.loss(parameters, data, model, divergence, alpha)
            loss.backward()
            return loss

        optimizer.step(closure)
    return parameters.detach()


def expert(table: Table) -> Tensor:
    """A policy that does everything now and then, backspace included."""
    noise = torch.randn(len(table.texts), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return table.policy(0.7 * noise)


@pytest.mark.parametrize("alpha", [0.1, 0.4])
@pytest.mark.parametrize("name", NAMES)
def test_the_optimal_residual_is_the_slope_of_the_divergence(name, alpha):
    """rho_data phi'(alpha r) = rho_model at every state and action: r is where the supremum of the divergence is.

    With the mixture: alpha r = 2 (rho_data - rho_model) / (rho_data + rho_model).
    """
    table = Table(depth=2, gamma=0.9)
    data = table.occupancy(expert(table))
    optimum = minimize(table, name, alpha, data)
    model, values = table.occupancy(table.policy(optimum)), table.values(optimum)
    rho_data, rho_model = table.flat(*data), table.flat(*model)
    x = alpha * table.flat(values.residual, values.residual_eos)
    divergence = DIVERGENCES[name]
    assert not divergence.outside(x, MARGIN).any()
    if divergence.penalizes_rollouts:
        torch.testing.assert_close(x, 2 * (rho_data - rho_model) / (rho_data + rho_model), rtol=0, atol=1e-4)
        assert x.abs().max() <= 2
    else:
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad(divergence.phi(x, MARGIN).sum(), x)
        torch.testing.assert_close(rho_data * slope, rho_model, rtol=0, atol=1e-4)
    assert name == "mle" or (rho_model - rho_data).abs().max() > 1e-2  # the entropy pulls away from the data


@pytest.mark.parametrize("name", NAMES)
def test_a_small_alpha_recovers_the_data_policy(name):
    table = Table(depth=2, gamma=0.9)
    policy = expert(table)
    errors = [
        (table.policy(minimize(table, name, alpha, table.occupancy(policy))) - policy).abs().max()
        for alpha in (0.02, 0.005)
    ]
    assert errors[1] < 0.01
    assert name == "mle" or errors[1] < 0.5 * errors[0]


CLEAN = {"aaa": 0.4, "aab": 0.3, "aba": 0.2, "abb": 0.1}
"""Data that never begin with b, and never take a token back."""


@cache
def trained_on_clean_data(name: str, alpha: float) -> tuple[Table, Tensor]:
    """The policy after 700 steps of Adam; the mixture's rollouts are those of the newest policy."""
    table = Table(depth=3, gamma=0.998)
    data, parameters, divergence = table.clean_occupancy(CLEAN), table.zeros(), DIVERGENCES[name]
    steps = 700
    optimizer = torch.optim.Adam([parameters], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        model = None
        if divergence.penalizes_rollouts:
            with torch.no_grad():
                model = table.occupancy(table.policy(parameters))
        optimizer.zero_grad()
        table.loss(parameters, data, model, divergence, alpha).backward()
        optimizer.step()
        schedule.step()
    return table, table.policy(parameters.detach())


def total_variation(table: Table, policy: Tensor) -> float:
    target = torch.tensor([CLEAN.get(text, 0.0) for text in table.texts], dtype=torch.float64)
    return float((table.final_texts(policy) - target).abs().sum() / 2)


@pytest.mark.parametrize("name", NAMES)
def test_clean_data_are_reproduced(name):
    table, policy = trained_on_clean_data(name, alpha=0.1)
    assert total_variation(table, policy) < 0.005
    assert table.backspace_rate(policy) < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_only_the_mixture_teaches_backspace_without_a_demonstration(name):
    """One wrong letter off the data: without rollouts nothing is learned there, and the policy stays uniform."""
    table, policy = trained_on_clean_data(name, alpha=0.1)
    off_data = policy[table.index["b"]]
    if name == "chi2_mixture":
        assert off_data[BACKSPACE] > 0.8
        assert off_data[:BACKSPACE].max() < 0.15
    else:
        torch.testing.assert_close(off_data, torch.full((4,), 0.25, dtype=torch.float64))


def test_a_large_alpha_dithers_while_the_final_texts_hide_it():
    """The penalty is then cheaper to lower by deleting and retyping; only the backspace rate shows it."""
    table, policy = trained_on_clean_data("chi2_mixture", alpha=1.0)
    assert total_variation(table, policy) < 0.01
    assert table.backspace_rate(policy) > 0.1
    on_data = [policy[table.index[text], BACKSPACE] for text in ("a", "aa", "ab")]
    assert max(on_data) > 0.2


@pytest.mark.parametrize("name", [name for name in NAMES if name != "chi2_mixture"])
def test_the_table_is_the_objective(name):
    """The loss above is that of the product, on logs in the proportions of the data."""
    alpha, gamma = 0.3, 0.9
    table = Table(depth=3, gamma=gamma)
    noise = torch.randn(len(table.texts), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ids = {letter: 5 + i for i, letter in enumerate(LETTERS)}
    letters = {i: letter for letter, i in ids.items()}
    logs = [
        Log([1], [*(ids[letter] for letter in text), EOS_ID])
        for text, probability in CLEAN.items()
        for _ in range(round(10 * probability))
    ]
    tree = build(logs)
    rows = []  # of the table, for every state with a value; the absorbing states come behind the texts
    for node in tree.nodes.states.tolist():
        _, *typed = text_of(tree, node)
        row = table.index["".join(letters[i] for i in typed if i != EOS_ID)]
        rows.append(row + len(table.texts) * (EOS_ID in typed))
    v = torch.cat([table.values(noise).v, noise[:, 4]])[rows]
    columns = torch.tensor(
        [{**{ids[x]: i for i, x in enumerate(LETTERS)}, EOS_ID: EOS}[a] for a in tree.actions.label.tolist()]
    )
    values = ActionValues(
        q=noise[torch.tensor(rows)[tree.actions.state], columns],
        v=v[tree.actions.state],
        v_next=v[tree.actions.next_state],
        v_start=v[tree.trajectories.start],
        v_final=v[tree.trajectories.final],
        log_prob_backspace=torch.zeros(tree.num_actions),
        log_prob_at_temperature=torch.zeros(tree.num_actions),
    )
    assert BACKSPACE_ID not in tree.actions.label.tolist()
    settings = SequenceMatchSettings(divergence=name, alpha=alpha, gamma=gamma, bc_weight_start=0.0, bc_weight_end=0.0)
    loss, _ = make_objective(settings).data_loss(EvaluatedTrajectories(tree, values, counts_of(tree)), step=0)
    expected = table.loss(noise, table.clean_occupancy(CLEAN), None, DIVERGENCES[name], alpha)
    torch.testing.assert_close(loss * tree.num_actions / tree.num_trajectories, expected)
