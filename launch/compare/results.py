"""What a comparison found, and its form in files."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from launch.compare.folder import StageCost
from launch.statistics import CONFIDENCE, Difference, Estimate, Spread, differences_to, spread

Key = tuple[str, int]
"""Arm and seed."""


@dataclass(frozen=True)
class ComparedMetric:
    """One metric over all arms that have it. differences: of all but the reference, by arm."""

    name: str
    spreads: dict[str, Spread]
    differences: dict[str, Difference]


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
        found = []
        for name in names:
            numbers = self._by_arm(self.estimates, name)
            spreads = {arm: each for arm, by_seed in numbers.items() if (each := spread(by_seed)) is not None}
            changes = self._by_arm(self.changes, name)
            found.append(ComparedMetric(name, spreads, differences_to(self.reference, numbers, changes)))
        return found

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
        return {name: number.to_json() for name, number in self.estimates.get(key, {}).items()}


def to_json_text(comparison: Comparison) -> str:
    """The content of `compare.json`."""
    return json.dumps(comparison.to_json(), indent=2) + "\n"


def _metric_to_json(metric: ComparedMetric) -> dict[str, object]:
    return {
        "name": metric.name,
        "arms": {arm: asdict(found) for arm, found in metric.spreads.items()},
        "differences": {arm: _difference_to_json(found) for arm, found in metric.differences.items()},
    }


def _difference_to_json(found: Difference) -> dict[str, object]:
    return {
        "mean": found.value,
        "half_width": found.half_width,
        "p_value": found.p_value,
        "adjusted_p_value": found.adjusted_p_value,
        "basis": found.basis,
        "num_seeds": found.num_seeds,
        "within_noise": found.within_noise,
    }
