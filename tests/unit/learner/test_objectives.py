"""Losses, gradients and metrics against the float64 oracle, on logs that reach every branch."""

from __future__ import annotations

import math

import pytest
import torch

from learner.objectives import make_objective
from learner.objectives.base import EvaluatedLogs, combine_metrics
from learner.objectives.sequencematch import DIVERGENCES
from learner.settings.objectives import (
    LikelihoodSettings,
    SequenceMatchSettings,
)
from learner.state_tree.policy import ActionValues, TreePolicy
from tests import oracle
from tests.objectives import counts_of
from tests.oracle import Log, walk
from tests.unit.learner.test_state_tree import BACKSPACE, EOS, HARD, VOCAB, build, text_of, tiny

ALPHA, GAMMA = 0.3, 0.9
DATA = HARD
MODEL = [
    Log([1, 4], [8, BACKSPACE, 5, 6, EOS], source="policy"),
    Log([1, 4], [8, BACKSPACE, 8, BACKSPACE], finish_reason="max_actions", source="policy"),
    Log([9], [EOS], source="policy"),
]


@pytest.fixture(scope="module")
def model():
    """GPT-2, since Llama's norm computes in float32 whatever the type of the model."""
    return tiny("gpt2").double()


@pytest.fixture(scope="module")
def walks(model):
    """Every log run alone, by its `id()`; gradients through them need `retain_graph`."""
    return {id(log): walk(model, log, BACKSPACE) for log in [*DATA, *MODEL]}


def evaluate(model, logs, counts=None) -> EvaluatedLogs:
    tree = build(logs)
    return EvaluatedLogs(tree, TreePolicy(model, BACKSPACE).evaluate(tree), counts or counts_of(tree))


def total_loss(objective, data, rollouts, step):
    """The sum that the trainer takes over micro-batches, for one of each kind."""
    loss, metrics = objective.data_loss(data, step)
    if rollouts is None:
        return loss, metrics
    rollout_loss, rollout_metrics = objective.rollout_loss(rollouts, data.counts, step)
    return loss + rollout_loss, combine_metrics([metrics, rollout_metrics])


def gradients(loss, model, retain_graph=False):
    return torch.autograd.grad(loss, list(model.parameters()), retain_graph=retain_graph)


def settings(**changes) -> SequenceMatchSettings:
    return SequenceMatchSettings(**({"alpha": ALPHA, "gamma": GAMMA, "beta_start": 0.0, "beta_end": 0.0} | changes))


@pytest.mark.parametrize("name", ["mle", "behaviour_cloning"])
def test_likelihood(model, name):
    objective = make_objective(LikelihoodSettings(name=name))
    assert (objective.settings.name, objective.settings.needs_rollouts) == (name, False)
    loss, metrics = total_loss(objective, evaluate(model, DATA), None, step=0)
    expected = oracle.cross_entropy([walk(model, log, BACKSPACE) for log in DATA])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, model), gradients(expected, model))
    assert float(metrics["loss_behaviour_cloning"]) == pytest.approx(expected.item())
    with pytest.raises(ValueError, match="takes no rollouts"):
        total_loss(objective, evaluate(model, DATA), evaluate(model, MODEL), step=0)


def estimators(divergence: str) -> list[str]:
    return ["collapsed", "printed"] + (["uniform"] if divergence != "mle" else [])


CASES = [
    (divergence, estimator, coefficient)
    for divergence in DIVERGENCES
    for estimator in estimators(divergence)
    for coefficient in ((None, 1.0, 0.37) if divergence == "chi2_mixture" else (None,))
]
SUBSETS = {
    "all": DATA,
    "eos": [log for log in DATA if log.finish_reason == "eos"],
    "truncated": [log for log in DATA if log.finish_reason != "eos"],
    **{f"log {i}": [log] for i, log in enumerate(DATA) if log.actions},
}


def is_quick(subset: str, coefficient: float | None) -> bool:
    """Single logs are worth their time with the default coefficient."""
    return not subset.startswith("log") or coefficient is None


