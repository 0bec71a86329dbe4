"""Alarms: raised beyond their bound, told once a stage with what to do, and kept as metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pydantic import ValidationError

from learner.metrics.behaviour import distribution_metrics
from learner.metrics.watch import Watch
from learner.settings.watch import WatchSettings


def test_an_alarm_is_told_once_and_kept_as_a_metric():
    watch = Watch("arm", WatchSettings(max_backspace_rate=0.3))
    assert watch.look(1, {"loss": 9.0, "backspace_rate": 0.3}) == ({"alarm_backspace_rate": 0.0}, [])
    found, warnings = watch.look(2, {"backspace_rate": 0.31})
    assert found == {"alarm_backspace_rate": 1.0}
    assert warnings == [
        "stage arm, step 2: backspace_rate 0.31 is beyond 0.3; the policy takes back most of what it types: lower "
        "alpha or raise beta_end"
    ]
    assert watch.look(3, {"backspace_rate": 0.2}) == ({"alarm_backspace_rate": 0.0}, [])
    assert watch.look(4, {"backspace_rate": 0.4}) == ({"alarm_backspace_rate": 1.0}, [])
    assert Watch("next", WatchSettings()).look(1, {"backspace_rate": 0.4})[1]  # a new stage tells again


def test_each_metric_has_its_own_alarm():
    watch = Watch("arm", WatchSettings(max_log_prob_mismatch=0.5))
    found, warnings = watch.look(7, {"backspace_rate": 0.1, "log_prob_mismatch_mean": 0.75})
    assert found == {"alarm_backspace_rate": 0.0, "alarm_log_prob_mismatch": 1.0}
    (warning,) = warnings
    assert warning.startswith("stage arm, step 7: log_prob_mismatch_mean 0.75 is beyond 0.5; rollouts do not come from")


def test_a_number_that_is_none_is_an_alarm_and_an_absent_one_is_not():
    watch = Watch("arm", WatchSettings())
    found, warnings = watch.look(1, {"log_prob_mismatch_mean": math.nan})
    assert (found, len(warnings)) == ({"alarm_log_prob_mismatch": 1.0}, 1)
    assert watch.look(2, {"loss": 1.0}) == ({}, [])


def test_a_bound_that_no_policy_can_reach_is_refused():
    """Every backspace takes back an action: there are never more of them than of the others."""
    with pytest.raises(ValidationError, match=r"less than 0\.5"):
        WatchSettings(max_backspace_rate=0.5)


def test_a_distribution_in_scalars():
    samples = np.array([0] * 10 + [1] * 8 + [4, 9])
    assert distribution_metrics("staleness", samples) == {
        "staleness_mean": pytest.approx(1.05),
        "staleness_p50": 0.5,
        "staleness_p95": pytest.approx(4.25),
        "staleness_max": 9.0,
    }
