"""What the driver exports appears on the metrics endpoint of its Ray node, as Prometheus would read it."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from dataclasses import replace

import pytest
import ray

from actors.pool.controller import PoolStatus
from launch.monitoring.live_view import RunView
from launch.monitoring.metrics import METRICS, MetricExporter
from tests.processes import wait_until
from tests.unit.launch.test_metric_export import full_view

TIMEOUT_S = 120.0
"""Ray hands on what it was told every second here (else every 10 s); a busy machine takes longer."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=2**27,
        log_to_driver=False,
        _system_config={"metrics_report_interval_ms": 1000},
    )
    (node,) = ray.nodes()
    yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    ray.shutdown()


def values_at(endpoint: str) -> dict[tuple[str, str], float]:
    """Value by metric and actor (or run, where it has no such label) of what is ours."""
    with urllib.request.urlopen(endpoint, timeout=TIMEOUT_S) as answer:
        lines = answer.read().decode().splitlines()
    found = {}
    for line in lines:
        name, _, rest = line.partition("{")
        if name.startswith("ray_sequencematch_"):
            labels, _, value = rest.rpartition("} ")
            pairs = dict(pair.split("=", 1) for pair in labels.split(","))
            found[name, pairs.get("actor", pairs["run"]).strip('"')] = float(value)
    return found


def wait_for(endpoint: str, name: str, label: str, value: float) -> dict[tuple[str, str], float]:
    seen: dict[tuple[str, str], float] = {}

    def is_there() -> bool:
        seen.update(values_at(endpoint))
        return seen.get((name, label)) == value

    wait_until(is_there, TIMEOUT_S, lambda: f"{name} {value} of {label}; there is {seen}")
    return seen


def test_values_appear_on_the_endpoint_and_go_on(endpoint: str) -> None:
    exporter = MetricExporter("first")
    exporter.export(full_view())
    seen = wait_for(endpoint, "ray_sequencematch_actor_actions_total", "actor-0", 20_000.0)
    assert {name for name, _ in seen} == {metric.exported_name for metric in METRICS}
    assert seen["ray_sequencematch_learner_step", "first"] == 100.0

    exporter.export(full_view(actions=21_000))
    exporter.export(full_view(actions=500))  # the actor was replaced
    assert wait_for(endpoint, "ray_sequencematch_actor_actions_total", "actor-0", 21_500.0)

    scaled_down = replace_pool(full_view(actions=500), PoolStatus(0, 11, ()))
    exporter.export(scaled_down)
    seen = wait_for(endpoint, "ray_sequencematch_actor_running", "actor-0", 0.0)
    assert seen["ray_sequencematch_actor_actions_per_second", "actor-0"] == 0.0
    assert seen["ray_sequencematch_actors_desired", "first"] == 0.0


def replace_pool(view: RunView, pool: PoolStatus) -> RunView:
    return replace(view, pool=pool)
