"""The numbers of an evaluation as tables of at most 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from launch.evaluation.results import HELD_OUT, CheckpointResult, Evaluation
from launch.settings.decodings import GREEDY, RECOVERY, SAMPLED
from launch.statistics import Difference, Estimate


@dataclass(frozen=True)
class _Column:
    """heading: its line breaks keep the table within 80 columns. group: None is that of the row."""

    heading: str
    metric: str
    group: str | None = None
    is_share: bool = True
    with_error: bool = False

    def number(self, result: CheckpointResult, group: str | None = None) -> Estimate | None:
        return result.metrics.get(self.group or group or SAMPLED, {}).get(self.metric)


_RECOVERED = _Column("recovered\n%", "recovery", RECOVERY, with_error=True)
_ANSWERS = (
    _Column("right\ngreedy %", "accuracy", GREEDY, with_error=True),
    _Column("right\nsampled %", "accuracy", SAMPLED, with_error=True),
    _RECOVERED,
    _Column("back-\nspaces\n%", "backspace_rate", SAMPLED),
    _Column("wrong\nundone\n%", "wrong_taken_back", SAMPLED),
    _Column("right\nundone\n%", "right_taken_back", SAMPLED),
    _Column("actions\nper\nanswer", "actions_per_answer", SAMPLED, is_share=False),
)
_ANSWER_DECODINGS = (
    _Column("right\n%", "accuracy", with_error=True),
    _Column("recovered\n%", "recovery", with_error=True),
    _Column("back-\nspaces\n%", "backspace_rate"),
    _Column("re-\nwritten\n%", "rewritten_rate"),
    _Column("at the\nbound %", "max_actions_rate"),
)
_TEXTS = (
    _Column("MAUVE\n%", "mauve", with_error=True),
    _Column("diversity\n%", "diversity", with_error=True),
    _Column("self-BLEU\n%", "self_bleu", with_error=True),
    _Column("2-gram\nbits", "entropy_2gram_bits", is_share=False),
    _Column("tokens\nper text", "tokens_per_text", is_share=False),
    _Column("cut off\n%", "truncated_rate"),
)
_EDITING = (
    _Column("back-\nspaces %", "backspace_rate", with_error=True),
    _Column("actions per\nfinal token", "actions_per_final_token", is_share=False, with_error=True),
    _Column("re-\nwritten %", "rewritten_rate"),
    _Column("longest\nrun", "longest_rewrite_run", is_share=False),
    _Column("at the\nbound %", "max_actions_rate"),
)
_TEXT_CHECKPOINTS = (
    _RECOVERED,
    _Column("perplexity", "perplexity", HELD_OUT, is_share=False, with_error=True),
    _Column("without\nbackspace", "perplexity_without_backspace", HELD_OUT, is_share=False, with_error=True),
    _Column("backspace\nprob. %", "backspace_prob", HELD_OUT, with_error=True),
)
_ANSWER_CAPTION = (
    "± standard error. right: right answers; recovered: right answers after a forced wrong first token; backspaces: "
    "share of the actions; undone: share of the wrong (right) tokens that were taken back. The last four columns are "
    "of the sampled answers."
)
_EDITING_CAPTION = (
    "rewritten: backspaces after which the same token is written again at once; longest run of these; at the bound: "
    "ended by the bound on actions. banned (allowed): like the row without the word, but tokens that were taken back "
    "are banned (allowed) at their text."
)
_TEXT_CAPTION = (
    "± standard error; sampled at temperature 1 where no row says otherwise; recovery: after a forced wrong first "
    "token. diversity: product of distinct 2-, 3- and 4-grams; self-BLEU: high where all texts are alike; cut off: "
    "ended by a limit, not by the model."
)
_TEXT_CHECKPOINT_CAPTION = (
    "recovered: texts that were made to begin with a wrong token, and have it no more at the end. The other columns "
    "are of the held-out texts, per token: what backspace gets is lost; without backspace: renormalized; backspace "
    "prob.: before a token, which it would take back though it is right."
)


def answer_tables(evaluation: Evaluation) -> list[RenderableType]:
    """One row per checkpoint; and of further decodings, if there are any, one per decoding."""
    tables: list[RenderableType] = [_by_checkpoint(evaluation, _ANSWERS), Text(_ANSWER_CAPTION, "dim")]
    known = {SAMPLED, GREEDY, RECOVERY}
    if any(set(result.metrics) - known for result in evaluation.results):
        tables += [Text(""), _by_decoding(evaluation, _ANSWER_DECODINGS), Text(_EDITING_CAPTION, "dim")]
    return tables


def text_tables(evaluation: Evaluation) -> list[RenderableType]:
    """What the texts are like, what taking back costs, and how well held-out texts are predicted."""
    has_mauve = any("mauve" in numbers for numbers in evaluation.results[0].metrics.values())
    return [
        _by_decoding(evaluation, _TEXTS if has_mauve else _TEXTS[1:]),
        Text(_TEXT_CAPTION, "dim"),
        Text(""),
        _by_decoding(evaluation, _EDITING),
        Text(_EDITING_CAPTION, "dim"),
        Text(""),
        _by_checkpoint(evaluation, _TEXT_CHECKPOINTS),
        Text(_TEXT_CHECKPOINT_CAPTION, "dim"),
    ]


def difference_table(evaluation: Evaluation) -> list[RenderableType]:
    """Each checkpoint minus the first, in the numbers of examples that matter most."""
    baseline = evaluation.results[0]
    columns: Sequence[_Column]
    if evaluation.has_answers:
        columns = [column for column in _ANSWERS if column.with_error]
    else:
        columns = (_TEXTS[1], _EDITING[0], *_TEXT_CHECKPOINTS[:3])
    changes = [(result, result.differences(baseline)) for result in evaluation.results[1:]]
    table = _table("minus " + baseline.label, columns)
    for result, found in changes:
        numbers = [found.get(column.group or SAMPLED, {}).get(column.metric) for column in columns]
        cells = [_format_change(*pair) for pair in zip(numbers, columns, strict=True)]
        table.add_row(Text(result.label, "bold"), *cells)
    caption = f"differences to {baseline.label} on the same examples; ~ within noise (the 95 % interval holds 0)"
    return [Text(""), table, Text(caption, "dim")]


def format_estimate(number: Estimate | None, is_share: bool, with_error: bool) -> str:
    """`87.4 ±1.5` (per cent for a share); a dash where nothing could be measured."""
    if number is None or number.value is None:
        return "-"
    scale, digits = (100.0, 1) if is_share else (1.0, 2)
    error = f" ±{scale * number.standard_error:.{digits}f}" if with_error and number.standard_error is not None else ""
    return f"{scale * number.value:.{digits}f}{error}"


def _format_change(found: tuple[Estimate, Difference] | None, column: _Column) -> Text:
    if found is None:
        return Text("-")
    change, verdict = found
    sign = "+" if verdict.value > 0 else ""
    text = sign + format_estimate(change, column.is_share, with_error=True)
    mark = {True: "~ ", False: "", None: "? "}[verdict.within_noise]
    return Text(f"{mark}{text}", "dim" if mark else "")


def _table(first: str, columns: Sequence[_Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column(first, vertical="bottom", overflow="fold")  # a long label takes more lines, a number is never cut
    for column in columns:
        table.add_column(column.heading, justify="right", vertical="bottom", no_wrap=True)
    return table


def _by_checkpoint(evaluation: Evaluation, columns: Sequence[_Column]) -> Table:
    table = _table("stage", columns)
    for result in evaluation.results:
        table.add_row(Text(result.label, "bold"), *_cells(result, columns))
    return table


def _by_decoding(evaluation: Evaluation, columns: Sequence[_Column]) -> Table:
    """A row for each way to decode, below the name of its checkpoint; that name alone where there is but one way."""
    table = _table("stage", columns)
    for result in evaluation.results:
        decodings = [group for group in result.metrics if group != HELD_OUT]
        if len(decodings) == 1:
            table.add_row(Text(result.label, "bold"), *_cells(result, columns, decodings[0]))
            continue
        table.add_row(Text(result.label, "bold"), *("" for _ in columns))
        for decoding in decodings:
            table.add_row(f"  {decoding}", *_cells(result, columns, decoding))
    return table


def _cells(result: CheckpointResult, columns: Sequence[_Column], group: str | None = None) -> list[str]:
    return [format_estimate(column.number(result, group), column.is_share, column.with_error) for column in columns]
