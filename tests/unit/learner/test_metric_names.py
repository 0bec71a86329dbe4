"""docs/metrics.md names every metric of a run, and none besides."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa

from buffer.experts.tasks import Task
from launch.run.held_out import numbers_of_answers
from learner.metrics.alarms import MetricAlarms
from learner.metrics.log import distribution_metrics
from learner.settings.stages import AlarmSettings
from tests.rollouts import rollouts
from tests.training import CLONING, MATCHING, make_model, make_stage, make_trainer
from tests.unit.learner.test_score_functions import KL_CONTROL, REINFORCE, ScoredRollouts, make_score_trainer
from tests.unit.learner.test_target_objectives import CASES, make_target_trainer

TABLE = Path(__file__).parents[3] / "docs" / "metrics.md"


class RolloutsOfTwoVersions:
    """So that there are newest and stale actions."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def sample(self, count: int) -> pa.RecordBatch:
        halves = [rollouts(self._task, first=0, count=count // 2, version=0)]
        halves.append(rollouts(self._task, first=count // 2, count=count - count // 2, version=1))
        return pa.Table.from_batches(halves).combine_chunks().to_batches()[0]


def documented() -> list[str]:
    rows = [line.split("|")[1] for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


def test_the_table_names_every_metric_once(task):
    objectives = [CLONING, MATCHING, MATCHING | {"divergence": "js", "estimator": "paper"}]
    objectives += [{"name": name} for name in ("unlikelihood", "emo", "scheduled_sampling", "adversarial_js")]
    found: set[str] = set()
    for objective in objectives:
        trainer = make_trainer(task, make_model(task), make_stage(objective), rollouts=_rollouts_for(objective, task))
        metrics = trainer.train_step()
        alarms, _ = MetricAlarms(make_stage(MATCHING), AlarmSettings()).check(1, metrics)
        found |= metrics.keys() | alarms.keys()
    for objective in (REINFORCE, KL_CONTROL):
        trainer = make_score_trainer(task, make_model(task), objective, ScoredRollouts(task))
        found |= trainer.train_step().keys()
    metrics = make_target_trainer(task, make_model(task), CASES["gdc_pp"]).train_step()
    alarms, _ = MetricAlarms(make_stage(MATCHING), AlarmSettings()).check(1, metrics)
    found |= metrics.keys() | alarms.keys()
    found |= distribution_metrics("staleness", np.zeros(1, dtype=np.int64)).keys() | {"policy_version"}
    examples = task.train.select(range(2))
    answers = numbers_of_answers(rollouts(task, first=0, count=2, version=0), examples, task, task.contract())
    found |= {"held_out_loss", "held_out_answers_step"} | answers.keys()
    names = documented()
    assert len(names) == len(set(names))
    assert set(names) == found


def _rollouts_for(objective: dict[str, object], task: Task) -> RolloutsOfTwoVersions | None:
    return RolloutsOfTwoVersions(task) if objective["name"] in ("sequencematch", "adversarial_js") else None
