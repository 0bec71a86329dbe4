"""Metrics of a live run: each has one name, a view gives all of them, and the Grafana board asks for no other."""

from __future__ import annotations

import json
import re

from actors.pool.controller import MemberStatus, PoolStatus
from actors.rollout_actor import ActorStatus
from buffer.service.shard import BufferStatus, ShardStatus
from buffer.store.shard import SampleStatistics, SourceCounters, StoreStatus
from launch.monitoring.live_view import RunView
from launch.monitoring.metrics import METRICS, growth, samples
from learner.messages import LearnerStatus
from tests.dockerfiles import ROOT

BOARD = json.loads((ROOT / "docker" / "grafana" / "sequencematch.json").read_text(encoding="utf-8"))
TABLE = ROOT / "docs" / "monitoring.md"


def full_view(actions: int = 20_000) -> RunView:
    """Of a run in which everything has a value. actions: of the actor, since its birth."""
    counters = SourceCounters(500, 400, {"capacity": 90, "stale": 10}, 7, 700, 0, SampleStatistics(1.5, 20.0))
    store = StoreStatus({"policy": counters}, 2, 3, 4096, ("segment-000001.arrows",))
    status = ActorStatus("actor-0", 10, actions, 4213.0, 2_000, 5_000, 1, 64, "generating", dropped=3)
    return RunView(
        "run",
        [],
        learner=LearnerStatus("sequencematch", 100, 400, 0.125, 11, "training", {"loss": 0.5}),
        pool=PoolStatus(2, 11, (MemberStatus("actor-0", "running", 1, status, join_s=9.5),)),
        buffer=BufferStatus((ShardStatus(store, 16_384, True, 1, 1, "host", 3.0), None)),
    )


def test_a_full_view_has_every_metric_with_its_labels() -> None:
    found = list(samples(full_view()))
    labels = {metric.name: metric.labels for metric in METRICS}
    assert {name for name, _, _ in found} == labels.keys()
    assert all(len(values) == len(labels[name]) for name, values, _ in found)
    assert not [name for name in labels if name.endswith("_total")], "Ray adds it to counters"
    assert len({(name, values) for name, values, _ in found}) == len(found)
    values = {(name, *labels): value for name, labels, value in found}
    assert values["learner_metric", "sequencematch", "loss"] == 0.5
    assert values["learner_step_seconds", "sequencematch"] == 0.125
    assert values["actor_actions", "actor-0"] == 20_000
    assert values["actor_join_seconds", "actor-0"] == 9.5
    assert values["actor_dropped", "actor-0"] == 3
    assert values["buffer_removed_rows", "0", "policy", "stale"] == 10
    assert values["buffer_sample_age_seconds", "0", "policy"] == 20.0
    assert (values["buffer_answers", "0"], values["buffer_answers", "1"]) == (1.0, 0.0)


def test_a_counter_that_fell_belongs_to_a_new_process() -> None:
    assert growth(0.0, 5.0) == 5.0
    assert growth(5.0, 5.0) == 0.0
    assert growth(5.0, 8.0) == 3.0
    assert growth(8.0, 2.0) == 2.0


def test_the_board_asks_for_metrics_that_there_are() -> None:
    exported = {metric.exported_name: metric for metric in METRICS}
    expressions = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    asked = {name for expression in expressions for name in re.findall(r"ray_\w+", expression)}
    assert asked == exported.keys(), "each is on the board, and nothing else is"
    for panel in BOARD["panels"]:
        for target in panel["targets"]:
            labels = {"run"}.union(*(exported[n].labels for n in re.findall(r"ray_\w+", target["expr"])))
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels, panel["title"]
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    (variable,) = BOARD["templating"]["list"]
    assert variable["name"] == "run"
    assert set(re.findall(r"ray_\w+", variable["query"])) <= exported.keys()


def test_the_page_on_monitoring_names_every_metric() -> None:
    rows = [line.split("|")[1] for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| `ray_")]
    assert [row.strip().strip("`") for row in rows] == [metric.exported_name for metric in METRICS]
