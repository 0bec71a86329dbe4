"""The data of a report, read from the folder of a live or a finished run."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ValidationError

from buffer.reading.snapshot import BufferSnapshot, read_buffer
from buffer.trajectory.replay import TrajectoryArrays
from buffer.trajectory.schema import TokenContract
from launch.errors import UserError
from launch.evaluation.report import SAMPLES_FOLDER
from launch.monitoring.run_log import LOG_FILE
from launch.report.evaluation import EvaluationTable, evaluation_table
from launch.rollout_view import continuation, decode
from launch.run_folder.folder import BUFFER_FOLDER, ENVIRONMENT_FILE, run_config
from launch.run_folder.metrics import KEYS, metrics_table
from launch.run_folder.task import load_run_tokenizer
from launch.settings.recipe import read_recipe
from launch.settings.run import RunSettings
from launch.statistics import Float64, Int64

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RUN_STATES = {
    "run_started": "not finished",
    "run_finished": "finished",
    "run_stopped": "stopped",
    "run_failed": "failed",
}
"""The state of a run after these events; a run that is not finished may be running or killed."""

MAX_ROLLOUTS = 24
MAX_ACTIONS = 6000
"""Actions of all shown rollouts together, to limit the size of the page."""
CONTEXT_TOKENS = 8
"""Tokens of context that an action is decoded with; earlier ones do not change its text."""

ActionKind = Literal["write", "backspace", "end"]


class Action(NamedTuple):
    """text: of the token that was written. noise: the policy did not choose it. logprob: in nats, as stored."""

    kind: ActionKind
    text: str
    noise: bool
    logprob: float
    version: int


@dataclass(frozen=True)
class Rollout:
    """A stored rollout. reward: None if no scorer scored it."""

    actor: str
    created_at: float
    prompt: str
    finish_reason: str
    reward: float | None
    actions: tuple[Action, ...]


@dataclass(frozen=True)
class StageMetrics:
    """The steps of one stage, [n] ascending; times in seconds since 1970; values by metric, NaN if not finite."""

    steps: Int64
    times: Float64
    values: dict[str, Float64]


class LogLine(BaseModel):
    """A line of the log. time: seconds since 1970."""

    time: float
    level: str
    role: str
    index: int
    event: str
    version: int | None
    message: str


@dataclass
class Report:
    """The content of the page. Missing or unreadable parts are empty; `notes` say why.

    metrics: by stage, of those with a step. samples: answers of the evaluation, by checkpoint.
    """

    name: str
    made_at: float
    settings: RunSettings
    environment: str
    metrics: dict[str, StageMetrics]
    log: list[LogLine]
    samples: dict[str, str]
    evaluation: EvaluationTable | None = None
    rollouts: list[Rollout] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def began_at(self) -> float:
        """Time of the first log line, in seconds since 1970; without a log, of the first step."""
        return self.log[0].time if self.log else min(float(each.times[0]) for each in self.metrics.values())

    @property
    def last_at(self) -> float:
        """Time of the newest line of any file."""
        return max([float(each.times[-1]) for each in self.metrics.values()] + [line.time for line in self.log[-1:]])

    @property
    def notable_events(self) -> list[LogLine]:
        """Starts, stops, failures, restarts and alarms."""
        return [line for line in self.log if line.level != "info" or line.event in RUN_STATES]

    def versions(self) -> dict[str, list[tuple[float, int]]]:
        """By process: when the driver first saw each version of the weights, in seconds since the start of the run."""
        found: dict[str, list[tuple[float, int]]] = defaultdict(list)
        for line in self.log:
            if line.version is not None and line.event in ("weights_published", "weights_loaded"):
                name = "learner" if line.role == "learner" else f"actor {line.index}"
                found[name].append((line.time - self.began_at, line.version))
        return dict(found)


def gather(run: Path) -> Report:
    """Read a run. UserError: nothing was trained yet, the metrics are damaged, `run` is no run folder, or another
    version of this program wrote its settings. OSError: a file cannot be read.
    """
    settings = read_recipe(run_config(run))
    metrics = read_metrics(run)
    if not metrics:
        raise UserError(f"{run} has no data yet: no step was logged; try again once training has begun")
    environment = run / ENVIRONMENT_FILE
    report = Report(
        name=run.resolve().name,
        made_at=time.time(),
        settings=settings,
        environment=environment.read_text(encoding="utf-8") if environment.is_file() else "",
        metrics=metrics,
        log=list(_read_log(run / LOG_FILE)),
        samples={path.stem: path.read_text(encoding="utf-8") for path in sorted((run / SAMPLES_FOLDER).glob("*.txt"))},
    )
    from_data = {stage.name for stage in settings.stages if not stage.objective.needs_rollouts}
    with _noted(report, "evaluation"):
        report.evaluation = evaluation_table(run, from_data)
    if (run / BUFFER_FOLDER).is_dir():
        with _noted(report, "replay buffer"):
            snapshot = read_buffer(run / BUFFER_FOLDER)
            if snapshot.trajectories.num_rows > 0:
                report.rollouts = sample_rollouts(snapshot, load_run_tokenizer(run, snapshot.contract))
    return report


def read_metrics(run: Path) -> dict[str, StageMetrics]:
    """The stages in the order in which they began; none without a line. Raises as `metrics_table`."""
    table = metrics_table(run)
    return {stage: _stage_metrics(table, stage) for stage in pc.unique(table.column("stage")).to_pylist()}


def _stage_metrics(table: pa.Table, stage: str) -> StageMetrics:
    rows = table.filter(pc.equal(table.column("stage"), stage))
    values = {
        name: rows.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False)
        for name in rows.column_names
        if name not in KEYS.names and rows.column(name).null_count < len(rows)
    }
    values = {name: np.where(np.isfinite(column), column, np.nan) for name, column in values.items()}
    return StageMetrics(rows.column("step").to_numpy(), rows.column("time").to_numpy(), values)


def _read_log(path: Path) -> Iterator[LogLine]:
    """Lines that a crash left incomplete are skipped."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield LogLine.model_validate_json(line)
            except ValidationError:
                continue


