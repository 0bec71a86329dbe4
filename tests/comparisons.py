"""Comparisons as they look when they are done, without any training."""

from __future__ import annotations

from pathlib import Path

from launch.compare.folder import ComparisonFolder, StageCost
from launch.compare.plan import make_plan, parse_objectives
from launch.compare.results import Comparison, Key
from launch.settings.recipe import read_recipe
from launch.settings.run import RunSettings
from launch.statistics import Estimate

OBJECTIVES = "mle,behaviour_cloning,sequencematch:alpha=0.1,beta_steps=50,unlikelihood,emo"
LABELS = ("mle", "behaviour_cloning", "sequencematch-alpha-0.1-beta_steps-50", "unlikelihood", "emo", "kl_control")

TEMPERATURES = (1.0, 0.85, 0.7)


def comparison(num_seeds: int, labels: tuple[str, ...] = LABELS) -> Comparison:
    """Each objective is better than the one before by 0.1, up to a hundredth by seed; the last has no `recovery`."""
    estimates, costs = {}, {}
    for position, label in enumerate(labels):
        for seed in range(num_seeds):
            accuracy = 0.3 + 0.1 * position + 0.01 * ((seed * (position + 1)) % 3)
            numbers = {"greedy.accuracy": Estimate(accuracy, 0.02, 500), "sampled.length": Estimate(12.5, 0.25, 500)}
            if label != labels[-1]:
                numbers["recovery.recovery"] = Estimate(None if label == labels[0] else 0.5, 0.02, 500)
            estimates[label, seed] = numbers
            costs[label, seed] = StageCost(400, 100_000 + position, 12.0)
    return Comparison("arithmetic", "400 steps", labels, tuple(range(num_seeds)), estimates, {}, costs, {})


def comparison_over_temperature(labels: tuple[str, ...] = LABELS[:2]) -> Comparison:
    """Texts of one seed: MAUVE falls and diversity rises with the temperature; each objective has 0.1 more MAUVE than
    the one before.
    """
    estimates: dict[Key, dict[str, Estimate]] = {}
    for position, label in enumerate(labels):
        numbers = estimates[label, 0] = {}
        for temperature in TEMPERATURES:
            group = "sampled" if temperature == 1.0 else f"temperature={temperature}"
            numbers[f"{group}.mauve"] = Estimate(1.0 - 0.5 * temperature + 0.1 * position, 0.02, 500)
            numbers[f"{group}.diversity"] = Estimate(0.9 * temperature, 0.01, 500)
            numbers[f"{group}, banned.mauve"] = Estimate(0.01, 0.02, 500)
    costs = {key: StageCost(400, 100_000, 12.0) for key in estimates}
    return Comparison("text", "400 steps", labels, (0,), estimates, {}, costs, {})


def arithmetic_settings(runs: Path) -> RunSettings:
    """The recipe of the main job, with another folder for runs."""
    return read_recipe(Path("launch/recipes/arithmetic_cpu.yaml"), [f"runs_folder={runs}"])


def new_comparison(runs: Path, objectives: str = "mle,emo") -> ComparisonFolder:
    """A folder `pair` without runs."""
    settings = arithmetic_settings(runs)
    plan = make_plan(settings, parse_objectives(objectives, settings.stages), 1, steps=3)
    return ComparisonFolder.create(plan, "pair")
