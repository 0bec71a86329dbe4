"""Alarms: metrics that say, in time, that a run goes wrong in a way that its loss does not show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from learner.settings.watch import WatchSettings


@dataclass(frozen=True)
class _Alarm:
    """metric: what is bounded. name: of the alarm's own metric, 0 or 1."""

    metric: str
    name: str
    bound: float
    advice: str


class Watch:
    """Looks at the metrics of every step of a stage."""

    def __init__(self, stage: str, settings: WatchSettings) -> None:
        self._stage = stage
        self._raised: set[str] = set()
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
            beyond = not value <= alarm.bound  # also where it is not a number
            found[alarm.name] = float(beyond)
            if beyond and alarm.name not in self._raised:
                self._raised.add(alarm.name)
                warnings.append(
                    f"stage {self._stage}, step {step}: {alarm.metric} {value:.3g} is beyond {alarm.bound:g}; "
                    f"{alarm.advice}"
                )
        return found, warnings
