"""Running a comparison: one run after the other, a seed's arms evaluated when they are done, and nothing repeated."""

from __future__ import annotations

import time
from collections import defaultdict
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from launch.compare.folder import ComparisonFolder, Measured, read_measured, stage_cost
from launch.compare.results import Comparison, Key
from launch.durations import clock
from launch.errors import RunFailedError
from launch.evaluation import Target, evaluate
from launch.evaluation.measuring import check_evaluation
from launch.evaluation.report import EVALUATION_FILE, write_evaluation
from launch.report.write import write_report
from launch.run.driver import train
from launch.run_folder.folder import sole_driver
from launch.settings.run import RunSettings

_START, _PILOT = "start", "pilot"


class ComparisonSession:
    """One go at a comparison."""

    def __init__(self, comparison: ComparisonFolder, console: Console) -> None:
        self._comparison = comparison
        self._plan = comparison.plan
        self._console = console
        self._failures: dict[str, str] = {}
        self._pace = Pace(_kinds(comparison))

    def run(self) -> Comparison:
        """Train what is not done, and evaluate what is. A run that fails leaves the others their turn.

        Raises:
            UserError: a run cannot be set up, or another process has it. KeyboardInterrupt: asked to stop; the run
                under way has a checkpoint.
        """
        trained: list[Key] = []
        measured: dict[Key, Measured] = {}
        for seed in self._plan.seeds:
            self._train_seed(seed)
            arms = [arm for arm in self._plan.arms if self._comparison.arm(arm, seed).name not in self._failures]
            trained += [(arm, seed) for arm in arms]
            measured |= {(arm, seed): numbers for arm, numbers in self._evaluate(arms, seed).items()}
        return Comparison(
            task=self._plan.recipe.task.name,
            budget=self._plan.budget,
            arms=tuple(self._plan.arms),
            seeds=self._plan.seeds,
            estimates={key: numbers.estimates for key, numbers in measured.items()},
            changes={
                key: numbers.changes for key, numbers in measured.items() if numbers.baseline == self._plan.reference
            },
            costs={key: stage_cost(self._comparison.arm(*key)) for key in trained},
            failures=self._failures,
        )

    def _train_seed(self, seed: int) -> None:
        folder, plan = self._comparison, self._plan
        before = plan.start_settings(seed)
        start = None if before is None else folder.start(seed)
        if before is not None and start is not None:
            self._train(_START, f"the start of seed {seed}", start, before, None)
        if plan.actions is not None and seed == plan.seeds[0]:
            for arm in plan.arms:
                pilot = plan.arm_settings(arm, seed, plan.pilot_steps(arm))
                self._train(_PILOT, f"pilot of {arm}", folder.pilot(arm), pilot, start)
        for arm in plan.arms:
            run = folder.arm(arm, seed)
            steps = self._steps(arm)
            if steps is None:
                self._fail(run, f"{folder.pilot(arm).name}, which says how many steps it takes, failed")
            else:
                self._train(arm, f"{arm}, seed {seed}", run, plan.arm_settings(arm, seed, steps), start)

    def _steps(self, arm: str) -> int | None:
        """How long an arm trains. With a budget in actions its pilot says so; None where that failed."""
        plan, pilot = self._plan, self._comparison.pilot(arm)
        if plan.actions is None:
            assert plan.steps is not None
            return plan.steps
        if pilot.name in self._failures:
            return None
        return stage_cost(pilot).steps_for(plan.actions)

    def _train(self, kind: str, title: str, run: Path, settings: RunSettings, start: Path | None) -> None:
        """Do one run, unless it is done or what it starts from is missing."""
        begun = time.monotonic()
        if start is not None and start.name in self._failures:
            self._fail(run, f"{start.name}, from which it starts, failed")
        elif self._comparison.is_finished(run, settings):
            self._pace.skip()
        else:
            self._console.print(f"\n{self._pace.headline()}: {title}", style="bold", highlight=False)
            here = self._comparison.open_run(run, settings, start)
            try:
                with sole_driver(run):
                    finished = train(here, run, self._console, partial(check_evaluation, settings)).finished
            except RunFailedError as error:
                self._fail(run, str(error))
                return
            if not finished:
                raise KeyboardInterrupt
            write_report(run)
            self._pace.done(kind, time.monotonic() - begun)

    def _fail(self, run: Path, why: str) -> None:
        self._pace.skip()
        self._failures[run.name] = why
        self._console.print(f"[yellow]{escape(f'{run.name} failed: {why}')}[/yellow]", highlight=False, soft_wrap=True)

    def _evaluate(self, arms: list[str], seed: int) -> dict[str, Measured]:
        """Numbers of the arms of a seed, measured unless a file has them all."""
        folder = self._comparison.evaluation(seed)
        file = folder / EVALUATION_FILE
        if not arms:
            return {}
        if file.is_file() and set(found := read_measured(file)) == set(arms):
            return found
        self._console.print(f"\nevaluating the arms of seed {seed}", style="bold", highlight=False)
        settings = self._plan.evaluation_settings(seed)
        targets = [Target(arm, self._comparison.checkpoint(arm, seed)) for arm in arms]
        folder.mkdir(parents=True, exist_ok=True)
        write_evaluation(evaluate(targets, settings, self._console, keep_in=folder), folder)
        return read_measured(file)


class Pace:
    """How far a comparison is, and how long the rest will take: each run as long as those of its kind took."""

    def __init__(self, kinds: list[str]) -> None:
        self._kinds = kinds
        self._position = 0
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def skip(self) -> None:
        """A run is not done now."""
        self._position += 1

    def done(self, kind: str, seconds: float) -> None:
        """A run has been done."""
        self._position += 1
        self._seconds[kind].append(seconds)

    def headline(self) -> str:
        """`run 3 of 10, about 12:00 left`; of kinds that nothing is known of the mean of the others is taken."""
        means = {kind: sum(each) / len(each) for kind, each in self._seconds.items()}
        text = f"run {self._position + 1} of {len(self._kinds)}"
        if not means:
            return text
        usual = sum(means.values()) / len(means)
        left_s = sum(means.get(kind, usual) for kind in self._kinds[self._position :])
        return f"{text}, about {clock(left_s)} left"


def _kinds(comparison: ComparisonFolder) -> list[str]:
    """What the runs are, in their order."""
    plan = comparison.plan
    kinds: list[str] = []
    for seed in plan.seeds:
        kinds += [] if plan.start_settings(seed) is None else [_START]
        kinds += len(plan.arms) * [_PILOT] if plan.actions is not None and seed == plan.seeds[0] else []
        kinds += plan.arms
    return kinds
