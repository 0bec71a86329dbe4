"""The project from Python: train, evaluate and generate, and read what a run has made (docs/api.md).

The command line calls the same functions. They print nothing unless they get a console, and import torch, Ray and vLLM
only where they need them. `UserError`: something that the caller can mend, said before anything expensive starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from launch.errors import RunFailedError, RunStoppedError, UserError, setting_up
from launch.run_folder.checkpoints import RunCheckpoint, checkpoint_of, list_checkpoints, run_of
from launch.run_folder.folder import BUFFER_FOLDER, check_run_name, is_run_folder, open_run_folder
from launch.settings.recipe import Recipe, read_recipe
from launch.settings.run import RunSettings
from launch.stop_signals import stop_signals_interrupt

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    from launch.evaluation.results import Evaluation
    from launch.generation import Rollout
    from launch.monitoring.live_view import RunView

__all__ = [
    "Run",
    "RunFailedError",
    "RunStoppedError",
    "UserError",
    "evaluate",
    "generate",
    "open_run",
    "resume",
    "train",
]


QUIET = Console(quiet=True, force_terminal=False)


@dataclass(frozen=True)
class Run:
    """A run, live or finished. What its methods give is of the moment of the call."""

    folder: Path
    settings: RunSettings

    def metrics(self, stage: str | None = None) -> pa.Table:
        """A row per step, of all stages or of one: `time` (seconds since 1970), `stage`, `step`, and a column for each
        metric (docs/metrics.md), null where a step has no such metric.
        """
        import pyarrow.compute as pc

        from launch.run_folder.metrics import metrics_table

        table = metrics_table(self.folder)
        if stage is None:
            return table
        if stage not in [each.name for each in self.settings.stages]:
            names = ", ".join(each.name for each in self.settings.stages)
            raise UserError(f"run {self.folder.name} has no stage {stage!r}; its stages are: {names}")
        return table.filter(pc.equal(table.column("stage"), stage))

    def buffer(self) -> pa.Table:
        """Every stored trajectory (docs/buffer.md has the columns), with `shard`, `live` and `times_sampled`. The
        columns are the mapped files. UserError: the run has no replay buffer (yet), or it cannot be read.
        """
        from buffer.reading.snapshot import read_buffer
        from launch.queries.query import catalog_image

        with setting_up():
            return read_buffer(self.folder / BUFFER_FOLDER, partial(catalog_image, self.folder)).trajectories

    def query(self, sql: str) -> pa.Table:
        """The result of one SELECT, as from `sequencematch query` (docs/buffer.md has the tables), which also has the
        trajectories as text. UserError: as `buffer`, or DuckDB refuses the query.
        """
        from launch.queries.database import open_database

        with setting_up():
            database = open_database(self.folder)
            try:
                return database.run(lambda: database.select(sql).to_arrow_table())
            finally:
                database.close()

    def dataset(self) -> Dataset:
        """The table of `buffer` as a Hugging Face data set, which shares its memory."""
        from datasets import Dataset
        from datasets.fingerprint import generate_random_fingerprint
        from datasets.table import InMemoryTable

        # Without a fingerprint, it would read all rows for one.
        return Dataset(InMemoryTable(self.buffer()), fingerprint=generate_random_fingerprint())

    def checkpoints(self) -> list[RunCheckpoint]:
        """Every checkpoint, in the order of the stages and their steps."""
        return list_checkpoints(self.settings, self.folder)

    @property
    def result(self) -> Path:
        """Folder of the newest checkpoint of the stage that the recipe calls the result (`result`, by default the last
        stage), fetched if it lies elsewhere. UserError: there is none yet.
        """
        return checkpoint_of(self.folder)

    @property
    def evaluation(self) -> Evaluation | None:
        """The evaluation at the end of the run, without its rollouts; None if there is none."""
        from launch.evaluation.results import read_evaluation

        with setting_up():
            return read_evaluation(self.folder)

    def status(self) -> RunView:
        """What the processes of a live run say of themselves. UserError: the run is not live."""
        from launch.run.control import run_status

        return run_status(self.folder)


def open_run(folder: Path | str) -> Run:
    """A run that was started by anybody, live or finished; UserError where `folder` is not a run folder."""
    return Run(*open_run_folder(Path(folder)))


def train(
    recipe: Recipe,
    overrides: Sequence[str] = (),
    *,
    name: str | None = None,
    resume_if_exists: bool = False,
    evaluate: bool = True,
    console: Console = QUIET,
) -> Run:
    """Train a new run to its end, and evaluate it. Ray is started for the run, or joined (`cluster.address`).

    recipe: a YAML file, what such a file holds, or settings. overrides: such as `actors.count=2`. name: of the run
    folder below `runs_folder`. resume_if_exists: go on with the run of that name if there is one. console: for the live
    display and the evaluation.

    In the main thread a stop signal (Ctrl-C, SIGTERM) ends the run after the current step, with a checkpoint; elsewhere
    nothing does, since Python gives signals to the main thread.

    Raises:
        UserError: recipe, machine or cluster do not allow the run. RunFailedError: it could not go on.
        RunStoppedError: a signal stopped it; `resume` goes on.
    """
    if resume_if_exists and name is None:
        raise UserError("resume_if_exists finds the run by its name: give name too")
    from launch.training import resume_run, start_run

    with stop_signals_interrupt():
        with setting_up():
            settings = read_recipe(recipe, overrides)
        chosen = None if name is None else check_run_name(name)
        folder = Path(settings.runs_folder) / (chosen or "")
        if resume_if_exists and is_run_folder(folder):
            resume_run(folder, console, evaluate, recipe=settings)
        else:
            folder = start_run(settings, chosen, console, evaluate)
    return open_run(folder)


def resume(
    folder: Path | str, overrides: Sequence[str] = (), *, evaluate: bool = True, console: Console = QUIET
) -> Run:
    """Train the stages of a run that are not done yet, from its newest checkpoints, and evaluate it; nothing where all
    is done. overrides: settings that change from here on (docs/resume.md says which may). Else as `train`.
    """
    from launch.training import resume_run

    with stop_signals_interrupt():
        resume_run(Path(folder), console, evaluate, overrides=overrides)
    return open_run(folder)


def evaluate(
    checkpoints: Path | str | Sequence[Path | str],
    overrides: Sequence[str] = (),
    *,
    against: Path | str | None = None,
    task_from: Path | str | None = None,
    output: Path | str | None = None,
    console: Console = QUIET,
) -> Evaluation:
    """Measure checkpoints of one model, or the results of runs, on the held-out examples of their task, by an engine in
    this process. UserError: they do not fit together, or the machine lacks what an engine needs.

    overrides: of the settings of the run, such as `evaluation.examples=200`. against: baseline of the differences, by
    default the first. task_from: run or recipe with the task, by default the run above the first checkpoint. output:
    folder for results and rollouts; by default rollouts are kept in that run.
    """
    from launch.commands import provide_folder
    from launch.evaluation.report import write_evaluation
    from launch.evaluation.results import EVALUATION_FOLDER
    from launch.evaluation.rollouts import ROLLOUTS_FOLDER
    from launch.evaluation.run import evaluate as evaluate_targets
    from launch.evaluation.run import labeled, settings_for

    given = [Path(each) for each in ([checkpoints] if isinstance(checkpoints, Path | str) else checkpoints)]
    if not given:
        raise UserError("name at least one checkpoint or run to evaluate")
    with setting_up():
        settings = settings_for(given[0], None if task_from is None else Path(task_from), overrides)
        run = run_of(given[0])
        keep_in = Path(output) if output is not None else run and run / EVALUATION_FOLDER
        found = [checkpoint_of(each) for each in given]
        if against is not None:
            baseline = checkpoint_of(Path(against))
            found = [baseline, *(each for each in found if each.resolve() != baseline.resolve())]
        targets = labeled(found)
        for folder in [] if keep_in is None else [keep_in, keep_in / ROLLOUTS_FOLDER]:
            provide_folder(folder, "keep the rollouts elsewhere with --output FOLDER")
    if keep_in is None:
        console.print("rollouts are not kept, so an interruption loses them: give --output FOLDER", style="dim")
    evaluation = evaluate_targets(targets, settings, console, keep_in)
    if output is not None:
        write_evaluation(evaluation, Path(output))
    return evaluation


def generate(
    source: Path | str,
    prompts: str | Sequence[str],
    *,
    stage: str | None = None,
    count: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    seed: int = 0,
    console: Console = QUIET,
) -> list[Rollout]:
    """`count` rollouts of each prompt, prompt by prompt, by one engine that runs in this process.

    source: a checkpoint, or a run: its result, or its newest checkpoint of `stage`. temperature: 0 is greedy.
    max_new_tokens: longest answer, in tokens that remain; the model's context bounds it too.

    UserError: the source is no model with a backspace action, it has no token for a prompt, or the machine lacks what
    an engine needs.
    """
    from actors.engine.checks import check_machine
    from launch.generation import encode_prompt, open_checkpoint
    from launch.generation import generate as generate_rollouts

    if count < 1 or max_new_tokens < 1 or temperature < 0.0:
        raise UserError("generate needs count >= 1, max_new_tokens >= 1 and temperature >= 0")
    with setting_up():
        check_machine(enforce_eager=True)
        opened = open_checkpoint(checkpoint_of(Path(source), stage))
        encoded = [encode_prompt(opened, prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
    if not encoded:
        return []
    return generate_rollouts(
        opened,
        encoded,
        count=count,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        console=console,
    )
