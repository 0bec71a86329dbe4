"""Stages of a recipe: which lists of them make sense."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from learner.settings.stages import LearnerSettings, StageSettings, check_stages


def stage(name: str, start_from: str | None = None) -> StageSettings:
    return StageSettings(name=name, start_from=start_from, objective={"name": "mle"}, steps=1)


def test_a_pretrain_with_arms_is_fine():
    check_stages(())
    check_stages((stage("pretrain"), stage("a", "pretrain"), stage("b", "pretrain"), stage("c", "a"), stage("d")))


def test_a_name_used_twice():
    with pytest.raises(ValueError, match="two stages are called 'a'; a stage's name is its checkpoint folder"):
        check_stages((stage("a"), stage("b"), stage("a")))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((stage("a", "a"),), r"'a' starts from 'a', which is not an earlier stage \(earlier: none\)"),
        ((stage("a"), stage("b", "c"), stage("c")), r"'b' starts from 'c', .* \(earlier: a\)"),
        ((stage("a"), stage("b"), stage("c", "pretrain")), r"'c' starts from 'pretrain', .* \(earlier: a, b\)"),
    ],
)
def test_a_start_that_does_not_come_before(stages, message):
    with pytest.raises(ValueError, match=message):
        check_stages(stages)


@pytest.mark.parametrize("name", ["", "Pretrain", "a b", "../a", "a/b", "a\n"])
def test_a_name_must_be_good_for_a_folder(name):
    with pytest.raises(ValidationError, match="name"):
        stage(name)


def test_ranks_wait_for_what_rank_0_waits_for():
    settings = LearnerSettings(num_ranks=2, rank_timeout_s=7.0, data_timeout_s=100.0, checkpoint_timeout_s=20.0)
    assert settings.collective_timeout_s == 127.0
    assert LearnerSettings(num_ranks=2).collective_timeout_s > 300.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_timeout_s": 5.0}, "rank_timeout_s has no effect with num_ranks=1; leave it out"),
        ({"num_ranks": 2, "num_gpus": 0.5}, "num_gpus=0.5: several ranks cannot share a GPU; give each a whole one"),
        ({"num_ranks": 0}, "num_ranks"),
    ],
)
def test_settings_of_ranks_that_make_no_sense(changes, message):
    with pytest.raises(ValidationError, match=message):
        LearnerSettings(**changes)
