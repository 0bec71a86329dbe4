"""The folder of a comparison, and the session that does its missing runs.

runs/NAME/  comparison.yaml  lock  starts/NAME-start-seed<s>/  objectives/NAME-<objective>-seed<s>/  evaluation/seed<s>/
            compare.html  compare.json

The run of an objective has relative links to the checkpoints of its start, so nothing is trained or stored twice, and
the folder can be moved as a whole.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from launch.compare.plan import COMPARED_STAGE, PLAN_FILE, ComparisonPlan
from launch.compare.results import Comparison, Key, stage_cost
from launch.errors import RunFailedError, UserError
from launch.evaluation.report import write_evaluation
from launch.evaluation.results import CheckpointResult, Target, read_evaluation
from launch.evaluation.run import check_evaluation, evaluate
from launch.monitoring.live_view import clock
from launch.report.command import write_report
from launch.run.driver import train
from launch.run_folder.checkpoints import CHECKPOINTS_FOLDER, final_checkpoint, finished_stages
from launch.run_folder.folder import (
    ENVIRONMENT_FILE,
    RAY_JOB_VARIABLE,
    check_outlives_job,
    check_run_name,
    create_run_folder,
    is_run_folder,
    new_run_name,
    sole_driver,
)
from launch.settings.recipe import with_absolute_paths
from launch.settings.run import RunSettings


@dataclass(frozen=True)
class ComparisonFolder:
    """The folder of a comparison with its plan. path: absolute."""

    path: Path
    plan: ComparisonPlan

    @classmethod
    def create(cls, plan: ComparisonPlan, name: str | None) -> ComparisonFolder:
        """Create a comparison; UserError if the folder exists, the name is not valid, or the folder would be lost with
        the Ray job of this process. name: by default the recipe's with date and time.
        """
        if RAY_JOB_VARIABLE in os.environ:
            check_outlives_job(plan.recipe)
        plan = plan.model_copy(update={"recipe": with_absolute_paths(plan.recipe)})
        chosen = f"compare-{new_run_name(plan.recipe)}" if name is None else check_run_name(name)
        path = Path(plan.recipe.runs_folder) / chosen
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise UserError(
                f"folder {path} exists: continue it with `--resume {path}`, or choose another --name"
            ) from None
        comparison = cls(path.resolve(), plan)
        comparison.write_plan()
        return comparison

    def write_plan(self) -> None:
        """Write the current plan to its file."""
        (self.path / PLAN_FILE).write_text(self.plan.to_yaml(), encoding="utf-8")

    def start(self, seed: int) -> Path:
        """The run before the compared stage."""
        return self.path / "starts" / f"{self.path.name}-start-seed{seed}"

    def run(self, label: str, seed: int) -> Path:
        """The run of an objective."""
        return self.path / "objectives" / f"{self.path.name}-{label}-seed{seed}"

    def open_run(self, run: Path, settings: RunSettings, start: Path | None) -> RunSettings:
        """Create a run's folder if there is none; returns its settings. start: the finished run that it starts from."""
        here = settings.model_copy(update={"runs_folder": str(run.parent)})
        if not (run / ENVIRONMENT_FILE).is_file():  # written last: without it the folder is incomplete
            shutil.rmtree(run, ignore_errors=True)
            create_run_folder(here, run.name)
        if start is not None:
            (run / CHECKPOINTS_FOLDER).mkdir(exist_ok=True)
            for stage in self.plan.stages_before:
                link = run / CHECKPOINTS_FOLDER / stage.name
                if not link.is_symlink():
                    link.symlink_to(os.path.relpath(start / CHECKPOINTS_FOLDER / stage.name, link.parent))
        return here

    def is_finished(self, run: Path, settings: RunSettings) -> bool:
        """Whether a run has done all its stages."""
        return is_run_folder(run) and {stage.name for stage in settings.stages} <= finished_stages(settings, run).keys()


class ComparisonSession:
    """Does the missing runs one after another, and evaluates the runs of a seed once they are done."""

    def __init__(self, folder: ComparisonFolder, console: Console) -> None:
        self._folder = folder
        self._plan = plan = folder.plan
        self._console = console
        self._failures: dict[str, str] = {}
        self._seconds: list[float] = []
        self._position = 0
        self._num_runs = len(plan.seeds) * (len(plan.objectives) + bool(plan.stages_before))

    def run(self) -> Comparison:
        """Train and evaluate. If a run fails, the session continues with the next one.

        UserError: a run cannot be set up. KeyboardInterrupt: a stop was requested.
        """
        plan, folder = self._plan, self._folder
        results: dict[Key, CheckpointResult] = {}
        for seed in plan.seeds:
            start, start_settings = None, plan.start_settings(seed)
            if start_settings is not None:
                start = folder.start(seed)
                self._train(f"the start of seed {seed}", start, start_settings, None)
            for label in plan.objectives:
                self._train(f"{label}, seed {seed}", folder.run(label, seed), plan.run_settings(label, seed), start)
            results |= {(each.label, seed): each for each in self._measure(seed)}
        costs = {(label, seed): stage_cost(folder.run(label, seed)) for label, seed in results}
        labels, task = tuple(plan.objectives), plan.recipe.task.name
        return Comparison(task, plan.steps, labels, plan.seeds, results, costs, self._failures)

    def _train(self, title: str, run: Path, settings: RunSettings, start: Path | None) -> None:
        """Do one run, unless it is done or its start has failed."""
        self._position += 1
        if start is not None and start.name in self._failures:
            self._fail(run, f"its start {start.name} failed")
            return
        if self._folder.is_finished(run, settings):
            return
        headline = f"run {self._position} of {self._num_runs}"
        if self._seconds:
            left_s = (self._num_runs - self._position + 1) * sum(self._seconds) / len(self._seconds)
            headline += f", about {clock(left_s)} left"
        self._console.print(f"\n{headline}: {title}", style="bold", highlight=False)
        here = self._folder.open_run(run, settings, start)
        begun = time.monotonic()
        try:
            with sole_driver(run):
                finished = train(here, run, self._console, partial(check_evaluation, settings))
        except RunFailedError as error:
            self._fail(run, str(error))
            return
        if not finished:
            raise KeyboardInterrupt
        write_report(run)
        self._seconds.append(time.monotonic() - begun)

    def _fail(self, run: Path, why: str) -> None:
        self._failures[run.name] = why
        self._console.print(f"[yellow]{escape(f'{run.name} failed: {why}')}[/yellow]", highlight=False, soft_wrap=True)

    def _measure(self, seed: int) -> tuple[CheckpointResult, ...]:
        """Results of the finished runs of a seed, from a file if it has all of them."""
        runs = {label: self._folder.run(label, seed) for label in self._plan.objectives}
        runs = {label: run for label, run in runs.items() if run.name not in self._failures}
        if not runs:
            return ()
        folder = self._folder.path / "evaluation" / f"seed{seed}"
        evaluation = read_evaluation(folder)
        if evaluation is None or [each.label for each in evaluation.checkpoints] != list(runs):
            self._console.print(f"\nevaluating the runs of seed {seed}", style="bold", highlight=False)
            targets = [
                Target(label, final_checkpoint(self._plan.run_settings(label, seed), run, COMPARED_STAGE))
                for label, run in runs.items()
            ]
            folder.mkdir(parents=True, exist_ok=True)
            settings = self._plan.recipe.model_copy(update={"seed": seed})
            evaluation = evaluate(targets, settings, self._console, keep_in=folder)
            write_evaluation(evaluation, folder)
        return evaluation.checkpoints
