"""The learner's benchmarks on small loads: they compare like with like. Speed is a matter of a quiet machine."""

from __future__ import annotations

import json

import pytest

from launch.bench.learner import prepare_learner_benchmark
from launch.bench.learner_memory import bench_learner_memory
from launch.bench.learner_report import render_learner_benchmark, render_memory_benchmark


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_trainers_do_the_same_work() -> None:
    pytest.importorskip("trl", reason="TRL, the extra `bench`, is not installed")
    found = prepare_learner_benchmark(batch=8, length=16, steps=2, repetitions=1, nodes_per_batch=(32, 128)).measure()
    json.dumps(found)
    for name in ("ratio_to_hf_trainer", "ratio_to_trl_sft", "ratio_shared_prompt", "sharing_ratio"):
        assert found[name] > 0
    assert found["sharing_ratio"] == pytest.approx(8 * 16 / (8 + 8 * 8), rel=0.02)
    assert found["padding_share"] == pytest.approx(0.0, abs=0.05)
    assert set(found["nodes_per_s"]) == {"32", "128"}
    assert min(found["nodes_per_s"].values()) > 0
    for losses in found["loss"].values():
        # Equal but for the mass of backspace at the first action, which only we leave out.
        for loss in losses.values():
            assert loss == pytest.approx(losses["hf_trainer"], abs=2e-3)
    assert found["by_cpu_time"].keys() < found.keys()
    assert all(value > 0 for name, value in found["by_cpu_time"].items() if name.startswith("ratio"))
    assert set(found["actions_per_s"]["plain"]) == {"ours", "hf_trainer", "trl_sft"}
    render_learner_benchmark(found)


@pytest.mark.slow
def test_memory_is_measured_in_fresh_processes() -> None:
    found = bench_learner_memory(num_nodes=512, vocab_size=65_536, hidden_size=32, timeout_s=100.0)
    json.dumps(found)
    extra = found["extra_peak_mib"]
    assert 128 <= extra["ours"] < extra["plain"]  # what is kept
    assert extra["plain"] >= 2 * 128  # logits and their gradient
    assert found["ratio_to_plain_loss"] == pytest.approx(extra["ours"] / extra["plain"], rel=0.01)
    render_memory_benchmark(found)


def test_a_measuring_process_that_fails_is_named() -> None:
    with pytest.raises(RuntimeError, match="measures 'ours' failed"):
        bench_learner_memory(num_nodes=-1)
