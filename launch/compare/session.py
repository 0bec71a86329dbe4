"""Running a comparison: one run after the other, a seed's runs evaluated when they are done, and nothing repeated."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from launch.compare.folder import ComparisonFolder, Measured, StageCost, read_measured
from launch.compare.results import Comparison, Key
from launch.durations import clock
from launch.errors import RunFailedError
from launch.evaluation import Target, check_evaluation, evaluate
from launch.evaluation.report import EVALUATION_FILE, write_evaluation
from launch.report.command import write_report
from launch.run.driver import train
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
        runs_per_seed = len(plan.objectives) + bool(plan.stages_before)
        self._num_runs = len(plan.seeds) * runs_per_seed + len(plan.objectives) * (plan.actions is not None)

    def run(self) -> Comparison:
        """Train what is not done, and evaluate what is. The runs after one that fails are done all the same.

        Raises:
            UserError: a run cannot be set up, or another process has it. KeyboardInterrupt: asked to stop; the run
                under way has a checkpoint.
        """
        trained: list[Key] = []
        measured: dict[Key, Measured] = {}
        for seed in self._plan.seeds:
            self._train_seed(seed)
            done = [each for each in self._plan.objectives if self._folder.run(each, seed).name not in self._failures]
            trained += [(label, seed) for label in done]
            measured |= {(label, seed): numbers for label, numbers in self._evaluate(done, seed).items()}
        return Comparison(
            task=self._plan.recipe.task.name,
            budget=self._plan.budget,
            objectives=tuple(self._plan.objectives),
            seeds=self._plan.seeds,
            estimates={key: each.estimates for key, each in measured.items()},
            changes={key: each.changes for key, each in measured.items() if each.baseline == self._plan.reference},
            costs={key: StageCost.of(self._folder.run(*key)) for key in trained},
            failures=self._failures,
        )

    def _train_seed(self, seed: int) -> None:
        folder, plan = self._folder, self._plan
        start_settings = plan.start_settings(seed)
        start = None if start_settings is None else folder.start(seed)
        if start_settings is not None and start is not None:
            self._train(f"the start of seed {seed}", start, start_settings, None)
        if plan.actions is not None and seed == plan.seeds[0]:
            for label in plan.objectives:
                pilot = plan.run_settings(label, seed, plan.pilot_steps(label))
                self._train(f"pilot of {label}", folder.pilot(label), pilot, start)
        for label in plan.objectives:
            run, pilot_run = folder.run(label, seed), folder.pilot(label)
            if pilot_run.name in self._failures:
                self._fail(run, f"{pilot_run.name}, which says how many steps it takes, failed")
                continue
            steps = plan.steps if plan.actions is None else StageCost.of(pilot_run).steps_for(plan.actions)
            assert steps is not None
            self._train(f"{label}, seed {seed}", run, plan.run_settings(label, seed, steps), start)

    def _train(self, title: str, run: Path, settings: RunSettings, start: Path | None) -> None:
        """Do one run, unless it is done or what it starts from is missing."""
        if start is not None and start.name in self._failures:
            self._fail(run, f"{start.name}, from which it starts, failed")
            return
        self._position += 1
        if self._folder.is_finished(run, settings):
            return
        self._console.print(f"\n{self._headline()}: {title}", style="bold", highlight=False)
        here = self._folder.open_run(run, settings, start)
        begun = time.monotonic()
        try:
            with sole_driver(run):
                finished = train(here, run, self._console, partial(check_evaluation, settings)).finished
        except RunFailedError as error:
            self._position -= 1
            self._fail(run, str(error))
            return
        if not finished:
            raise KeyboardInterrupt
        write_report(run)
        self._seconds.append(time.monotonic() - begun)

    def _headline(self) -> str:
        """`run 3 of 10, about 12:00 left`: the runs that are left take as long as the mean of those of this go."""
        text = f"run {self._position} of {self._num_runs}"
        if not self._seconds:
            return text
        left_s = (self._num_runs - self._position + 1) * sum(self._seconds) / len(self._seconds)
        return f"{text}, about {clock(left_s)} left"

    def _fail(self, run: Path, why: str) -> None:
        self._position += 1
        self._failures[run.name] = why
        self._console.print(f"[yellow]{escape(f'{run.name} failed: {why}')}[/yellow]", highlight=False, soft_wrap=True)

    def _evaluate(self, labels: list[str], seed: int) -> dict[str, Measured]:
        """Numbers of the objectives of a seed, measured unless a file has them all."""
        folder = self._folder.evaluation(seed)
        file = folder / EVALUATION_FILE
        if not labels:
            return {}
        if file.is_file() and set(found := read_measured(file)) == set(labels):
            return found
        self._console.print(f"\nevaluating the runs of seed {seed}", style="bold", highlight=False)
        targets = [Target(label, self._folder.checkpoint(label, seed)) for label in labels]
        folder.mkdir(parents=True, exist_ok=True)
        settings = self._plan.recipe.model_copy(update={"seed": seed})
        write_evaluation(evaluate(targets, settings, self._console, keep_in=folder), folder)
        return read_measured(file)
