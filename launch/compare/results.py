"""What a comparison found, and its form in files."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from launch.compare.folder import StageCost
from launch.compare.statistics import CONFIDENCE, ComparedMetric, compare_metric
from launch.evaluation import Estimate

Key = tuple[str, int]
"""Arm and seed."""


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    arms: the first is the reference. estimates: `group.name` -> number; runs that failed have none, and are in
    `failures` by name. changes: the same for differences to the reference that were measured example by example.
    """

    task: str
    budget: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    estimates: Mapping[Key, Mapping[str, Estimate]]
    changes: Mapping[Key, Mapping[str, Estimate]]
    costs: Mapping[Key, StageCost]
    failures: Mapping[str, str]

    @property
    def reference(self) -> str:
        """The arm that the others are compared with."""
        return self.arms[0]

    def metrics(self) -> list[ComparedMetric]:
        """Every number that an arm has, in the order of the evaluation."""
        names = list(dict.fromkeys(name for numbers in self.estimates.values() for name in numbers))
        return [
            compare_metric(name, self._by_arm(self.estimates, name), self.reference, self._by_arm(self.changes, name))
            for name in names
        ]

    def costs_of(self, arm: str) -> list[StageCost]:
        """Of each of its runs that did not fail."""
        return [self.costs[arm, seed] for seed in self.seeds if (arm, seed) in self.costs]

    def values_of(self, arm: str, metric: str) -> tuple[float, ...]:
        """Of its seeds that have the number."""
        estimates = self._by_arm(self.estimates, metric)[arm].values()
        return tuple(each.value for each in estimates if each.value is not None and math.isfinite(each.value))

    def to_json(self) -> dict[str, object]:
        """Everything: each run, each arm over seeds, each difference to the reference."""
        return {
            "task": self.task,
            "budget": self.budget,
            "arms": list(self.arms),
            "reference": self.reference,
            "seeds": list(self.seeds),
            "confidence": CONFIDENCE,
            "metrics": [_metric_to_json(metric) for metric in self.metrics()],
            "runs": [
                {"arm": arm, "seed": seed, **asdict(cost), "metrics": self._run_to_json((arm, seed))}
                for (arm, seed), cost in self.costs.items()
            ],
            "failures": dict(self.failures),
        }

    def to_csv(self) -> str:
        """One line per run and metric, for other programs."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["metric", "arm", "seed", "value", "standard_error", "n"])
        for (arm, seed), numbers in self.estimates.items():
            for name, number in numbers.items():
                writer.writerow([name, arm, seed, number.value, number.standard_error, number.count])
        return text.getvalue()

    def _by_arm(self, numbers: Mapping[Key, Mapping[str, Estimate]], metric: str) -> dict[str, dict[int, Estimate]]:
        return {
            arm: {seed: numbers[arm, seed][metric] for seed in self.seeds if metric in numbers.get((arm, seed), {})}
            for arm in self.arms
        }

    def _run_to_json(self, key: Key) -> dict[str, object]:
        return {
            name: {"value": number.value, "standard_error": number.standard_error, "n": number.count}
            for name, number in self.estimates.get(key, {}).items()
        }


def to_json_text(comparison: Comparison) -> str:
    """The content of `compare.json`."""
    return json.dumps(comparison.to_json(), indent=2) + "\n"


def _metric_to_json(metric: ComparedMetric) -> dict[str, object]:
    return {
        "name": metric.name,
        "arms": {arm: asdict(found) for arm, found in metric.spreads.items()},
        "differences": {
            arm: asdict(found) | {"within_noise": found.within_noise} for arm, found in metric.differences.items()
        },
    }
