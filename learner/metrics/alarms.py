"""Faults of a run that its loss does not show: log-probabilities of rollouts at the engine and at the learner, and
alarms.

For actions of the newest weights the difference comes from numerics of the engine and from the learner's steps since
the publication. For older weights it is mostly the change of the policy.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from learner.objectives.base import EvaluatedTrajectories, Metrics
from learner.settings.stages import AlarmSettings, StageSettings


@torch.no_grad()  # type: ignore[untyped-decorator]
def behavior_metrics(rollouts: EvaluatedTrajectories, backspace_id: int, newest_version: int) -> Metrics:
    """This call's parts; once all are combined, `finish_behavior_metrics` turns them into means. newest_version: of all
    actions of the step's rollouts."""
    tree, values = rollouts.tree, rollouts.values
    metrics = {"backspace_rate": rollouts.mean_over_actions((tree.actions.label == backspace_id).to(values.v.dtype))}
    difference = (values.log_prob_at_temperature - tree.actions.behavior_log_prob).abs()
    compared = tree.actions.behavior_temperature > 0.0
    newest = tree.actions.behavior_version == newest_version
    for suffix, chosen in (("", compared & newest), ("_stale", compared & ~newest)):
        kept = difference.masked_fill(~chosen, 0.0)
        metrics[f"log_prob_mismatch{suffix}_mean"] = rollouts.mean_over_actions(kept)
        metrics[f"log_prob_mismatch{suffix}_max_abs"] = torch.cat([kept, kept.new_zeros(1)]).max()
        metrics[f"log_prob_compared{suffix}_fraction"] = rollouts.mean_over_actions(chosen.to(values.v.dtype))
    return metrics


def finish_behavior_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Combined parts as means over the compared actions; 0 if none was compared (see the fraction of compared ones)."""
    finished = dict(metrics)
    for suffix in ("", "_stale"):
        fraction = finished.get(f"log_prob_compared{suffix}_fraction", 0.0)
        if fraction > 0.0:
            finished[f"log_prob_mismatch{suffix}_mean"] /= fraction
    return finished


@dataclass(frozen=True)
class _Alarm:
    """metric: the bounded one. name: of the alarm's own metric, 0 or 1. steps: in a row beyond the bound before it."""

    metric: str
    name: str
    bound: float
    advice: str
    steps: int = 1


class MetricAlarms:
    """Checks the metrics of every step of a stage.

    Between publications the learner's weights move away from those of the rollouts. So a mismatch is a fault only if it
    lasts for two publication intervals: during the first one, rollouts of the new weights may not have arrived.
    """

    def __init__(self, stage: StageSettings, settings: AlarmSettings) -> None:
        self._stage = stage.name
        self._raised: set[str] = set()
        self._beyond: Counter[str] = Counter()
        self._alarms = (
            _Alarm(
                "backspace_rate",
                "alarm_backspace_rate",
                settings.max_backspace_rate,
                "the policy deletes most of the tokens that it writes: lower alpha or raise bc_weight_end",
            ),
            _Alarm(
                "log_prob_mismatch_mean",
                "alarm_log_prob_mismatch",
                settings.max_log_prob_mismatch,
                "rollouts do not come from the learner's policy: publish more often, lower the learning rate, or see "
                "whether the engine computes in a too coarse number format",
                min(2 * stage.publish_every_steps, stage.steps),
            ),
            _Alarm(
                "unsatisfied_fraction",
                "alarm_unsatisfied",
                settings.max_unsatisfied_fraction,
                "few rollouts meet the pointwise constraints, so the policy learns almost nothing: choose features "
                "that some of its rollouts have, start from a policy with such rollouts, or raise rollout_batch_size",
            ),
        )

    def check(self, step: int, metrics: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
        """Metrics of the alarms whose metric exists (1 = beyond the bound), and warnings that are new in this stage."""
        found: dict[str, float] = {}
        warnings = []
        for alarm in self._alarms:
            value = metrics.get(alarm.metric)
            if value is None:
                continue
            self._beyond[alarm.name] = 0 if value <= alarm.bound else self._beyond[alarm.name] + 1
            raised = self._beyond[alarm.name] >= alarm.steps or math.isnan(value)
            found[alarm.name] = float(raised)
            if raised and alarm.name not in self._raised:
                self._raised.add(alarm.name)
                since = "" if alarm.steps == 1 else f", for {self._beyond[alarm.name]} steps"
                warnings.append(
                    f"stage {self._stage}, step {step}: {alarm.metric} {value:.3g} is beyond {alarm.bound:g}{since}; "
                    f"{alarm.advice}"
                )
        return found, warnings
