"""Histograms of what was drawn, against the draws counted one by one; rollouts chosen for show."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from buffer.experts.tasks import Task
from buffer.reading.reader import BufferSnapshot, read_buffer
from launch.report.draws import MAX_BINS, draw_facts, histogram
from launch.report.formatting import number
from launch.report.rollouts import sample_rollouts
from tests.run_folders import ROWS_PER_VERSION, VERSIONS, write_buffer


@pytest.fixture(scope="module")
def snapshot(task: Task, tmp_path_factory: pytest.TempPathFactory) -> BufferSnapshot:
    run = tmp_path_factory.mktemp("run")
    write_buffer(run, task)
    return read_buffer(run / "buffer")


def test_staleness_and_reuse_are_those_of_every_single_draw(snapshot: BufferSnapshot) -> None:
    versions = dict(
        zip(*(snapshot.trajectories.column(name).to_pylist() for name in ("row", "policy_version")), strict=True)
    )
    stale: Counter[int] = Counter()
    uses: Counter[int] = Counter()
    for event in snapshot.events.to_pylist():
        if event["event"] == "draw":
            stale.update(event["policy_version"] - min(versions[row]) for row in event["rows"])
            uses.update(event["rows"])
    facts = draw_facts(snapshot)
    assert (facts.num_draws, facts.num_lost) == (16 * VERSIONS, 0)
    staleness, age, reuse = (plot.series[0] for plot in facts.plots)
    found = {round(edge + 0.5): count for edge, count in zip(staleness.x, staleness.y, strict=False)}
    assert {key: count for key, count in found.items() if count} == dict(stale)
    assert sum(reuse.y) == len(uses)
    assert f"Mean {number(np.mean(list(uses.values())))}," in facts.plots[2].caption
    assert sum(age.y) == 16 * VERSIONS


def test_draws_of_rows_that_are_gone_are_told_and_not_counted(snapshot: BufferSnapshot) -> None:
    kept = snapshot.trajectories.slice(ROWS_PER_VERSION)
    facts = draw_facts(BufferSnapshot(snapshot.contract, snapshot.newest_version, kept, snapshot.events))
    assert 0 < facts.num_lost < facts.num_draws
    assert sum(facts.plots[0].series[0].y) == facts.num_draws - facts.num_lost
    none = draw_facts(BufferSnapshot(snapshot.contract, 0, kept.slice(0, 0), snapshot.events))
    assert (none.plots, none.num_lost) == ((), 16 * VERSIONS)


@pytest.mark.parametrize("values", [[0], [3, 3], [0, 1000], list(range(MAX_BINS + 1)), [-4, 7]])
def test_no_value_falls_out_of_its_histogram(values: list[int]) -> None:
    for plot in (
        histogram("", "", "", np.array(values), whole=True),
        histogram("", "", "", np.array(values) * 0.37),
    ):
        (bins,) = plot.series
        assert sum(bins.y) == len(values)
        assert len(bins.y) <= MAX_BINS + 2
        assert (np.diff(bins.x) > 0).all()


def test_shown_rollouts_are_spread_over_the_run_and_prefer_deletions(snapshot: BufferSnapshot, task: Task) -> None:
    sample = sample_rollouts(snapshot, task.tokenizer, max_rollouts=12)
    assert (len(sample.rollouts), sample.num_stored) == (12, ROWS_PER_VERSION * VERSIONS)
    versions = [rollout.actions[0].version for rollout in sample.rollouts]
    assert versions == sorted(versions)
    assert set(versions) == set(range(VERSIONS))
    assert all(rollout.takes_back for rollout in sample.rollouts)
    assert 0 < sample.num_deleting < sample.num_stored


def test_an_action_has_its_text_and_its_fate(snapshot: BufferSnapshot, task: Task) -> None:
    rollout = sample_rollouts(snapshot, task.tokenizer, max_rollouts=1).rollouts[0]
    ids = snapshot.trajectories.column("id").to_pylist()
    row = snapshot.trajectories.slice(ids.index(rollout.id), 1).to_pylist()[0]
    shown: list[tuple[str, bool]] = []
    stack: list[int] = []
    for action in row["actions"]:
        if action == task.backspace_id:
            text, _ = shown[stack.pop()]
            shown[len(shown) - 1] = (text, False)
        elif action != task.eos_id:
            stack.append(len(shown))
            shown.append((task.tokenizer.decode([action]), True))
    assert [(each.text, each.kept) for each in rollout.actions if each.kind == "write"] == shown
    assert rollout.prompt == task.tokenizer.decode(row["prompt_ids"])
    assert [each.kind for each in rollout.actions][-1] == "end"
