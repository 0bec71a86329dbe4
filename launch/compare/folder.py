"""The folder of a comparison, and the runs in it.

runs/NAME/  comparison.yaml  lock  starts/NAME-start-seed<s>/  arms/NAME-<objective>-seed<s>/  evaluation/seed<s>/
            compare.html  compare.json

The run of an objective has the checkpoints of its start by relative links: nothing is trained or stored twice, and the
folder can be moved as a whole.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from launch.compare.plan import PLAN_FILE, ComparisonPlan
from launch.errors import UserError
from launch.evaluation.task import CHECKPOINTS_FOLDER
from launch.run_folder.checkpoints import finished_stages
from launch.run_folder.folder import (
    ENVIRONMENT_FILE,
    RAY_JOB_VARIABLE,
    check_outlives_job,
    check_run_name,
    create_run_folder,
    is_run_folder,
    new_run_name,
)
from launch.settings.recipe import with_absolute_paths
from launch.settings.run import RunSettings

HTML_FILE, JSON_FILE = "compare.html", "compare.json"


@dataclass(frozen=True)
class ComparisonFolder:
    """Where the runs of a comparison lie. path: absolute."""

    path: Path
    plan: ComparisonPlan

    @classmethod
    def create(cls, plan: ComparisonPlan, name: str | None) -> ComparisonFolder:
        """A new comparison; UserError where the folder is there already, cannot have that name, or would be lost with
        the job that this process is. name: by default the recipe's with date and time.
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
                f"there is a folder {path} already: go on with it by `--resume {path}`, or choose another --name"
            ) from None
        comparison = cls(path.resolve(), plan)
        comparison.write_plan()
        return comparison

    def write_plan(self) -> None:
        """Note what the comparison is from now on."""
        (self.path / PLAN_FILE).write_text(self.plan.to_yaml(), encoding="utf-8")

    def start(self, seed: int) -> Path:
        """Folder of the run before the compared stage."""
        return self.path / "starts" / f"{self.path.name}-start-seed{seed}"

    def run(self, label: str, seed: int) -> Path:
        """Folder of the run of an objective."""
        return self.path / "arms" / f"{self.path.name}-{label}-seed{seed}"

    def open_run(self, run: Path, settings: RunSettings, start: Path | None) -> RunSettings:
        """Make a run's folder if it is not there; gives its settings.

        start: run whose stages it begins with, done; None = it begins from nothing.
        """
        here = settings.model_copy(update={"runs_folder": str(run.parent)})
        if not (run / ENVIRONMENT_FILE).is_file():  # the last thing that is written before a run begins
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
