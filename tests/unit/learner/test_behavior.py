"""Stored log-probabilities against the learner's own: which are compared, at which temperature, how they combine."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from buffer.trajectory.schema import Behavior
from learner.metrics.alarms import behavior_metrics, finish_behavior_metrics
from learner.objectives.base import EvaluatedTrajectories, combine_metrics
from learner.state_tree import policy as policy_module
from learner.state_tree.policy import TreePolicy
from learner.state_tree.vocabulary import chunked_values
from tests.objectives import counts_of
from tests.oracle import Log, states, to_batch
from tests.unit.learner.test_state_tree import BACKSPACE, EOS, build, tiny


def policy_trajectories(actions, versions, temperature=1.0, top_p=1.0, prompt=(1, 4), **changes) -> Log:
    return Log(
        list(prompt),
        actions,
        source="policy",
        versions=versions,
        logprobs=[-0.25 * (t + 1) for t in range(len(actions))],
        temperature=temperature,
        top_p=top_p,
        finish_reason="eos" if actions and actions[-1] == EOS else "max_actions",
        **changes,
    )


LOGS = [
    policy_trajectories([5, BACKSPACE, 6, EOS], [3, 3, 4, 4], id="a"),
    Log([1], [5, 6, EOS], id="expert"),
    policy_trajectories([], [], id="empty"),
    policy_trajectories([7, 8], [2, 2], temperature=0.5, prompt=[9], id="cool"),
    policy_trajectories([5, 5, BACKSPACE], [3, 4, 4], top_p=0.9, id="nucleus"),
    policy_trajectories([8, EOS], [4, 4], temperature=1.5, id="warm"),
]


@pytest.fixture(scope="module")
def model():
    return tiny("gpt2").double()


def expected_log_prob(model, log: Log, t: int, temperature: float) -> float:
    """The text alone through the model; backspace is no action at the floor."""
    text = states(log, BACKSPACE)[t]
    logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].detach() / temperature
    if len(text) == len(log.prompt):
        logits[BACKSPACE] = -torch.inf
    return float(logits.log_softmax(0)[log.actions[t]])


@pytest.mark.parametrize("rows", [slice(0, 6), slice(1, 5), slice(3, 6), slice(2, 3)])
def test_the_columns_are_flat_like_the_actions(rows):
    first, count = rows.start, rows.stop - rows.start
    found = Behavior.from_batch(to_batch(LOGS).slice(first, count))
    chosen = LOGS[rows]
    assert found.log_prob.tolist() == [x for log in chosen for x in log.logprobs or [0.0] * len(log.actions)]
    assert found.version.tolist() == [v for log in chosen for v in log.versions or [-1] * len(log.actions)]
    of_trajectory = [0.0 if log.temperature is None or log.top_p < 1 else log.temperature for log in chosen]
    assert found.temperature.tolist() == [
        temperature for log, temperature in zip(chosen, of_trajectory, strict=True) for _ in log.actions
    ]


def test_the_tree_carries_them_and_the_names_of_the_logs():
    tree = build(LOGS)
    assert tree.trajectories.ids == ("a", "expert", "empty", "cool", "nucleus", "warm")
    assert tree.actions.temperatures == (0.5, 1.5)
    assert np.array_equal(tree.actions.behavior_version, Behavior.from_batch(to_batch(LOGS)).version)
    assert tree.without_trajectories().trajectories.ids == ()


@pytest.mark.parametrize("chunk_elements", [2**22, 24])
def test_the_learner_repeats_the_temperature_of_the_sampler(model, chunk_elements, monkeypatch):
    monkeypatch.setattr(policy_module, "chunked_values", partial(chunked_values, chunk_elements=chunk_elements))
    tree = build(LOGS)
    values = TreePolicy(model, BACKSPACE).evaluate(tree)
    expected = [
        expected_log_prob(model, log, t, log.temperature if log.temperature and log.top_p == 1 else 1.0)
        for log in LOGS
        for t in range(len(log.actions))
    ]
    torch.testing.assert_close(values.log_prob_at_temperature, torch.tensor(expected, dtype=torch.float64))
    assert not values.log_prob_at_temperature.requires_grad


def test_the_mismatch_is_that_of_the_compared_actions(model):
    rollouts = [log for log in LOGS if log.source == "policy"]
    whole = counts_of(build(rollouts))
    parts = []
    for part in (rollouts[:2], rollouts[2:]):
        tree = build(part)
        parts.append(
            behavior_metrics(
                EvaluatedTrajectories(tree, TreePolicy(model, BACKSPACE).evaluate(tree), whole), BACKSPACE, 4
            )
        )
    metrics = finish_behavior_metrics({name: float(value) for name, value in combine_metrics(parts).items()})
    differences: dict[bool, list[float]] = {True: [], False: []}
    for log in rollouts:
        for t in range(len(log.actions)):
            if log.top_p == 1.0:
                learner = expected_log_prob(model, log, t, log.temperature)
                differences[log.versions[t] == 4].append(abs(learner - log.logprobs[t]))
    assert [len(differences[newest]) for newest in (True, False)] == [4, 4]
    for suffix, newest in (("", True), ("_stale", False)):
        assert metrics[f"log_prob_mismatch{suffix}_mean"] == pytest.approx(np.mean(differences[newest]))
        assert metrics[f"log_prob_mismatch{suffix}_max_abs"] == pytest.approx(max(differences[newest]))
        assert metrics[f"log_prob_compared{suffix}_fraction"] == pytest.approx(4 / 11)
    assert metrics["backspace_rate"] == pytest.approx(2 / 11)


def test_without_anything_to_compare_the_mismatch_is_zero(model):
    tree = build([policy_trajectories([5, 5], [1, 1], top_p=0.5)])
    evaluated = EvaluatedTrajectories(tree, TreePolicy(model, BACKSPACE).evaluate(tree), counts_of(tree))
    metrics = finish_behavior_metrics(
        {name: float(value) for name, value in behavior_metrics(evaluated, BACKSPACE, 1).items()}
    )
    assert metrics.keys() >= {"log_prob_mismatch_mean", "log_prob_mismatch_stale_max_abs", "log_prob_compared_fraction"}
    assert not any(metrics.values())
