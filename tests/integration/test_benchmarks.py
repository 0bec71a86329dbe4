"""Every benchmark runs on a small load and gives every field that it promises. Speed is a matter of a quiet machine."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks import buffer, learner, learner_memory, rollouts, weights
from tests.benchmarks.backend import run_module
from tests.benchmarks.buffer_load import make_rollouts, take, width
from tests.benchmarks.buffer_stores import disk_bytes, drop_page_cache, open_store
from tests.benchmarks.table import print_result


def check(module, found, fields):
    """All fields, as JSON, and a table that shows them."""
    json.dumps(found)
    assert found.keys() >= {*fields.split(), "hardware", "command"}
    print_result(found, module.SHOWN)


@pytest.mark.slow
def test_buffer(capsys):
    pytest.importorskip("torchrl", reason="TorchRL, of the extra `bench`, is not installed")
    pytest.importorskip("cpprb", reason="cpprb, of the extra `bench`, is not installed")
    found = buffer.bench(600, repetitions=1, scale=[512, 2048], grow_gib=2**-8, service=True)
    check(
        buffer,
        found,
        "by_cpu_time rows_per_s rows_per_cpu_s bytes_per_s rows_per_cpu_s_by_size disk_bytes_per_row spread num_rows "
        "disk_bytes_per_sampled_row cold_major_faults sampling memory_while_growing service_rows_per_s sent_rows "
        "actions_per_rollout insert_batch_size sampled_rows page_cache repetitions seeds load_average versions",
    )
    assert "ours_fsync_batch" in capsys.readouterr().out
    for clock in (found, found["by_cpu_time"]):
        for rival in ("torchrl", "torchrl_hand_padded", "cpprb"):
            for measure in ("insert", "insert_packed", "insert_4_writers", "sample", "sample_cold", "disk"):
                assert clock[f"{measure}_ratio_to_{rival}"] > 0
            for measure in ("insert", "insert_packed", "insert_4_writers"):
                assert clock[f"{measure}_ratio_to_{rival}_fsync_batch"] > 0
        assert clock["disk_ratio_to_torchrl"] < 0.8
    assert found["disk_bytes_per_sampled_row"]["torchrl"] == 0
    assert set(found["rows_per_cpu_s_by_size"]["ours"]["insert"]) == {"8", "64", "256"}
    sampling = found["sampling"]
    assert set(sampling["sample_ms"]) == set(sampling["opening_cpu_s"]) == {"512", "2048"}
    assert set(sampling["sampler_ms"]) == {"uniform", "fifo", "recency", "prioritized", "stratified"}
    sizes_mib = [point["disk_mib"] for point in found["memory_while_growing"]]
    assert sizes_mib == pytest.approx([0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4], abs=0.6)
    assert min(found["service_rows_per_s"][name] for name in ("insert_1_writers", "insert_4_writers", "sample")) > 0


@pytest.mark.parametrize("name", ["ours", "ours_fsync_batch", "torchrl", "torchrl_hand_padded", "cpprb"])
def test_a_store_gives_back_what_it_took_also_when_its_pages_are_gone(name, tmp_path):
    pytest.importorskip("torchrl", reason="TorchRL, of the extra `bench`, is not installed")
    pytest.importorskip("cpprb", reason="cpprb, of the extra `bench`, is not installed")
    rollouts, folder = make_rollouts(seed=0), tmp_path / "store"
    store = open_store(name, folder, 300)
    for first in range(0, 300, 50):
        store.insert(store.pack(take(rollouts, first, 50)))
    row_bytes = 12 * (275 if name.startswith("ours") else width("actions"))
    for _ in range(2):
        drawn = store.sample(128)
        columns = [drawn] if name.startswith("ours") else drawn.values()
        assert sum(column.nbytes for column in columns) / 128 == pytest.approx(row_bytes, rel=0.25)
        drop_page_cache(folder)
    store.close()
    assert disk_bytes(folder) > 300 * 3000


def test_a_measuring_process_that_fails_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match=r"buffer_costs .* failed: "):
        run_module("buffer_costs", tmp_path / "file", 2**20, timeout_s=100.0)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_learner(monkeypatch):
    pytest.importorskip("trl", reason="TRL, the extra `bench`, is not installed")
    monkeypatch.setattr(learner, "NODES_PER_BATCH", (32, 128))
    found = learner.bench(batch=8, length=16, steps=2, repetitions=1)
    check(
        learner,
        found,
        "ratio_to_hf_trainer ratio_to_trl_sft ratio_shared_prompt actions_per_s unique_tokens_per_s by_cpu_time "
        "sharing_ratio unique_tokens_per_s_slowest_over_fastest padding_fraction loss model num_parameters "
        "batch length steps repetitions seeds threads load_average versions",
    )
    for clock in (found, found["by_cpu_time"]):
        assert min(clock[name] for name in ("ratio_to_hf_trainer", "ratio_to_trl_sft", "ratio_shared_prompt")) > 0
        assert set(clock["unique_tokens_per_s"]) == {"32", "128"}
        assert set(clock["actions_per_s"]["plain"]) == {"ours", "hf_trainer", "trl_sft"}
    assert found["sharing_ratio"] == pytest.approx(8 * 16 / (8 + 8 * 8), rel=0.02)
    assert found["padding_fraction"] == pytest.approx(0.0, abs=0.05)
    for losses in found["loss"].values():
        # Equal but for the mass of backspace at the first action, which only we leave out.
        for loss in losses.values():
            assert loss == pytest.approx(losses["hf_trainer"], abs=2e-3)


@pytest.mark.slow
def test_memory_is_measured_in_fresh_processes():
    found = learner_memory.bench(nodes=512, vocabulary=65_536, width=32, timeout=100.0)
    check(learner_memory, found, "ratio_to_plain_loss extra_peak_mib num_nodes vocab_size hidden_size dtype")
    extra = found["extra_peak_mib"]
    assert 128 <= extra["ours"] < extra["plain"]  # what is kept
    assert extra["plain"] >= 2 * 128  # logits and their gradient
    assert found["ratio_to_plain_loss"] == pytest.approx(extra["ours"] / extra["plain"], rel=0.01)


@pytest.mark.slow
def test_rollouts():
    found = rollouts.bench(batch=8, actions=64, repetitions=2, rate=[0.05, 0.3], timeout=120.0)
    check(
        rollouts,
        found,
        "ratio_to_plain_vllm measured_backspace_rate actions_per_s max_logprob_error num_actions_checked model dtype "
        "batch actions_per_rollout repetitions seeds",
    )
    rate = found["measured_backspace_rate"]
    assert found["ratio_to_plain_vllm"].keys() == rate.keys() == {"0.05", "0.30"}
    assert set(found["actions_per_s"]) == {"plain", "backspace"}
    assert all(value > 0.2 for value in found["ratio_to_plain_vllm"].values())
    assert rate["0.05"] == pytest.approx(0.05, abs=0.03)
    assert rate["0.30"] == pytest.approx(0.3, abs=0.07)
    assert found["num_actions_checked"] == 2 * 8 * 64
    assert 0 < found["max_logprob_error"] <= 1e-4


@pytest.mark.slow
def test_weights():
    found = weights.bench("tiny", repetitions=2)
    check(
        weights,
        found,
        "ratio_to_memcpy ratio_to_memcpy_3 load_ratio_to_memcpy push_ratio_to_memcpy ratio_to_fresh_memcpy size_bytes "
        "one_actor_s three_actors_s model dtype transport repetitions seeds",
    )
    assert min(value for name, value in found.items() if "ratio" in name) > 0
    one, three = found["one_actor_s"], found["three_actors_s"]
    for times in (one, three):
        learner_s = sum(times[part]["least"] for part in ("pack", "fingerprint", "learner_probe", "offer"))
        assert learner_s <= times["learner_held"]["largest"] + 1e-3
        assert times["channel"]["least"] > times["verify"]["least"] > 0
        assert {"transfer", "memcpy", "fresh_memcpy"} < times.keys()
    # An actor can generate only after its engine has loaded and proved itself.
    assert one["push"]["largest"] > one["channel"]["least"] + one["load"]["least"] + one["engine_probe"]["least"] - 1e-3
    assert "load" not in three
    assert found["size_bytes"] == 4 * 1_312_000