@pytest.mark.parametrize(
    ("divergence", "estimator", "coefficient", "subset"),
    [(*case, subset) for case in CASES for subset in SUBSETS if is_quick(subset, case[2])],
)
def test_sequencematch_against_the_oracle(model, walks, divergence, estimator, coefficient, subset):
    """All logs together, by how they end, and each data log alone, so that no branch hides behind another."""
    data_logs = SUBSETS[subset]
    objective = make_objective(settings(divergence=divergence, estimator=estimator, mixture_coefficient=coefficient))
    default = 1 / (4 * ALPHA) if divergence == "chi2_mixture" else 0.0
    data = evaluate(model, data_logs)
    rollouts = evaluate(model, MODEL) if objective.settings.needs_rollouts else None
    loss, _ = total_loss(objective, data, rollouts, step=0)
    expected = oracle.sequencematch_loss(
        oracle.Terms(divergence, ALPHA, GAMMA, SequenceMatchSettings().domain_margin, uniform=estimator == "uniform"),
        [walks[id(log)] for log in data_logs],
        [walks[id(log)] for log in MODEL],
        mixture_coefficient=default if coefficient is None else coefficient,
        shared_start=estimator == "collapsed",
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, model), gradients(expected, model, retain_graph=True))


@pytest.mark.parametrize("divergence", list(DIVERGENCES))
def test_printed_equals_collapsed_with_a_shared_start(model, divergence):
    shared = [log for log in HARD if log.prompt == [1, 4]]
    rollouts = [log for log in MODEL if log.prompt == [1, 4]]
    assert {log.finish_reason for log in shared} == {"eos", "max_actions"}
    data, sampled = evaluate(model, shared), evaluate(model, rollouts)
    losses = {}
    for estimator in ("printed", "collapsed"):
        objective = make_objective(settings(divergence=divergence, estimator=estimator))
        given = sampled if objective.settings.needs_rollouts else None
        losses[estimator], _ = total_loss(objective, data, given, step=0)
    torch.testing.assert_close(losses["printed"], losses["collapsed"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(losses["printed"], list(model.parameters()), retain_graph=True),
        gradients(losses["collapsed"], model),
        rtol=1e-9,
        atol=1e-12,
    )


def test_collapsed_mle_is_discounted_maximum_likelihood(model, walks):
    loss, _ = total_loss(make_objective(settings(divergence="mle")), evaluate(model, DATA), None, step=0)
    log_probs = [GAMMA**t * (q - walks[id(log)].v[t]) for log in DATA for t, q in enumerate(walks[id(log)].q)]
    torch.testing.assert_close(loss, -torch.stack(log_probs).sum() / len(log_probs))


@pytest.mark.parametrize("divergence", ["chi2_mixture", "kl"])
def test_the_uniform_estimator_nears_the_printed_one_as_gamma_nears_one(model, divergence):
    """Its weights are those of the limit; what is left is of the order of (1 - gamma) times the length."""
    data, sampled = evaluate(model, DATA), evaluate(model, MODEL)
    gaps = []
    for distance in (1e-2, 1e-3):
        printed, uniform = (
            total_loss(
                make_objective(settings(divergence=divergence, estimator=estimator, gamma=1 - distance)),
                data,
                sampled,
                step=0,
            )[0]
            for estimator in ("printed", "uniform")
        )
        gaps.append(abs(float((printed - uniform).detach())))
    assert gaps[0] > 1e-4
    assert gaps[1] == pytest.approx(gaps[0] / 10, rel=0.15)


def test_other_start_states_leave_a_residue(model):
    """The reason for the shared start: the printed form is another number without it."""
    data, sampled = evaluate(model, HARD[:3]), evaluate(model, MODEL)
    printed, _ = total_loss(make_objective(settings(divergence="chi2", estimator="printed")), data, sampled, step=0)
    collapsed, _ = total_loss(make_objective(settings(divergence="chi2")), data, None, step=0)
    start = [walk(model, log, BACKSPACE).v[0] for log in HARD[:3]], [walk(model, log, BACKSPACE).v[0] for log in MODEL]
    residue = (torch.stack(start[1]).mean() - torch.stack(start[0]).mean()) / 2
    actions = sum(len(log.actions) for log in HARD[:3])
    torch.testing.assert_close(printed - collapsed, residue * 3 / actions)
    assert abs(residue) > 1e-3


def test_mixture_penalty_is_a_squared_bellman_residual(model):
    """(alpha/4) (E[sum gamma^t r^2] + E[gamma^M (1-gamma) V^2]), scaled to data actions."""
    _, metrics = total_loss(make_objective(settings()), evaluate(model, DATA), evaluate(model, MODEL), step=0)
    total = 0.0
    for log in MODEL:
        w = walk(model, log, BACKSPACE)
        total += sum(GAMMA**t * (q - GAMMA * w.v[t + 1]).item() ** 2 for t, q in enumerate(w.q))
        if log.finish_reason == "eos":
            total += GAMMA ** len(w.q) * (1 - GAMMA) * w.v[-1].item() ** 2
    per_action = len(DATA) / sum(len(log.actions) for log in DATA)
    assert float(metrics["penalty_model"]) == pytest.approx(ALPHA / 4 * total / len(MODEL) * per_action)


def test_value_at_eos_is_trained(model):
    """An ordinary language model never trains it; here the `<eos>` state of a data log gets a gradient."""
    tree = build([HARD[0]])
    values = TreePolicy(model, BACKSPACE).evaluate(tree)
    values.v_final.retain_grad()
    data = EvaluatedLogs(tree, values, counts_of(tree))
    loss, _ = total_loss(make_objective(settings(divergence="chi2")), data, None, step=0)
    loss.backward()
    assert float(values.v_final.grad.abs().sum()) > 0


def test_beta_is_annealed_linearly(model):
    changes = {"beta_start": 0.8, "beta_end": 0.2, "beta_steps": 10}
    objective = make_objective(settings(**changes))
    data, sampled = evaluate(model, DATA), evaluate(model, MODEL)
    for step, beta in ((0, 0.8), (5, 0.5), (10, 0.2), (1000, 0.2)):
        loss, metrics = total_loss(objective, data, sampled, step)
        assert float(metrics["beta"]) == pytest.approx(beta)
        mixed = beta * metrics["loss_behaviour_cloning"] + (1 - beta) * metrics["loss_sequencematch"]
        torch.testing.assert_close(loss.detach(), mixed)


def test_metrics_say_what_they_are_named(model):
    alpha = 0.5  # small enough a bound that some residuals lie beyond it
    _, metrics = total_loss(
        make_objective(settings(alpha=alpha)), evaluate(model, DATA), evaluate(model, MODEL), step=0
    )
    walks = [walk(model, log, BACKSPACE) for log in DATA]
    residuals = torch.stack([q - GAMMA * w.v[t + 1] for w in walks for t, q in enumerate(w.q)])
    log_probs = torch.stack([q - w.v[t] for w in walks for t, q in enumerate(w.q)])
    ended = [w.v[-1] for w in walks if not w.truncated]
    beyond = (residuals.abs() > 2 / alpha).double().mean()
    assert 0 < beyond < 1
    expected = {
        "r_mean": residuals.mean(),
        "r_max_abs": residuals.abs().max(),
        "r_share_beyond_bound": beyond,
        "log_prob_mean": log_probs.mean(),
        "value_mean": torch.stack([v for w in walks for v in w.v[:-1]]).mean(),
        "value_eos_mean": torch.stack(ended).mean(),
        "truncated_share": torch.tensor(3 / 8),
        "truncated_share_model": torch.tensor(1 / 3),
    }
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value.item(), rel=1e-6), name
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())


