"""Running a comparison: one run after the other, a seed's runs evaluated when they are done, and nothing repeated."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from launch.compare.folder import ComparisonFolder
from launch.compare.plan import COMPARED_STAGE
from launch.compare.results import Comparison, Key, MeasuredRun, read_measured, stage_cost
from launch.errors import RunFailedError
from launch.evaluation.report import EVALUATION_FILE, write_evaluation
from launch.evaluation.results import Target
from launch.evaluation.run import check_evaluation, evaluate
from launch.monitoring.live_view import clock
from launch.report.command import write_report
from launch.run.driver import train
from launch.run_folder.checkpoints import final_checkpoint
from launch.run_folder.folder import sole_driver
from launch.settings.run import RunSettings


class ComparisonSession:
    """One go at a comparison."""

    def __init__(self, folder: ComparisonFolder, console: Console) -> None:
        self._folder = folder
        self._plan = plan = folder.plan
        self._console = console
        self._failures: dict[str, str] = {}
        self._seconds: list[float] = []
        self._position = 0
        self._num_runs = len(plan.seeds) * (len(plan.objectives) + bool(plan.stages_before))

    def run(self) -> Comparison:
        """Train what is not done, and evaluate what is. The runs after one that fails are done all the same.

        Raises UserError where a run cannot be set up, and KeyboardInterrupt where it was asked to stop.
        """
        plan, folder = self._plan, self._folder
        runs: dict[Key, MeasuredRun] = {}
        for seed in plan.seeds:
            start, start_settings = None, plan.start_settings(seed)
            if start_settings is not None:
                start = folder.start(seed)
                self._train(f"the start of seed {seed}", start, start_settings, None)
            for label in plan.objectives:
                self._train(f"{label}, seed {seed}", folder.run(label, seed), plan.run_settings(label, seed), start)
            runs |= self._measure(seed)
        return Comparison(plan.recipe.task.name, plan.steps, tuple(plan.objectives), plan.seeds, runs, self._failures)

    def _train(self, title: str, run: Path, settings: RunSettings, start: Path | None) -> None:
        """Do one run, unless it is done or what it starts from is missing."""
        self._position += 1
        if start is not None and start.name in self._failures:
            self._fail(run, f"{start.name}, from which it starts, failed")
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
                finished = train(here, run, self._console, partial(check_evaluation, settings)).finished
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

    def _measure(self, seed: int) -> dict[Key, MeasuredRun]:
        """The runs of a seed that are done, evaluated unless a file has the numbers of them all."""
        runs = {label: self._folder.run(label, seed) for label in self._plan.objectives}
        runs = {label: run for label, run in runs.items() if run.name not in self._failures}
        folder, reference = self._folder.path / "evaluation" / f"seed{seed}", self._plan.reference
        file = folder / EVALUATION_FILE
        if runs and not (file.is_file() and read_measured(file, reference).keys() == runs.keys()):
            self._console.print(f"\nevaluating the runs of seed {seed}", style="bold", highlight=False)
            targets = [
                Target(label, final_checkpoint(self._plan.run_settings(label, seed), run, COMPARED_STAGE))
                for label, run in runs.items()
            ]
            folder.mkdir(parents=True, exist_ok=True)
            settings = self._plan.recipe.model_copy(update={"seed": seed})
            write_evaluation(evaluate(targets, settings, self._console, keep_in=folder), folder)
        measured = read_measured(file, reference) if runs else {}
        return {(label, seed): MeasuredRun(stage_cost(run), *measured[label]) for label, run in runs.items()}
