"""Alarms: raised beyond their bound, told once a stage with what to do, and kept as metrics."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from launch.settings.recipe import read_recipe
from learner.metrics.alarms import MetricAlarms
from learner.metrics.log import distribution_metrics
from learner.settings.stages import AlarmSettings
from tests.training import CLONING, make_stage


def alarms_of(**bounds: float) -> MetricAlarms:
    return MetricAlarms(make_stage(CLONING, steps=1, name="own"), AlarmSettings(**bounds))


def test_an_alarm_is_told_once_and_kept_as_a_metric():
    metric_alarms = alarms_of(max_backspace_rate=0.3)
    assert metric_alarms.check(1, {"loss": 9.0, "backspace_rate": 0.3}) == ({"alarm_backspace_rate": 0.0}, [])
    found, warnings = metric_alarms.check(2, {"backspace_rate": 0.31})
    assert found == {"alarm_backspace_rate": 1.0}
    assert warnings == [
        "stage own, step 2: backspace_rate 0.31 is beyond 0.3; the policy deletes most of the tokens that it "
        "writes: lower alpha or raise bc_weight_end"
    ]
    assert metric_alarms.check(3, {"backspace_rate": 0.2}) == ({"alarm_backspace_rate": 0.0}, [])
    assert metric_alarms.check(4, {"backspace_rate": 0.4}) == ({"alarm_backspace_rate": 1.0}, [])


def test_each_metric_has_its_own_alarm_and_a_number_that_is_none_raises_it():
    metric_alarms = alarms_of(max_log_prob_mismatch=0.5)
    assert metric_alarms.check(2, {"loss": 1.0}) == ({}, [])
    found, warnings = metric_alarms.check(7, {"backspace_rate": 0.1, "log_prob_mismatch_mean": math.nan})
    assert found == {"alarm_backspace_rate": 0.0, "alarm_log_prob_mismatch": 1.0}
    (warning,) = warnings
    assert warning.startswith("stage own, step 7: log_prob_mismatch_mean nan is beyond 0.5; rollouts do not come from")


# The first steps of the stage of launch/recipes/arithmetic_cpu.yaml that has rollouts, as a run had them: the learning
# rate rises, and each interval of ten steps ends far from the weights that it began with.
# fmt: off
HEALTHY = [
    4.2e-07, 0.0014, 0.0093, 0.015, 0.011, 0.045, 0.047, 0.073, 0.11, 0.11, 0.11, 0.099, 0.1, 0.053, 0.31, 0.33,
    0.58, 0.6, 0.87, 1, 1, 0.98, 0.081, 0.38, 0.58, 1.3, 1.2, 1.6, 2.8, 2, 1.7, 2.2, 0.12, 0.16, 0.54, 0.25, 0.65,
    0.74, 0.69, 0.7, 1.1, 1.1, 0.21, 0.66
]
# fmt: on


def warnings_of(mismatches: list[float], *overrides: str) -> list[str]:
    stage = read_recipe(Path("launch/recipes/arithmetic_cpu.yaml"), overrides).stages[1]
    metric_alarms = MetricAlarms(stage, AlarmSettings())
    looked = [metric_alarms.check(step, {"log_prob_mismatch_mean": value}) for step, value in enumerate(mismatches, 1)]
    return [warning for _, warnings in looked for warning in warnings]


def test_a_learner_that_moves_fast_between_two_publications_is_no_alarm() -> None:
    assert max(HEALTHY) > AlarmSettings().max_log_prob_mismatch
    assert warnings_of(HEALTHY) == []


@pytest.mark.parametrize("arrives_until", [0, 12])
def test_an_engine_that_computes_something_else_or_gets_no_weights_is_one(arrives_until: int) -> None:
    broken = HEALTHY[:arrives_until] + [value + 3.0 for value in HEALTHY[arrives_until:]]
    (warning,) = warnings_of(broken)
    step = arrives_until + 20
    assert warning.startswith(f"stage sequencematch, step {step}: log_prob_mismatch_mean ")
    assert " is beyond 2, for 20 steps; rollouts do not come from the learner's policy" in warning


def test_a_stage_of_few_steps_is_watched_to_its_end() -> None:
    assert warnings_of(6 * [3.0], "stages.sequencematch.steps=7") == []
    assert len(warnings_of(7 * [3.0], "stages.sequencematch.steps=7")) == 1


def test_a_bound_that_no_policy_can_reach_is_refused():
    """Every backspace takes back an action: there are never more of them than of the others."""
    with pytest.raises(ValidationError, match=r"less than 0\.5"):
        AlarmSettings(max_backspace_rate=0.5)


def test_a_distribution_in_scalars():
    samples = np.array([0] * 10 + [1] * 8 + [4, 9])
    assert distribution_metrics("staleness", samples) == {
        "staleness_mean": pytest.approx(1.05),
        "staleness_p50": 0.5,
        "staleness_p95": pytest.approx(4.25),
        "staleness_max": 9.0,
    }
