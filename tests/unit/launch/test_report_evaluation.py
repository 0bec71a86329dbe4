"""The verdict of a report: intervals that are honest at 0 and 1, and what a difference means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.report.evaluation import EvaluationTable, change_outcome, read_evaluation
from tests.run_folders import evaluated, write_evaluation_file


def table_of(run: Path, *checkpoints: dict[str, object], control: str = "mle", **rest: object) -> EvaluationTable:
    file = {"task": "t", "num_examples": 9, "seed": 0, "checkpoints": checkpoints} | rest
    (run / "evaluation.json").write_text(json.dumps(file))
    table = read_evaluation(run, lambda label: label == control)
    assert table is not None
    return table


def outcomes(table: EvaluationTable) -> list[str | None]:
    return [change_outcome(cell.change, measure.info) for _, measure, cell in table.findings]


def test_a_difference_is_a_finding_only_where_its_interval_leaves_out_0(tmp_path: Path) -> None:
    write_evaluation_file(tmp_path)
    table = read_evaluation(tmp_path, lambda label: label == "mle_control")
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
    paired = {"differences": {"greedy": {"accuracy": {"value": -0.1, "standard_error": 0.01}}}}
    arms = [evaluated("sm", accuracy=(0.6, 50)), evaluated("mle", accuracy=(0.5, 50)) | paired]
    for baseline, outcome in (("sm", "better"), ("elsewhere", None)):
        table = table_of(tmp_path, *arms, baseline=baseline, left_out={"mauve": "too few texts"})
        assert outcomes(table) == [outcome]
        change = table.findings[0][2].change
        assert change is not None
        assert change.value == pytest.approx(0.1)
        assert table.file.left_out == {"mauve": "too few texts"}
    table = table_of(tmp_path, *arms, baseline="sm", control="none")
    assert table.labels[table.baseline] == "sm"


@pytest.mark.parametrize("text", ["", "[]", '{"task": "t", "num_examples": 1, "seed": 0, "checkpoints": []}'])
def test_a_file_of_another_form_is_named(tmp_path: Path, text: str) -> None:
    assert read_evaluation(tmp_path, lambda label: True) is None
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(ValueError, match=r"evaluation\.json is no evaluation that this version can show"):
        read_evaluation(tmp_path, lambda label: True)
