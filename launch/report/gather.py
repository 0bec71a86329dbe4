"""All that a report shows of a run, read from its folder while the run goes on, or after it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from buffer.reading.reader import BufferSnapshot, read_buffer
from launch.errors import UserError
from launch.evaluation.report import SAMPLES_FOLDER
from launch.report.draws import DrawFacts, draw_facts
from launch.report.evaluation import EvaluationTable, read_evaluation
from launch.report.metrics import StageMetrics, read_metrics
from launch.report.rollouts import RolloutSample, sample_rollouts
from launch.report.timeline import Timeline, read_timeline
from launch.run_folder.folder import BUFFER_FOLDER, ENVIRONMENT_FILE, run_config
from launch.run_folder.tokenizer import load_run_tokenizer
from launch.settings.recipe import read_recipe
from launch.settings.run import RunSettings

T = TypeVar("T")

_COMMAND = "command: "


@dataclass(frozen=True)
class StageSummary:
    """A stage of the recipe. metrics: None before its first step."""

    name: str
    objective: str
    start_from: str | None
    planned_steps: int
    metrics: StageMetrics | None

    @property
    def num_steps(self) -> int:
        """Logged so far."""
        return int(self.metrics.steps[-1]) if self.metrics else 0


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
    timeline: Timeline | None
    samples: dict[str, str]
    draws: DrawFacts | None = None
    rollouts: RolloutSample | None = None
    evaluation: EvaluationTable | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def command(self) -> str:
        """What the run was started with; empty where the folder does not contain it."""
        first = self.environment.partition("\n")[0]
        return first.removeprefix(_COMMAND) if first.startswith(_COMMAND) else ""

    @property
    def is_complete(self) -> bool:
        """Whether every stage has made all of its steps."""
        return all(stage.num_steps >= stage.planned_steps for stage in self.stages)

    @property
    def starting_points(self) -> list[StageSummary]:
        """Stages that others which have begun start from; they are often many times as long."""
        started_from = {stage.start_from for stage in self.stages if stage.metrics}
        return [stage for stage in self.stages if stage.name in started_from and stage.metrics]


def gather(run: Path) -> Report:
    """Read a run.

    Raises:
        UserError: nothing was trained yet, the metrics are damaged, `run` is no run folder, or another version of this
            program wrote its settings. OSError: a file cannot be read.
    """
    settings = read_recipe(run_config(run))
    metrics = read_metrics(run)
    if not metrics:
        raise UserError(f"{run} has no data yet: no step was logged; ask again when training has begun")
    environment = run / ENVIRONMENT_FILE
    timeline = read_timeline(run)
    first, last = min(float(each.times[0]) for each in metrics), max(float(each.times[-1]) for each in metrics)
    report = Report(
        name=run.resolve().name,
        made_at=time.time(),
        began_at=timeline.began_at if timeline else first,
        last_at=max(last, timeline.began_at + timeline.last_s) if timeline else last,
        settings=settings,
        environment=environment.read_text(encoding="utf-8") if environment.is_file() else "",
        stages=_summaries(settings, {each.stage: each for each in metrics}),
        timeline=timeline,
        samples={path.stem: path.read_text(encoding="utf-8") for path in sorted((run / SAMPLES_FOLDER).glob("*.txt"))},
    )
    from_data = {stage.name for stage in settings.stages if not stage.objective.needs_rollouts}
    report.evaluation = _noted(report, "evaluation", lambda: read_evaluation(run, lambda label: label in from_data))
    if (run / BUFFER_FOLDER).is_dir():
        snapshot = _noted(report, "replay buffer", lambda: read_buffer(run / BUFFER_FOLDER))
        if snapshot is not None:
            report.draws = draw_facts(snapshot)
            report.rollouts = _noted(report, "rollouts", lambda: _rollouts(run, snapshot))
    return report


def _rollouts(run: Path, snapshot: BufferSnapshot) -> RolloutSample | None:
    if snapshot.trajectories.num_rows == 0:
        return None
    return sample_rollouts(snapshot, load_run_tokenizer(run, snapshot.contract))


def _noted(report: Report, what: str, read: Callable[[], T]) -> T | None:
    """What `read` returns; where a part of the folder cannot be read, the page shows the rest and names the part."""
    try:
        return read()
    except (ValueError, OSError) as error:
        report.notes.append(f"The {what} cannot be shown: {error}")
        return None


def _summaries(settings: RunSettings, metrics: dict[str, StageMetrics]) -> list[StageSummary]:
    summaries: list[StageSummary] = []
    for stage in settings.stages:
        start_from = stage.start_from or (summaries[-1].name if summaries else None)
        found = metrics.get(stage.name)
        summaries.append(StageSummary(stage.name, stage.objective.name, start_from, stage.steps, found))
    return summaries
