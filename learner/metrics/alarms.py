"""What shows that a run goes wrong in a way that its loss does not: rollouts as the policy that acted saw them, against
what the learner says of them now, and alarms.

For actions of the newest weights the difference of log-probabilities is what the engine computes otherwise than the
learner, and the steps that the learner took since. For older ones it is mostly the distance that the policy went.
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
    """This call's shares; `finish_behavior_metrics` makes means of them once those of all calls are combined.
    newest_version: of all actions of the step's rollouts."""
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
    """From combined shares to means over the compared actions; 0 where none was compared, as their share then says."""
    finished = dict(metrics)
    for suffix in ("", "_stale"):
        share = finished.get(f"log_prob_compared{suffix}_fraction", 0.0)
        if share > 0.0:
            finished[f"log_prob_mismatch{suffix}_mean"] /= share
    return finished


@dataclass(frozen=True)
class _Alarm:
    """metric: what is bounded. name: of the alarm's own metric, 0 or 1. steps: beyond the bound, in a row, make one."""

    metric: str
    name: str
    bound: float
    advice: str
    steps: int = 1


class MetricAlarms:
    """Looks at the metrics of every step of a stage.

    The learner moves away from the weights that it published; rollouts of new ones bring the difference back. So engine
    and learner have to disagree for two intervals between publications before that is a fault: the first may pass
    before rollouts of its weights arrive.
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
                "the policy takes back most of what it types: lower alpha or raise bc_weight_end",
            ),
            _Alarm(
                "log_prob_mismatch_mean",
                "alarm_log_prob_mismatch",
                settings.max_log_prob_mismatch,
                "rollouts do not come from the learner's policy: publish more often, lower the learning rate, or see "
                "whether the engine's number format is too coarse",
                min(2 * stage.publish_every_steps, stage.steps),
            ),
            _Alarm(
                "unsatisfied_fraction",
                "alarm_unsatisfied",
                settings.max_unsatisfied_fraction,
                "hardly a rollout meets the pointwise constraints, so next to nothing is learned: choose features that "
                "the policy shows now and then, start from one that does, or raise rollout_batch_size",
            ),
        )

    def check(self, step: int, metrics: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
        """Metrics of the alarms whose metric is there (1 = beyond the bound), and warnings not given before."""
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
