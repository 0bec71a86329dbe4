"""Comparisons as they look when they are done, without any training."""

from __future__ import annotations

from pathlib import Path

from launch.compare.plan import make_plan, parse_objectives
from launch.compare.results import Comparison, Key
from launch.compare.runs import ComparisonFolder
from launch.evaluation.results import CheckpointResult
from launch.settings.recipe import read_recipe
from launch.statistics import Estimate

OBJECTIVES = "mle,behavior_cloning,sequencematch:alpha=0.1,bc_weight_steps=50,unlikelihood,emo"
LABELS = ("mle", "behavior_cloning", "sequencematch-alpha-0.1-bc_weight_steps-50", "unlikelihood", "emo", "kl_control")

TEMPERATURES = (1.0, 0.85, 0.7)
COST = {"steps": 400, "actions": 100_000, "seconds": 12.0}


def comparison_of(estimates: dict[Key, dict[str, Estimate]], **failures: str) -> Comparison:
    """Of these numbers of each run, `group.name`."""
    labels, seeds = (tuple(dict.fromkeys(key)) for key in zip(*estimates, strict=True))
    runs = {}
    for (label, seed), numbers in estimates.items():
        metrics: dict[str, dict[str, Estimate]] = {}
        for name, number in numbers.items():
            group, _, metric = name.rpartition(".")
            metrics.setdefault(group, {})[metric] = number
        runs[label, seed] = CheckpointResult(label, Path(label), metrics)
    return Comparison("arithmetic", 400, labels, seeds, runs, dict.fromkeys(runs, COST), failures)


def estimates_of(num_seeds: int, labels: tuple[str, ...] = LABELS) -> dict[Key, dict[str, Estimate]]:
    """Each objective is better than the one before by 0.1, up to a hundredth by seed; the last has no `recovery`."""
    estimates = {}
    for position, label in enumerate(labels):
        for seed in range(num_seeds):
            accuracy = 0.3 + 0.1 * position + 0.01 * ((seed * (position + 1)) % 3)
            numbers = {"greedy.accuracy": Estimate(accuracy, 0.02, 500), "sampled.length": Estimate(12.5, 0.25, 500)}
            if label != labels[-1]:
                numbers["recovery.recovery"] = Estimate(None if label == labels[0] else 0.5, 0.02, 500)
            estimates[label, seed] = numbers
    return estimates


def comparison_over_temperature(labels: tuple[str, ...] = LABELS[:2]) -> Comparison:
    """Texts of one seed: MAUVE falls with the temperature; each objective has 0.1 more than the one before."""
    estimates: dict[Key, dict[str, Estimate]] = {}
    for position, label in enumerate(labels):
        numbers = estimates[label, 0] = {}
        for temperature in TEMPERATURES:
            group = "sampled" if temperature == 1.0 else f"temperature={temperature}"
            numbers[f"{group}.mauve"] = Estimate(1.0 - 0.5 * temperature + 0.1 * position, 0.02, 500)
            numbers[f"{group}, banned.mauve"] = Estimate(0.01, 0.02, 500)
    return comparison_of(estimates)


def new_comparison(runs: Path, objectives: str = "mle,emo") -> ComparisonFolder:
    """A folder `pair` without runs."""
    settings = read_recipe(Path("launch/recipes/arithmetic_cpu.yaml"), [f"runs_folder={runs}"])
    plan = make_plan(settings, parse_objectives(objectives, settings.stages), 1, steps=3)
    return ComparisonFolder.create(plan, "pair")
