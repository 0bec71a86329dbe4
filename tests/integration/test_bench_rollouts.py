"""The rollout benchmark on a small load: it measures what it says. The ratio itself is a matter of a quiet machine."""

from __future__ import annotations

import json

import pytest

from launch.bench.rollouts import bench_rollouts


@pytest.mark.slow
def test_rollout_benchmark_reports_rates_ratio_and_error() -> None:
    report = bench_rollouts(batch=8, num_actions=64, repetitions=2, rates=(0.05, 0.3), timeout_s=120.0)
    json.dumps(report)
    ratio, rate = report["ratio_to_plain_vllm"], report["measured_backspace_rate"]
    assert isinstance(ratio, dict)
    assert isinstance(rate, dict)
    assert ratio.keys() == rate.keys() == {"0.05", "0.30"}
    assert all(value > 0.2 for value in ratio.values())
    assert rate["0.05"] == pytest.approx(0.05, abs=0.03)
    assert rate["0.30"] == pytest.approx(0.3, abs=0.07)
    assert report["num_actions_checked"] == 2 * 8 * 64
    error = report["max_logprob_error"]
    assert isinstance(error, float)
    assert 0 < error <= 1e-4
