"""The weight benchmark on a small model: real publications, a real engine. Ratios are a matter of a quiet machine."""

from __future__ import annotations

import json

import pytest

from launch.bench.weights import bench_weights
from launch.bench.weights_report import render_weight_benchmark


@pytest.mark.slow
def test_every_part_of_a_push_is_measured() -> None:
    found = bench_weights("tiny", repetitions=2)
    json.dumps(found)
    for name in ("ratio_to_memcpy", "ratio_to_memcpy_3", "load_ratio_to_memcpy", "push_ratio_to_memcpy"):
        assert found[name] > 0, name
    one, three = found["one_actor_s"], found["three_actors_s"]
    for times in (one, three):
        learner = sum(times[part]["least"] for part in ("pack", "fingerprint", "learner_probe", "offer"))
        assert learner <= times["learner_held"]["largest"] + 1e-3
        assert times["channel"]["least"] > times["verify"]["least"] > 0
    # An actor can generate only after its engine has loaded and proved itself.
    assert one["push"]["largest"] > one["channel"]["least"] + one["load"]["least"] + one["engine_probe"]["least"] - 1e-3
    assert "load" not in three
    assert found["size_bytes"] == 4 * 1_312_000
    render_weight_benchmark(found)
