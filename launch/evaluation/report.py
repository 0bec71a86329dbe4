"""An evaluation as tables and rollouts on a terminal, and as files of the run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from launch.evaluation.estimates import Estimate
from launch.evaluation.results import GREEDY, RECOVERY, SAMPLED, CheckpointResult, Evaluation, ShownRollout
from launch.generation import rollout_text

EVALUATION_FILE = "evaluation.json"
SAMPLES_FOLDER = "samples"


@dataclass(frozen=True)
class _Column:
    heading: str  # its line breaks keep the table within 80 columns
    group: str
    metric: str
    is_share: bool = True
    with_error: bool = False


_ANSWER_COLUMNS = (
    _Column("right\ngreedy %", GREEDY, "accuracy", with_error=True),
    _Column("right\nsampled %", SAMPLED, "accuracy", with_error=True),
    _Column("recovered\n%", RECOVERY, "recovery", with_error=True),
    _Column("back-\nspaces\n%", SAMPLED, "backspace_rate"),
    _Column("wrong\nundone\n%", SAMPLED, "wrong_taken_back"),
    _Column("right\nundone\n%", SAMPLED, "right_taken_back"),
    _Column("actions\nper\nanswer", SAMPLED, "actions_per_answer", is_share=False),
)
_TEXT_COLUMNS = (
    _Column("back-\nspaces %", SAMPLED, "backspace_rate", with_error=True),
    _Column("actions per\nfinal token", SAMPLED, "actions_per_final_token", is_share=False, with_error=True),
    _Column("tokens\nper text", SAMPLED, "tokens_per_text", is_share=False, with_error=True),
    _Column("distinct\n4-grams %", SAMPLED, "distinct_4grams", with_error=True),
    _Column("cut off\n%", SAMPLED, "truncated_rate", with_error=True),
)
_ANSWER_CAPTION = (
    "± standard error. right: right answers; recovered: right answers after a planted wrong first token; backspaces: "
    "share of the actions; undone: share of the wrong (right) tokens that were taken back. The last four columns are "
    "of the sampled answers."
)
_TEXT_CAPTION = "± standard error; sampled at temperature 1. cut off: ended by a limit, not by the model."
_GROUP_TITLES = {
    SAMPLED: "sampled at temperature 1 (those that take tokens back first)",
    RECOVERY: "after a planted wrong first token, greedy",
}


def render_evaluation(evaluation: Evaluation) -> RenderableType:
    """The table of an evaluation, one row per checkpoint."""
    columns = _ANSWER_COLUMNS if evaluation.has_answers else _TEXT_COLUMNS
    title = f"{evaluation.num_examples} held-out examples of {evaluation.task}"
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("stage", vertical="bottom", no_wrap=True)
    for column in columns:
        table.add_column(column.heading, justify="right", vertical="bottom", no_wrap=True)
    for result in evaluation.results:
        cells = [
            format_estimate(result.metrics[column.group][column.metric], column.is_share, column.with_error)
            for column in columns
        ]
        table.add_row(Text(result.label, "bold"), *cells)
    caption = _ANSWER_CAPTION if evaluation.has_answers else _TEXT_CAPTION
    return Group(Text(title, "bold"), table, Text(caption, "dim"))


def render_rollouts(result: CheckpointResult, console: Console) -> RenderableType:
    """The rollouts of one checkpoint with their deletions, in the way that `console` can show them."""
    parts: list[RenderableType] = []
    for group, rollouts in _by_group(result.rollouts):
        parts.append(Text.assemble((result.label, "bold"), f", {_GROUP_TITLES[group]}"))
        for rollout in rollouts:
            mark = {None: Text(""), True: Text("✓ ", "green"), False: Text("✗ ", "red")}[rollout.is_correct]
            parts.append(Padding(mark + rollout_text(rollout.view, console), (0, 0, 0, 2), expand=False))
    return Group(*parts)


def show_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print table and rollouts."""
    console.print(render_evaluation(evaluation))
    for result in evaluation.results:
        if result.rollouts:
            console.print()
            console.print(render_rollouts(result, console))


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write `evaluation.json` and `samples/<label>.txt` into a run folder."""
    text = json.dumps(evaluation.to_json(), indent=2)
    (folder / EVALUATION_FILE).write_text(text + "\n", encoding="utf-8")
    samples = folder / SAMPLES_FOLDER
    samples.mkdir(exist_ok=True)
    for result in evaluation.results:
        (samples / f"{result.label}.txt").write_text(samples_text(result), encoding="utf-8")


def samples_text(result: CheckpointResult) -> str:
    """The rollouts of one checkpoint as plain text; `launch.rollout_view` explains the marks."""
    lines = [f"checkpoint: {result.checkpoint}", "[-x-] was taken back, {x} was planted, … was cut off"]
    for group, rollouts in _by_group(result.rollouts):
        lines += ["", f"## {_GROUP_TITLES[group]}"]
        for rollout in rollouts:
            mark = {None: "", True: "   (right)", False: "   (wrong)"}[rollout.is_correct]
            lines += [f"> {rollout.view.prompt}", f"{rollout.view.plain()}{mark}"]
    return "\n".join(lines) + "\n"


def format_estimate(number: Estimate, is_share: bool, with_error: bool) -> str:
    """`87.4 ±1.5` (per cent for a share); a dash where nothing could be measured."""
    if number.value is None:
        return "-"
    scale, digits = (100.0, 1) if is_share else (1.0, 2)
    error = f" ±{scale * number.standard_error:.{digits}f}" if with_error and number.standard_error is not None else ""
    return f"{scale * number.value:.{digits}f}{error}"


def _by_group(rollouts: Sequence[ShownRollout]) -> Iterator[tuple[str, list[ShownRollout]]]:
    for group in _GROUP_TITLES:
        if members := [rollout for rollout in rollouts if rollout.group == group]:
            yield group, members
