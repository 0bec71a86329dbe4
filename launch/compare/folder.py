"""The folder of a comparison, and the runs in it.

runs/NAME/  comparison.yaml  lock  starts/NAME-start-seed<s>/  pilots/NAME-pilot-<objective>/
            arms/NAME-<objective>-seed<s>/  evaluation/seed<s>/  compare.html  compare.json  compare.md  compare.csv

The run of an objective has the checkpoints of its start by relative links: nothing is trained or stored twice, and the
folder can be moved as a whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.compare.plan import COMPARED_STAGE, PLAN_FILE, ComparisonPlan
from launch.errors import UserError
from launch.evaluation.task import CHECKPOINTS_FOLDER
from launch.run_folder.checkpoints import final_checkpoint, finished_stages
from launch.run_folder.folder import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    METRICS_FILE,
    RAY_JOB_VARIABLE,
    check_outlives_job,
    check_run_name,
    create_run_folder,
    new_run_name,
    open_run_folder,
)
from launch.settings.recipe import with_absolute_paths
from launch.settings.run import RunSettings
from launch.statistics import Estimate

HTML_FILE, JSON_FILE, MARKDOWN_FILE, CSV_FILE = "compare.html", "compare.json", "compare.md", "compare.csv"


@dataclass(frozen=True)
class ComparisonFolder:
    """Where the runs of a comparison lie. path: absolute."""

    path: Path
    plan: ComparisonPlan

    @classmethod
    def create(cls, plan: ComparisonPlan, name: str | None) -> ComparisonFolder:
        """A new comparison. name: by default the recipe's name with date and time.

        Raises:
            UserError: the folder is there already, cannot have that name, or would be lost with the job that this
                process is.
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

    def pilot(self, label: str) -> Path:
        """Folder of the few steps that tell how many actions a step of an objective has."""
        return self.path / "pilots" / f"{self.path.name}-pilot-{label}"

    def run(self, label: str, seed: int) -> Path:
        """Folder of the run of an objective."""
        return self.path / "arms" / f"{self.path.name}-{label}-seed{seed}"

    def evaluation(self, seed: int) -> Path:
        """Folder of what was measured of all objectives of a seed."""
        return self.path / "evaluation" / f"seed{seed}"

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
        if not (run / CONFIG_FILE).is_file():
            return False
        done = finished_stages(settings, run)
        return all(stage.name in done for stage in settings.stages)

    def checkpoint(self, label: str, seed: int) -> Path:
        """The final checkpoint of a run that is done."""
        folder, settings = open_run_folder(self.run(label, seed))
        return final_checkpoint(settings, folder, COMPARED_STAGE)


@dataclass(frozen=True)
class StageCost:
    """What a stage took. actions: trained on, of experts and rollouts; seconds: of its steps, with waits for data."""

    steps: int
    actions: int
    seconds: float

    @classmethod
    def of(cls, run: Path, stage: str = COMPARED_STAGE) -> StageCost:
        """From the metrics of a run; of a step that was repeated the later line counts."""
        lines = (run / METRICS_FILE).read_text(encoding="utf-8").splitlines()
        rows = {row["step"]: row for row in map(json.loads, lines) if row["stage"] == stage}
        return cls(
            steps=len(rows),
            actions=round(sum(row["actions_per_s"] * row["step_s"] for row in rows.values())),
            seconds=sum(row["step_s"] for row in rows.values()),
        )

    def steps_for(self, actions: int) -> int:
        """How many steps like these make so many actions, at least one."""
        return max(1, round(actions * self.steps / self.actions))


@dataclass(frozen=True)
class Measured:
    """What was measured of one checkpoint, `group.name` -> number. changes: differences to the `baseline`, a label."""

    estimates: dict[str, Estimate]
    changes: dict[str, Estimate]
    baseline: str


def read_measured(evaluation_file: Path) -> dict[str, Measured]:
    """The checkpoints of an evaluation, by label."""
    tree = json.loads(evaluation_file.read_text(encoding="utf-8"))
    return {
        each["label"]: Measured(_flat(each["metrics"]), _flat(each["differences"]), tree["baseline"])
        for each in tree["checkpoints"]
    }


def _flat(groups: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, Estimate]:
    return {
        f"{group}.{name}": Estimate(number["value"], number["standard_error"], int(number["n"]))
        for group, numbers in groups.items()
        for name, number in numbers.items()
    }