def test_backspace_probability_is_that_of_the_policy(model):
    logs = [HARD[0]]  # three states before an action; the first is the floor, where it is 0
    _, metrics = total_loss(make_objective(LikelihoodSettings(name="mle")), evaluate(model, logs), None, step=0)
    probabilities = [
        model(input_ids=torch.tensor([text])).logits[0, -1].softmax(-1)[BACKSPACE] for text in ([1, 4, 5], [1, 4, 5, 6])
    ]
    assert float(metrics["backspace_prob"]) == pytest.approx(sum(probabilities).item() / 3)


def test_a_batch_of_empty_logs_has_a_finite_loss(model):
    empty = [Log([9], [], finish_reason="aborted", source="policy")]
    loss, metrics = total_loss(make_objective(settings()), evaluate(model, empty), evaluate(model, empty), step=0)
    assert math.isfinite(float(loss.detach()))
    assert all(math.isfinite(float(value)) for value in metrics.values())


def test_truncated_logs_have_no_reason_to_lift_a_value(model):
    """Dropping the phi tail alone would leave a term linear in V(s_N); the tangent cancels it."""
    log = Log([9], [], finish_reason="max_actions")
    loss, _ = total_loss(make_objective(settings(divergence="chi2")), evaluate(model, [log, HARD[2]]), None, step=0)
    only, _ = total_loss(make_objective(settings(divergence="chi2")), evaluate(model, [HARD[2]]), None, step=0)
    torch.testing.assert_close(loss, only)


