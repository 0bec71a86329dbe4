"""Priorities from a step of the trainer through a store on disk into its draws, also after the store died."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from buffer.store.shard import SampleKey
from learner.objectives import make_objective
from learner.state_tree.policy import TreePolicy
from learner.trainer import Trainer
from tests.random_trajectories import MATCHING, TREES, random_trajectories
from tests.stores import crash, open_store
from tests.tiny_models import tiny_model
from tests.trajectories import BACKSPACE, numbered
from tests.unit.buffer.test_samplers import SMALLEST_P_VALUE, p_value, successive_sampling
from tests.unit.learner.test_priorities import residual_means, stage_of

SETTINGS = {"sampler": "prioritized", "priority_exponent": 1.0, "fsync": "none", "capacity": 40}


class FromStore:
    """Draws of one stage as the learner makes them; hands the trainer's priorities back."""

    def __init__(self, store):
        self.store = store
        self.step = 0

    def sample(self, count):
        self.drawn = self.store.sample(SampleKey("s", self.step, "policy"), count, policy_version=0)
        self.step += 1
        return self.drawn.batch

    def report_priorities(self, priorities):
        self.store.update_priorities(self.drawn.rows, priorities)


class Experts:
    def sample(self, count):
        return random_trajectories("expert", count, seed=3)


def trainer_on(rollouts, policy, count):
    stage = stage_of(MATCHING).model_copy(update={"rollout_batch_size": count})
    objective = make_objective(stage.objective)
    return Trainer(policy, objective, stage, TREES, Experts(), rollouts, report_priorities=rollouts.report_priorities)


def pairs(store, trials, stage):
    """How often each ordered draw of two rows came out; the draws change nothing but the log."""
    keys = [SampleKey(stage, step, "policy") for step in range(trials)]
    return Counter(tuple(store.sample(key, 2, policy_version=0).rows.tolist()) for key in keys)


def test_a_step_moves_priorities_and_draws_follow(tmp_path):
    store = open_store(tmp_path / "b", **SETTINGS)
    store.insert(random_trajectories("policy", 5, seed=8))
    policy = TreePolicy(tiny_model(), BACKSPACE)
    rollouts = FromStore(store)
    trainer = trainer_on(rollouts, policy, count=4)
    gamma = make_objective(stage_of(MATCHING).objective).settings.gamma
    expected = residual_means(policy.model, random_trajectories("policy", 5, seed=8), gamma)
    trainer.train_step()
    drawn = rollouts.drawn.rows.tolist()
    unseen = set(range(5)) - set(drawn)
    assert len(unseen) == 1
    weights = {row: 1.0 if row in unseen else expected[row] for row in range(5)}
    assert max(weights.values()) > 3 * min(weights.values()), "priorities that can be told from equal ones"
    observed = pairs(store, 1_000, "after")
    assert p_value(observed, successive_sampling(weights, 2)) > SMALLEST_P_VALUE
    equal = dict.fromkeys(permutations(range(5), 2), 1 / 20)
    assert p_value(observed, equal) < SMALLEST_P_VALUE


def test_priorities_survive_the_death_of_the_store(tmp_path):
    store = open_store(tmp_path / "b", **SETTINGS)
    store.insert(random_trajectories("policy", 20, seed=8))
    rollouts = FromStore(store)
    trainer = trainer_on(rollouts, TreePolicy(tiny_model(), BACKSPACE), count=20)
    trainer.train_step()
    restored = open_store(crash(tmp_path / "b", tmp_path / "c"), **SETTINGS)
    assert pairs(restored, 50, "after") == pairs(store, 50, "after")
    unjudged = open_store(tmp_path / "d", **SETTINGS)
    unjudged.insert(random_trajectories("policy", 20, seed=8))
    assert pairs(unjudged, 50, "after") != pairs(store, 50, "after")


def test_rollouts_that_came_after_the_last_report_are_seen_soon_after_a_restart(tmp_path):
    store = open_store(tmp_path / "b", **SETTINGS)
    store.insert(random_trajectories("policy", 20, seed=8))
    judged = store.sample(SampleKey("s", 0, "policy"), 20, 0).rows
    store.update_priorities(judged, np.full(20, 100.0, dtype=np.float32))
    store.insert(numbered(0, 2))
    restored = open_store(crash(tmp_path / "b", tmp_path / "c"), **SETTINGS)
    observed = pairs(restored, 50, "after")
    assert observed == pairs(store, 50, "after")
    assert sum(count for rows, count in observed.items() if max(rows) >= 20) > 2, "at a priority of 1 there were none"


def test_a_repeated_step_reports_the_same_again_and_leaves_the_same_priorities(tmp_path):
    """As after a kill: the store lives on, the learner goes back to its checkpoint, here the start."""
    store = open_store(tmp_path / "b", **SETTINGS)
    store.insert(random_trajectories("policy", 20, seed=8))
    reports, after = [], []
    for _ in range(2):
        rollouts = FromStore(store)
        trainer = trainer_on(rollouts, TreePolicy(tiny_model(), BACKSPACE), count=6)
        reported = []
        for _ in range(3):
            trainer.train_step()
            reported.append(rollouts.drawn.rows.tolist())
        reports.append(reported)
        copy = open_store(crash(tmp_path / "b", tmp_path / f"c{len(after)}"), **SETTINGS)
        after.append(pairs(copy, 50, "after"))
    assert reports[0] == reports[1]
    assert after[0] == after[1]


def test_priorities_that_are_none_are_refused(tmp_path):
    store = open_store(tmp_path / "b", **SETTINGS)
    store.insert(random_trajectories("policy", 3, seed=8))
    for bad in ([1.0, np.nan, 1.0], [1.0, -0.5, 1.0], [1.0, np.inf, 1.0]):
        with pytest.raises(ValueError, match="finite and not negative"):
            store.update_priorities(np.arange(3), np.array(bad, dtype=np.float32))
