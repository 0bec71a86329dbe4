"""What a comparison found, and its form in files."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from launch.compare.folder import StageCost
from launch.statistics import CONFIDENCE, Difference, Estimate, Spread, differences_to, spread

Key = tuple[str, int]
"""Label of an objective, and seed."""


@dataclass(frozen=True)
class ComparedMetric:
    """One number over all objectives that have it, by label.

    values: of the seeds that have it. differences: of all but the reference.
    """

    name: str
    values: dict[str, tuple[float, ...]]
    spreads: dict[str, Spread]
    differences: dict[str, Difference]

    @property
    def group(self) -> str:
        """Of rollouts, as `top_p=0.9` of `top_p=0.9.accuracy`."""
        return self.name.rpartition(".")[0]

    @property
    def metric(self) -> str:
        """The name within its group."""
        return self.name.rpartition(".")[2]

    @property
    def beyond_noise(self) -> list[str]:
        """The objectives whose difference to the reference chance does not explain."""
        return [label for label, found in self.differences.items() if found.within_noise is False]


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    objectives: labels; the first is the reference. estimates: `group.name` -> number; runs that failed have none, and
    are in `failures` by name. changes: the same for differences to the reference that were measured example by example.
    """

    task: str
    budget: str
    objectives: tuple[str, ...]
    seeds: tuple[int, ...]
    estimates: Mapping[Key, Mapping[str, Estimate]]
    changes: Mapping[Key, Mapping[str, Estimate]]
    costs: Mapping[Key, StageCost]
    failures: Mapping[str, str]

    @property
    def reference(self) -> str:
        """The objective that the others are compared with."""
        return self.objectives[0]

    def metrics(self) -> list[ComparedMetric]:
        """Every number that an objective has, in the order of the evaluation."""
        found = []
        for name in dict.fromkeys(name for numbers in self.estimates.values() for name in numbers):
            numbers, changes = self._by_label(self.estimates, name), self._by_label(self.changes, name)
            spreads = {label: each for label, by_seed in numbers.items() if (each := spread(by_seed)) is not None}
            values = {
                label: tuple(
                    each.value
                    for each in numbers[label].values()
                    if each.value is not None and math.isfinite(each.value)
                )
                for label in spreads
            }
            found.append(ComparedMetric(name, values, spreads, differences_to(self.reference, numbers, changes)))
        return found

    def mean_cost(self, label: str) -> StageCost | None:
        """Of the runs of an objective that did not fail; None where all did."""
        costs = [self.costs[label, seed] for seed in self.seeds if (label, seed) in self.costs]
        if not costs:
            return None
        steps, actions, seconds = np.mean([[cost.steps, cost.actions, cost.seconds] for cost in costs], axis=0)
        return StageCost(round(steps), round(actions), float(seconds))

    def to_json(self) -> str:
        """The content of `compare.json`: each run, each objective over seeds, each difference to the reference."""
        tree = {
            "task": self.task,
            "budget": self.budget,
            "arms": list(self.objectives),
            "reference": self.reference,
            "seeds": list(self.seeds),
            "confidence": CONFIDENCE,
            "metrics": [
                {
                    "name": metric.name,
                    "arms": {label: asdict(found) for label, found in metric.spreads.items()},
                    "differences": {label: found.to_json() for label, found in metric.differences.items()},
                }
                for metric in self.metrics()
            ],
            "runs": [
                {
                    "arm": label,
                    "seed": seed,
                    **asdict(cost),
                    "metrics": {
                        name: number.to_json() for name, number in self.estimates.get((label, seed), {}).items()
                    },
                }
                for (label, seed), cost in self.costs.items()
            ],
            "failures": dict(self.failures),
        }
        return json.dumps(tree, indent=2) + "\n"

    def to_csv(self) -> str:
        """One line per run and metric, for other programs."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["metric", "arm", "seed", "value", "standard_error", "n"])
        for (label, seed), numbers in self.estimates.items():
            for name, number in numbers.items():
                writer.writerow([name, label, seed, *number.to_json().values()])
        return text.getvalue()

    def _by_label(self, numbers: Mapping[Key, Mapping[str, Estimate]], metric: str) -> dict[str, dict[int, Estimate]]:
        found: dict[str, dict[int, Estimate]] = {label: {} for label in self.objectives}
        for (label, seed), of_run in numbers.items():
            if metric in of_run:
                found[label][seed] = of_run[metric]
        return found
