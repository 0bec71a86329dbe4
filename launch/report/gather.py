"""All that a report says of a run, read from its folder while the run goes on, or after it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from buffer.reading.reader import BufferSnapshot, read_buffer
from launch.errors import UserError
from launch.evaluation.report import SAMPLES_FOLDER
from launch.report.charts import ChartGroup, chart_groups
from launch.report.curves import StageRows, read_stages
from launch.report.draws import DrawFacts, draw_facts
from launch.report.evaluation import EvaluationTable, read_evaluation
from launch.report.rollouts import RolloutSample, sample_rollouts
from launch.report.timeline import Timeline, read_timeline
from launch.run_folder.folder import BUFFER_FOLDER, ENVIRONMENT_FILE, run_config
from launch.run_folder.tokenizer import load_run_tokenizer
from launch.settings.recipe import read_recipe, to_yaml
from launch.settings.run import RunSettings

T = TypeVar("T")


@dataclass(frozen=True)
class StageSummary:
    """A stage of the recipe. num_steps: logged so far; loss: mean over its last tenth, None before the first step."""

    name: str
    objective: str
    start_from: str | None
    num_steps: int
    planned_steps: int
    busy_s: float
    loss: float | None


@dataclass
class Report:
    """What the page shows. Parts that the run does not have, or that cannot be read, are None; `notes` say why."""

    name: str
    made_at: float
    began_at: float
    last_at: float
    settings: RunSettings
    environment: str
    stages: list[StageSummary]
    charts: list[ChartGroup]
    timeline: Timeline | None
    draws: DrawFacts | None = None
    rollouts: RolloutSample | None = None
    evaluation: EvaluationTable | None = None
    samples: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> str:
        """The resolved recipe."""
        return to_yaml(self.settings)

    @property
    def command(self) -> str:
        """What the run was started with; empty where nothing says so."""
        first = self.environment.partition("\n")[0]
        return first.removeprefix("command: ") if first.startswith("command: ") else ""

    @property
    def is_complete(self) -> bool:
        """Whether every stage has made all of its steps."""
        return all(stage.num_steps >= stage.planned_steps for stage in self.stages)


def gather(run: Path) -> Report:
    """Read a run.

    Raises:
        UserError: nothing was trained yet, the metrics are damaged, `run` is no run folder, or another version of this
            program wrote its settings. OSError: a file cannot be read.
    """
    settings = read_recipe(run_config(run))
    rows = read_stages(run)
    if not rows:
        raise UserError(f"{run} has no data yet: no step was logged; ask again when training has begun")
    environment = run / ENVIRONMENT_FILE
    timeline = read_timeline(run)
    first, last = min(float(stage.times[0]) for stage in rows), max(float(stage.times[-1]) for stage in rows)
    report = Report(
        name=run.resolve().name,
        made_at=time.time(),
        began_at=timeline.began_at if timeline else first,
        last_at=max(last, timeline.began_at + timeline.last_s) if timeline else last,
        settings=settings,
        environment=environment.read_text(encoding="utf-8") if environment.is_file() else "",
        stages=_summaries(settings, rows),
        charts=chart_groups(rows),
        timeline=timeline,
        samples=_samples(run / SAMPLES_FOLDER),
    )
    report.evaluation = _noted(report, "evaluation", lambda: read_evaluation(run, _is_baseline(settings)))
    if (run / BUFFER_FOLDER).is_dir():
        snapshot = _noted(report, "replay buffer", lambda: read_buffer(run / BUFFER_FOLDER))
        if snapshot is not None:
            _read_snapshot(report, run, snapshot)
    return report


def _read_snapshot(report: Report, run: Path, snapshot: BufferSnapshot) -> None:
    report.draws = draw_facts(snapshot)
    if snapshot.trajectories.num_rows:
        report.rollouts = _noted(
            report, "rollouts", lambda: sample_rollouts(snapshot, load_run_tokenizer(run, snapshot.contract))
        )


def _noted(report: Report, what: str, read: Callable[[], T]) -> T | None:
    """What `read` gives; where a part of the folder cannot be read, the rest is shown, and the page says what is
    missing.
    """
    try:
        return read()
    except (ValueError, OSError) as error:
        report.notes.append(f"The {what} cannot be shown: {error}")
        return None


def _summaries(settings: RunSettings, rows: list[StageRows]) -> list[StageSummary]:
    logged = {stage.stage: stage for stage in rows}
    summaries = []
    before: str | None = None
    for stage in settings.stages:
        found = logged.get(stage.name)
        loss = found.curves.get("loss") if found else None
        summaries.append(
            StageSummary(
                stage.name,
                stage.objective.name,
                stage.start_from or before,
                int(found.steps[-1]) if found else 0,
                stage.steps,
                found.busy_s if found else 0.0,
                loss.end() if loss else None,
            )
        )
        before = stage.name
    return summaries


def _is_baseline(settings: RunSettings) -> Callable[[str], bool]:
    """Stages that learn from the data alone."""
    plain = {stage.name for stage in settings.stages if not stage.objective.needs_rollouts}
    return lambda label: label in plain


def _samples(folder: Path) -> dict[str, str]:
    """Printed rollouts of the evaluation, by the name of the checkpoint."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}