@pytest.mark.parametrize(("divergence", "estimator"), [(d, e) for d in DIVERGENCES for e in estimators(d)])
def test_rollouts_are_needed_where_a_term_is_made_of_them(model, divergence, estimator):
    chosen = settings(divergence=divergence, estimator=estimator)
    objective = make_objective(chosen)
    assert objective.settings.needs_rollouts == (divergence == "chi2_mixture" or estimator != "collapsed")
    assert objective.settings.needs_rollouts == chosen.needs_rollouts
    if not objective.settings.needs_rollouts:
        with pytest.raises(ValueError, match="takes no rollouts"):
            total_loss(objective, evaluate(model, DATA), evaluate(model, MODEL), step=0)


@pytest.mark.parametrize("divergence", ["chi2", "chi2_mixture"])
def test_the_optimum_is_the_data_policy(divergence):
    """Two letters, two deep, a free logit per state and action. At the optimum the model's logs are the
    data's."""
    a, b = 5, 6
    counts = {(a, a): 4, (a, b): 3, (b, a): 2, (b, b): 1}
    logs = [Log([1], [*string, EOS]) for string, count in counts.items() for _ in range(count)]
    tree = build(logs)
    texts = [tuple(text_of(tree, node)) for node in tree.nodes.states.tolist()]
    entries = {text: i for i, text in enumerate(dict.fromkeys(texts))}  # rows may repeat a text
    entry = torch.tensor([entries[text] for text in texts])
    table = torch.zeros(len(entries), VOCAB, dtype=torch.float64, requires_grad=True)
    objective = make_objective(settings(divergence=divergence, alpha=0.03, gamma=0.998))
    optimizer = torch.optim.LBFGS([table], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-12)
    others = torch.arange(VOCAB) != BACKSPACE
    floor = entries[(1,)]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        v = table.logsumexp(1)
        v = torch.where(torch.arange(len(table)) == floor, table[:, others].logsumexp(1), v)[entry]
        values = ActionValues(
            q=table[entry[tree.actions.state], tree.actions.label],
            v=v[tree.actions.state],
            v_next=v[tree.actions.next_state],
            v_start=v[tree.trajectories.start],
            v_final=v[tree.trajectories.final],
            log_prob_backspace=torch.zeros(tree.num_actions),
            log_prob_at_temperature=torch.zeros(tree.num_actions),
        )
        evaluated = EvaluatedLogs(tree, values, counts_of(tree))
        loss, _ = total_loss(objective, evaluated, evaluated if objective.settings.needs_rollouts else None, step=0)
        loss.backward()
        return loss

    optimizer.step(closure)
    policy = table.detach().softmax(1)
    first = table.detach()[floor, others].softmax(0)[a - 1]  # backspace, an id below, is left out
    after_a = entries[(1, a)]
    assert float(first) == pytest.approx(0.7, abs=0.01)
    assert float(policy[after_a, a]) == pytest.approx(4 / 7, abs=0.01)
    assert float(policy[after_a, BACKSPACE]) < 0.01
