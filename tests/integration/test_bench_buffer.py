"""The buffer's benchmark on a small load: all stores do the same work. Speed is a matter of a quiet machine."""

from __future__ import annotations

import json

import pytest

from launch.bench.buffer import NAMES, bench_buffer
from launch.bench.buffer_growth import memory_while_growing
from launch.bench.buffer_load import make_rollouts
from launch.bench.buffer_report import render_buffer_benchmark
from launch.bench.buffer_sides import disk_bytes, drawn_bytes, drop_page_cache, open_side

pytest.importorskip("torchrl", reason="TorchRL, of the extra `bench`, is not installed")
pytest.importorskip("cpprb", reason="cpprb, of the extra `bench`, is not installed")


@pytest.mark.slow
def test_every_number_is_there() -> None:
    found = bench_buffer(num_rows=600, repetitions=1, scales=(512, 2048), grow_bytes=2**22, with_service=True)
    json.dumps(found)
    for clock in (found, found["by_cpu_time"]):
        for rival in ("torchrl", "torchrl_hand_padded", "cpprb"):
            for measure in ("insert", "insert_packed", "insert_4_writers", "sample", "sample_cold", "disk"):
                assert clock[f"{measure}_ratio_to_{rival}"] > 0
        assert clock["disk_ratio_to_torchrl"] < 0.8
    assert found["disk_bytes_per_drawn_row"]["ours"] >= 8
    assert found["disk_bytes_per_drawn_row"]["torchrl"] == 0
    assert set(found["rows_per_s"]) == set(NAMES)
    assert set(found["sampling"]["draw_ms"]) == {"512", "2048"}
    assert set(found["sampling"]["sampler_ms"]) == {"uniform", "fifo", "recency", "prioritised", "stratified"}
    sizes_mib = [point["disk_mib"] for point in found["memory_while_growing"]]
    assert sizes_mib == pytest.approx([0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4], abs=0.6)
    assert min(found["service_rows_per_s"][name] for name in ("insert_1_writers", "insert_4_writers", "sample")) > 0
    render_buffer_benchmark(found)


def test_too_few_rows_for_a_draw() -> None:
    with pytest.raises(ValueError, match="too few"):
        bench_buffer(num_rows=100)


@pytest.mark.parametrize("name", NAMES)
def test_a_store_gives_back_what_it_took_also_when_its_pages_are_gone(name, tmp_path) -> None:
    load = make_rollouts((50, 500), (16, 64), seed=0)
    side = open_side(name, tmp_path / "store", 300, load)
    for first in range(0, 300, 50):
        side.insert(side.pack(load.rollouts(first, 50)))
    warm = drawn_bytes(side.sample(128))
    drop_page_cache(side.folder)
    assert drawn_bytes(side.sample(128)) == pytest.approx(warm, rel=0.2)
    row_bytes = 12 * (275 if name.startswith("ours") else load.longest_log)
    assert warm / 128 == pytest.approx(row_bytes, rel=0.25)
    side.close()
    assert disk_bytes(tmp_path / "store") > 300 * 3000


def test_a_growing_process_that_dies_is_named(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match="died"):
        memory_while_growing(tmp_path / "file", 2**20)
