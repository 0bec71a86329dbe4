"""An evaluation as tables of at most 80 columns and rollouts on a terminal, and as files of the run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from buffer.disk import writing_to
from launch.evaluation.results import EVALUATION_FILE, HELD_OUT, Change, CheckpointResult, Evaluation, Metrics
from launch.generation import rollout_text
from launch.settings.evaluation import GREEDY, RECOVERY, SAMPLED
from launch.statistics import Estimate

SAMPLES_FOLDER = "samples"

_ENDLESS = 1_000_000  # columns of a file, whose lines are not wrapped

_GROUP_TITLES = {
    SAMPLED: "sampled at temperature 1 (those that take tokens back first)",
    RECOVERY: "after a forced wrong first token",
}


@dataclass(frozen=True)
class _Column:
    """heading: its line breaks keep the table within 80 columns. group: None is that of the row."""

    heading: str
    metric: str
    group: str | None = None
    with_error: bool = True

    @property
    def is_fraction(self) -> bool:
        """Whether it is shown in per cent."""
        return "%" in self.heading

    def number(self, metrics: Metrics, group: str) -> Estimate | None:
        """Its number in a row of this group."""
        return metrics.get(self.group or group, {}).get(self.metric)


@dataclass(frozen=True)
class _Table:
    """A row for each checkpoint, or for each of its ways to decode. Columns without any number are left out."""

    caption: str
    columns: tuple[_Column, ...]
    by_decoding: bool = False


_RECOVERED = _Column("recovered\n%", "recovery", RECOVERY)
_DIVERSITY = _Column("diversity\n%", "diversity")
_BACKSPACES = _Column("back-\nspaces %", "backspace_rate")
_RIGHT = _Column("right\ngreedy %", "accuracy", GREEDY), _Column("right\nsampled %", "accuracy", SAMPLED)
_PERPLEXITY = (
    _Column("perplexity", "perplexity", HELD_OUT),
    _Column("without\nbackspace", "perplexity_without_backspace", HELD_OUT),
)
_LOOPS = (
    _Column("re-\nwritten %", "rewritten_rate", with_error=False),
    _Column("longest\nrun", "longest_rewrite_run", with_error=False),
    _Column("at the\nbound %", "max_actions_rate", with_error=False),
)
_LOOPS_CAPTION = (
    "rewritten: backspaces after which the same token is written again at once; longest run of these; at the bound: "
    "ended by the bound on actions. banned, allowed: tokens that were taken back are, contrary to what is usual."
)
_ANSWER_TABLES: tuple[_Table, ...] = (
    _Table(
        "± standard error. recovered: right after a forced wrong first token; undone: share of the wrong (right) "
        "tokens that were taken back. The last four columns are of the sampled answers.",
        (
            *_RIGHT,
            _RECOVERED,
            _Column("back-\nspaces\n%", "backspace_rate", SAMPLED, with_error=False),
            _Column("wrong\nundone\n%", "wrong_tokens_deleted", SAMPLED, with_error=False),
            _Column("right\nundone\n%", "correct_tokens_deleted", SAMPLED, with_error=False),
            _Column("actions\nper\nanswer", "actions_per_answer", SAMPLED, with_error=False),
        ),
    ),
    _Table(
        _LOOPS_CAPTION,
        (_Column("right\n%", "accuracy"), _Column("recovered\n%", "recovery"), _BACKSPACES, *_LOOPS),
        by_decoding=True,
    ),
)
_TEXT_TABLES: tuple[_Table, ...] = (
    _Table(
        "± standard error; sampled at temperature 1 where no row says otherwise; recovery: after a forced wrong first "
        "token. self-BLEU: high where all texts are alike; cut off: ended by a limit, not by the model.",
        (
            _Column("MAUVE\n%", "mauve"),
            _DIVERSITY,
            _Column("self-BLEU\n%", "self_bleu"),
            _Column("2-gram\nbits", "entropy_2gram_bits", with_error=False),
            _Column("tokens\nper text", "tokens_per_text", with_error=False),
            _Column("cut off\n%", "truncated_rate", with_error=False),
        ),
        by_decoding=True,
    ),
    _Table(
        _LOOPS_CAPTION,
        (_BACKSPACES, _Column("actions per\nfinal token", "actions_per_final_token"), *_LOOPS),
        by_decoding=True,
    ),
    _Table(
        "recovered: texts whose forced wrong first token is gone at the end. The other columns are of the held-out "
        "texts, where what backspace gets is lost, or not (without backspace).",
        (_RECOVERED, *_PERPLEXITY, _Column("backspace\nprob. %", "backspace_prob", HELD_OUT)),
    ),
)
_DIFFERENCES = {True: (*_RIGHT, _RECOVERED), False: (_DIVERSITY, _BACKSPACES, _RECOVERED, *_PERPLEXITY)}
"""Columns of the differences to the first checkpoint, by whether there are right answers."""


def render_evaluation(evaluation: Evaluation) -> RenderableType:
    """The tables of an evaluation, and what it left out."""
    title = f"{evaluation.num_examples} held-out examples of {evaluation.task}"
    tables = _ANSWER_TABLES if evaluation.has_answers else _TEXT_TABLES
    usual = {SAMPLED, GREEDY, RECOVERY}
    if evaluation.has_answers and all(result.metrics.keys() <= usual for result in evaluation.checkpoints):
        tables = tables[:1]
    parts: list[RenderableType] = [Text(title, "bold")]
    for each in tables:
        rows = list(_rows(evaluation.checkpoints, each.by_decoding))
        columns = [column for column in each.columns if any(column.number(*row[1:]) for row in rows)]
        table = _table("stage", columns)
        for label, metrics, group in rows:
            cells = [_text(column.number(metrics, group), column) for column in columns]
            table.add_row(label, *(cells if metrics else []))
        parts += [table, Text(f"{each.caption}\n", "dim")]
    if len(evaluation.checkpoints) > 1:
        columns = list(_DIFFERENCES[evaluation.has_answers])
        table = _table(f"minus {evaluation.baseline}", columns)
        for result in evaluation.checkpoints[1:]:
            changes = (result.differences.get(column.group or SAMPLED, {}).get(column.metric) for column in columns)
            table.add_row(Text(result.label, "bold"), *map(_change_text, changes, columns))
        caption = (
            f"differences to {evaluation.baseline} on the same examples; ~ within noise (the 95 % interval holds 0)"
        )
        parts += [table, Text(caption, "dim")]
    parts += [Text(f"left out: {what} ({why})", "dim") for what, why in evaluation.left_out.items()]
    return Group(*parts)


def _rows(results: Sequence[CheckpointResult], by_decoding: bool) -> Iterator[tuple[Text, Metrics, str]]:
    """Label, numbers and default group of each row. Several decodings stand below the name of their checkpoint."""
    for result in results:
        groups = [group for group in result.metrics if group != HELD_OUT] if by_decoding else [SAMPLED]
        several = len(groups) > 1
        if several:
            yield Text(result.label, "bold"), {}, ""
        for group in groups:
            yield Text(f"  {group}") if several else Text(result.label, "bold"), result.metrics, group


def _change_text(change: Change | None, column: _Column) -> Text:
    if change is None or change.value is None:
        return Text("-")
    mark = {True: "~ ", False: "", None: "? "}[change.within_noise]
    return Text(f"{mark}{'+' if change.value > 0 else ''}{_text(change, column)}", "dim" if mark else "")


def _text(number: Estimate | None, column: _Column) -> str:
    """`87.4 ±1.5` (per cent for a share); a dash where nothing could be measured."""
    if number is None or number.value is None:
        return "-"
    scale, digits = (100.0, 1) if column.is_fraction else (1.0, 2)
    error = number.standard_error if column.with_error else None
    return f"{scale * number.value:.{digits}f}" + ("" if error is None else f" ±{scale * error:.{digits}f}")


def _table(first: str, columns: Sequence[_Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column(first, vertical="bottom", overflow="fold")  # a long label takes more lines, a number is never cut
    for column in columns:
        table.add_column(column.heading, justify="right", vertical="bottom", no_wrap=True)
    return table


def show_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print the tables, then the rollouts."""
    console.print(render_evaluation(evaluation))
    for result in evaluation.checkpoints:
        _show_rollouts(result, console)


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write `evaluation.json`, and the rollouts of each checkpoint in `samples/<label>.txt`, into a folder."""
    with writing_to(folder):
        text = json.dumps(evaluation.to_json(), indent=2)
        (folder / EVALUATION_FILE).write_text(f"{text}\n", encoding="utf-8")
        samples = folder / SAMPLES_FOLDER
        samples.mkdir(exist_ok=True)
        for result in evaluation.checkpoints:
            name = result.label.replace("/", "-")  # of a stage and a step
            with (samples / f"{name}.txt").open("w", encoding="utf-8") as file:
                file.write(f"checkpoint: {result.checkpoint}\n[-x-] was taken back, {{x}} was forced, … was cut off\n")
                _show_rollouts(result, Console(file=file, force_terminal=False, width=_ENDLESS))


def _show_rollouts(result: CheckpointResult, console: Console) -> None:
    """The rollouts with their deletions, in the way that `console` can show them."""
    for group, title in _GROUP_TITLES.items():
        if rollouts := [rollout for rollout in result.rollouts if rollout.group == group]:
            console.print(Text.assemble("\n", (result.label, "bold"), f", {title}"))
            for rollout in rollouts:
                mark = {None: Text("  "), True: Text("  ✓ ", "green"), False: Text("  ✗ ", "red")}[rollout.is_correct]
                console.print(mark + rollout_text(rollout.view, console))
