"""The verdict of a report: intervals that are honest at 0 and 1, and what a difference means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launch.evaluation.report import write_evaluation
from launch.evaluation.results import Change, CheckpointResult, Evaluation
from launch.report.evaluation import EvaluationTable, change_outcome, evaluation_table
from tests.run_folders import evaluated, write_evaluation_file


def table_of(run: Path, *results: CheckpointResult, baseline: str = "", control: str = "mle") -> EvaluationTable:
    evaluation = Evaluation("t", 9, 0, {}, {}, baseline or results[0].label, results)
    write_evaluation(evaluation, run)
    table = evaluation_table(run, {control})
    assert table is not None
    return table


def outcomes(table: EvaluationTable) -> list[str | None]:
    return [change_outcome(cell.change, measure.info) for _, measure, cell in table.findings]


def test_a_difference_is_a_finding_only_where_its_interval_leaves_out_0(tmp_path: Path) -> None:
    write_evaluation_file(tmp_path)
    table = evaluation_table(tmp_path, {"mle_control"})
    assert table is not None
    assert table.labels[table.baseline] == "mle_control"
    assert [measure.name for _, measure, _ in table.findings] == ["accuracy", "recovery"]
    assert outcomes(table) == [None, "better"]
    assert [measure.name for measure in table.measures] == ["accuracy", "recovery", "of_tomorrow"]
    tomorrow = table.measures[-1]
    assert tomorrow.info.title == "of tomorrow"
    assert tomorrow.cells[0].change is not None
    assert table.measures[0].cells[table.baseline].change is None


def test_less_is_better_where_a_metric_says_so(tmp_path: Path) -> None:
    table = table_of(tmp_path, evaluated("mle", perplexity=(20.0, 9)), evaluated("sm", perplexity=(90.0, 9)))
    assert outcomes(table) == ["worse"]


def test_one_checkpoint_is_compared_with_nothing_and_a_missing_number_with_none(tmp_path: Path) -> None:
    assert table_of(tmp_path, evaluated("sm", accuracy=(0.5, 9))).findings == []
    table = table_of(tmp_path, evaluated("sm", accuracy=(0.5, 9)), evaluated("mle", recovery=(0.5, 9)))
    assert table.findings == []
    missing = [[cell.number is None for cell in measure.cells] for measure in table.measures]
    assert missing == [[False, True], [True, False]]


def test_differences_that_were_measured_pairwise_go_before_our_own_and_may_point_the_other_way(tmp_path: Path) -> None:
    paired = {"greedy": {"accuracy": Change(-0.1, 0.01, 50)}}
    sm, mle, other = (
        evaluated(label, accuracy=(value, 50)) for label, value in (("sm", 0.6), ("mle", 0.5), ("x", 0.5))
    )
    mle = replace(mle, differences=paired)
    for baseline, outcome in (("sm", "better"), ("x", None)):
        table = table_of(tmp_path, sm, mle, other, baseline=baseline)
        assert outcomes(table)[0] == outcome
        change = table.findings[0][2].change
        assert change is not None
        assert change.value == pytest.approx(0.1)
    table = table_of(tmp_path, sm, mle, baseline="sm", control="none")
    assert table.labels[table.baseline] == "sm"


@pytest.mark.parametrize("text", ["", "[]", '{"task": "t", "num_examples": 1, "seed": 0, "checkpoints": []}'])
def test_a_file_of_another_form_is_named(tmp_path: Path, text: str) -> None:
    assert evaluation_table(tmp_path, ()) is None
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(ValueError, match=r"evaluation\.json is no evaluation that this version can show"):
        evaluation_table(tmp_path, ())
