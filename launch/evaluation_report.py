"""An evaluation as tables and rollouts on a terminal, and as files of the run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from launch.answer_metrics import Estimate
from launch.evaluation import GREEDY, RECOVERY, SAMPLED, CheckpointResult, Evaluation, ShownRollout

EVALUATION_FILE = "evaluation.json"
SAMPLES_FOLDER = "samples"

# (heading, group, metric, is a share). The line breaks of the headings keep the table within 80 columns.
_ANSWER_COLUMNS = (
    ("right\ngreedy", GREEDY, "accuracy", True),
    ("right\nsampled", SAMPLED, "accuracy", True),
    ("recov-\nered", RECOVERY, "recovery", True),
    ("back-\nspaces", SAMPLED, "backspace_rate", True),
    ("wrong\nundone", SAMPLED, "wrong_taken_back", True),
    ("right\nundone", SAMPLED, "right_taken_back", True),
    ("actions/\nanswer", SAMPLED, "actions_per_answer", False),
)
_TEXT_COLUMNS = (
    ("back-\nspaces", SAMPLED, "backspace_rate", True),
    ("actions/\nfinal token", SAMPLED, "actions_per_final_token", False),
    ("tokens/\ntext", SAMPLED, "tokens_per_text", False),
    ("distinct\n4-grams", SAMPLED, "distinct_4grams", True),
    ("cut off", SAMPLED, "truncated_rate", True),
)
_ANSWER_CAPTION = (
    "% ± standard error. right: share of right answers; recovered: right answers after a planted wrong first\n"
    "token; backspaces: share of the actions; undone: share of the wrong (right) tokens taken back.\n"
    "The last four columns are of the sampled rollouts."
)
_TEXT_CAPTION = "± standard error, rollouts sampled at temperature 1. cut off: ended by a limit, not by the model."
_GROUP_TITLES = {SAMPLED: "sampled at temperature 1", RECOVERY: "after a planted wrong first token, greedy"}


def render_evaluation(evaluation: Evaluation) -> RenderableType:
    """The table of an evaluation, one row per checkpoint."""
    columns = _ANSWER_COLUMNS if evaluation.has_answers else _TEXT_COLUMNS
    title = f"{evaluation.num_examples} held-out examples of {evaluation.task}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1), header_style="dim")
    table.add_column("stage", vertical="bottom")
    for heading, *_ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for result in evaluation.results:
        cells = [format_estimate(result.metrics[group][name], is_share) for _, group, name, is_share in columns]
        table.add_row(Text(result.label, "bold"), *cells)
    caption = _ANSWER_CAPTION if evaluation.has_answers else _TEXT_CAPTION
    return Group(table, Text(caption, style="dim"))


def render_rollouts(result: CheckpointResult) -> RenderableType:
    """The rollouts of one checkpoint, deleted tokens struck through."""
    parts: list[RenderableType] = []
    for group, rollouts in _by_group(result.rollouts):
        parts.append(Text.assemble((result.label, "bold"), f", {_GROUP_TITLES[group]}"))
        for rollout in rollouts:
            mark = {None: Text(""), True: Text("✓ ", "green"), False: Text("✗ ", "red")}[rollout.is_correct]
            parts.append(Padding(mark + rollout.view.rich(), (0, 0, 0, 2)))
    return Group(*parts)


def show_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print table and rollouts."""
    console.print(render_evaluation(evaluation))
    for result in evaluation.results:
        if result.rollouts:
            console.print()
            console.print(render_rollouts(result))


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


def format_estimate(number: Estimate, is_share: bool) -> str:
    """`87.4 ±1.5` (per cent for a share); a dash where nothing could be measured."""
    if number.value is None:
        return "-"
    scale = 100.0 if is_share else 1.0
    digits = 1 if is_share else 2
    error = "" if number.standard_error is None else f" ±{scale * number.standard_error:.{digits}f}"
    return f"{scale * number.value:.{digits}f}{error}"


def _by_group(rollouts: Sequence[ShownRollout]) -> Iterator[tuple[str, list[ShownRollout]]]:
    for group in _GROUP_TITLES:
        if members := [rollout for rollout in rollouts if rollout.group == group]:
            yield group, members