@contextmanager
def _noted(report: Report, what: str) -> Iterator[None]:
    """Turn an error while reading a part of the run folder into a note; the page shows the rest."""
    try:
        yield
    except (ValueError, OSError) as error:
        report.notes.append(f"The {what} cannot be shown: {error}")


def sample_rollouts(snapshot: BufferSnapshot, tokenizer: PreTrainedTokenizerBase) -> list[Rollout]:
    """Rollouts at even distances, oldest first; of each group the first with a deletion, or the first."""
    stored = snapshot.trajectories
    ours = np.flatnonzero(pc.equal(stored.column("source"), "policy").to_numpy())
    ours = ours[np.argsort(stored.column("created_at").cast(pa.int64()).to_numpy()[ours], kind="stable")]
    # File by file, since the actions of all may be many.
    chunks = [np.zeros(0, dtype=np.bool_)]
    for actions in stored.column("actions").chunks:
        is_backspace = pc.list_flatten(actions).to_numpy() == snapshot.contract.backspace_id
        chunks.append(np.isin(np.arange(len(actions)), pc.list_parent_indices(actions).to_numpy()[is_backspace]))
    deletes = np.concatenate(chunks)
    chosen: list[Rollout] = []
    num_actions = 0
    for stretch in np.array_split(ours, min(MAX_ROLLOUTS, len(ours))) if len(ours) else ():
        index = int(stretch[np.argmax(deletes[stretch])])
        row = stored.slice(index, 1).combine_chunks().to_batches()[0]
        num_actions += len(row.column("actions")[0])
        if chosen and num_actions > MAX_ACTIONS:
            break
        chosen.append(read_rollout(row, tokenizer, snapshot.contract))
    return chosen


def read_rollout(row: pa.RecordBatch, tokenizer: PreTrainedTokenizerBase, contract: TokenContract) -> Rollout:
    """The trajectory of a batch of one policy row, which the buffer has validated."""
    trajectory, values = TrajectoryArrays.from_batch(row), row.to_pylist()[0]
    text, actions = list(values["prompt_ids"]), []
    columns = (values["actions"], trajectory.executed.tolist(), values["logprobs"], values["policy_version"])
    special: dict[int, ActionKind] = dict.fromkeys(contract.eos_ids, "end")
    special[contract.backspace_id] = "backspace"
    for action, written, logprob, version in zip(*columns, strict=True):
        kind, shown = special.get(written, "write"), ""
        if kind == "write":
            shown = continuation(tokenizer, text[-CONTEXT_TOKENS:], [written])
            text.append(written)
        elif kind == "backspace":
            text.pop()
        actions.append(Action(kind, shown, written != action, float(f"{logprob:.4g}"), version))
    return Rollout(
        values["actor"],
        values["created_at"].timestamp(),
        decode(tokenizer, values["prompt_ids"]),
        values["finish_reason"],
        values["reward"],
        tuple(actions),
    )
