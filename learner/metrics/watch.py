"""Alarms: metrics that say, in time, that a run goes wrong in a way that its loss does not show."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from learner.settings.stages import StageSettings, WatchSettings


@dataclass(frozen=True)
class _Alarm:
    """metric: what is bounded. name: of the alarm's own metric, 0 or 1. steps: beyond the bound, in a row, make one."""

    metric: str
    name: str
    bound: float
    advice: str
    steps: int = 1


class Watch:
    """Looks at the metrics of every step of a stage.

    mismatch_steps: for which engine and learner have to disagree. The learner moves away from the weights that it
    published; rollouts of new ones bring the difference back. So only one that outlasts their arrival is a fault.
    """

    def __init__(self, stage: str, settings: WatchSettings, mismatch_steps: int) -> None:
        self._stage = stage
        self._raised: set[str] = set()
        self._beyond: Counter[str] = Counter()
        self._alarms = (
            _Alarm(
                "backspace_rate",
                "alarm_backspace_rate",
                settings.max_backspace_rate,
                "the policy takes back most of what it types: lower alpha or raise beta_end",
            ),
            _Alarm(
                "log_prob_mismatch_mean",
                "alarm_log_prob_mismatch",
                settings.max_log_prob_mismatch,
                "rollouts do not come from the learner's policy: publish more often, lower the learning rate, or see "
                "whether the engine's number format is too coarse",
                mismatch_steps,
            ),
            _Alarm(
                "unsatisfied_share",
                "alarm_unsatisfied",
                settings.max_unsatisfied_share,
                "hardly a rollout meets the pointwise constraints, so next to nothing is learned: choose features that "
                "the policy shows now and then, start from one that does, or raise rollout_batch_size",
            ),
        )

    def look(self, step: int, metrics: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
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


def mismatch_steps(stage: StageSettings) -> int:
    """Two intervals between publications: the first may pass before rollouts of its weights arrive."""
    return min(2 * stage.publish_every_steps, stage.steps)
