"""Laws that a simulated run keeps, whatever its numbers; the shards, their limiter and the roster are the real ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from launch.bench.scaling import ScalingPlan, ScalingPoint, make_plan, simulate
from launch.bench.scaling_engine import SimulatedEngine
from launch.bench.scaling_times import TIMED_RECIPE, StepTimes
from launch.cli import app
from launch.settings.recipe import read_recipe

BATCH, CONCURRENT, LENGTH = 8, 8, 4
DECODE_S = 0.1
ACTOR_ROWS_PER_S = CONCURRENT / (LENGTH * DECODE_S)  # 20
OVERRIDES = (
    "actors.max_concurrent=8",
    "actors.insert_rows=8",
    "stages.sequencematch.batch_size=8",
    "stages.sequencematch.rollout_batch_size=8",
    "stages.sequencematch.publish_every_steps=2",
    "stages.trunk.rollout_batch_size=8",
    "stages.mle_control.rollout_batch_size=8",
    "buffer.capacity=64",
    "buffer.min_size=16",
    "buffer.samples_per_insert=1",
)
FREE = {"load_weights_s": 0.0, "send_weights_s": 0.0, "publish_s": 0.0, "insert_s": 0.0, "insert_row_s": 0.0}
FREE |= {"draw_s": 0.0, "draw_row_s": 0.0, "call_s": 0.0, "prefill_s": 0.0, "start_actor_s": 5.0}


def plan_of(learner_s: float, *overrides: str, steps: int = 40, **changes: object) -> ScalingPlan:
    """Nothing but engine and learner steps takes time, unless told."""
    times = StepTimes.model_validate(
        {
            **FREE,
            "decode_step_s": {CONCURRENT: DECODE_S},
            "actions_per_rollout": [LENGTH],
            "learner_step_s": learner_s,
            "learner_trajectory_s": 0.0,
            **changes,
        }
    )
    return make_plan(read_recipe(TIMED_RECIPE, [*OVERRIDES, *overrides]), None, times, steps, None)


def point_of(plan: ScalingPlan, actors: int, folder: Path, ranks: int = 1) -> ScalingPoint:
    name = f"{actors}-{ranks}-{len(list(folder.iterdir()))}"
    point = simulate(plan, actors, ranks, folder / name)
    assert point.failure is None
    assert point.inserted == point.live + sum(point.removed.values()), "every rollout is somewhere"
    # Over a window of its own, no side does more than it can; one insert and one draw may lie across its ends.
    slack = 1.0 / point.virtual_s
    most_rows_per_s = actors * CONCURRENT / (min(plan.times.actions_per_rollout) * DECODE_S)
    assert point.inserts_per_s <= most_rows_per_s + 5 * actors * CONCURRENT * slack
    learner_s = plan.times.step_s(plan.stage.batch_size + plan.stage.rollout_batch_size, ranks)
    assert point.samples_per_s <= plan.stage.rollout_batch_size * (1 / learner_s + slack)
    for share in ("actors_generating", "actors_held_back", "learner_training", "learner_waiting", "buffer_busy"):
        assert 0.0 <= getattr(point, share) <= 1.0 + 1e-6
    assert point.learner_training + point.learner_publishing + point.learner_waiting == pytest.approx(1.0)
    return point


def test_actors_that_are_too_slow_set_the_pace_and_more_of_them_help(tmp_path):
    plan = plan_of(learner_s=0.02)  # 400 rows/s
    one, four = point_of(plan, 1, tmp_path), point_of(plan, 4, tmp_path)
    for point in (one, four):
        assert point.saturated == "actors"
        assert point.samples_per_s == pytest.approx(point.actors * ACTOR_ROWS_PER_S, rel=0.1)
        assert point.samples_per_insert == pytest.approx(1.0, rel=0.1)
        assert point.actors_generating == pytest.approx(1.0, abs=0.05)
        assert point.learner_waiting > 0.5


def test_more_actors_change_nothing_while_the_learner_is_the_bottleneck(tmp_path):
    plan = plan_of(learner_s=1.0)  # 8 rows/s
    points = [point_of(plan, actors, tmp_path) for actors in (2, 4)]
    for point in points:
        assert point.saturated == "learner"
        assert point.steps_per_s == pytest.approx(1.0, rel=0.02)
        assert point.learner_waiting < 0.02
        assert point.actors_held_back > 0.5
        assert point.samples_per_insert == pytest.approx(1.0, rel=0.1), "the limiter holds the actors"


def test_a_draw_without_ratio_does_not_wait_for_inserts(tmp_path):
    plan = plan_of(0.02, "buffer.samples_per_insert=null")
    point = point_of(plan, 1, tmp_path)
    assert point.samples_per_s == pytest.approx(BATCH / 0.02, rel=0.05)
    assert point.samples_per_insert == pytest.approx(BATCH / 0.02 / ACTOR_ROWS_PER_S, rel=0.1)


def test_more_ranks_shorten_what_they_share(tmp_path):
    plan = plan_of(0.5, learner_trajectory_s=0.5)  # 16 trajectories: 8.5 s alone, 1.5 s with eight
    assert point_of(plan, 2, tmp_path, ranks=8).steps_per_s == pytest.approx(1 / 1.5, rel=0.02)
    assert point_of(plan, 2, tmp_path, ranks=1).steps_per_s == pytest.approx(1 / 8.5, rel=0.02)
    grown = plan.with_batches_of(8)
    assert (grown.stage.rollout_batch_size, grown.buffer.capacity) == (8 * BATCH, 8 * 64)


def test_a_slow_shard_is_named_and_a_second_one_helps(tmp_path):
    slow = {"insert_row_s": 0.05}  # 20 rows/s, of which four actors have 80
    one = point_of(plan_of(0.02, **slow), 4, tmp_path)
    two = point_of(plan_of(0.02, "buffer.shards=2", **slow), 4, tmp_path)
    assert one.saturated == "buffer"
    assert one.inserts_per_s == pytest.approx(20.0, rel=0.1)
    assert two.inserts_per_s > 1.5 * one.inserts_per_s
    assert one.buffer_busy > 0.9


@pytest.mark.parametrize("changes", [{"publish_s": 4.0}, {"load_weights_s": 4.0}, {"send_weights_s": 4.0}])
def test_slow_pushes_are_named(tmp_path, changes):
    learner_s = 1.0 if "publish_s" in changes else 0.02
    assert point_of(plan_of(learner_s, **changes), 1, tmp_path).saturated == "push"


def test_staleness_grows_with_what_lies_in_the_buffer_and_its_bound_holds(tmp_path):
    fresh = point_of(plan_of(1.0), 2, tmp_path)
    deep = point_of(plan_of(1.0, "buffer.min_size=32"), 2, tmp_path)
    assert deep.staleness_mean > fresh.staleness_mean + 0.4
    bounded = point_of(plan_of(1.0, "buffer.min_size=32", "buffer.max_staleness=2"), 2, tmp_path)
    assert deep.staleness_max > bounded.staleness_max == 2
    assert bounded.dropped_share > 0.0
    assert bounded.removed["stale"] > 0


@pytest.mark.parametrize(("actors", "learner_s", "wanted"), [(1, 0.1, 4), (8, 0.1, 4), (8, 1.0, 1)])
def test_autoscaling_finds_the_number_that_is_needed(tmp_path, actors, learner_s, wanted):
    bounds = ("actors.autoscale.max=8", "actors.autoscale.window_s=4")
    plan = plan_of(learner_s, *bounds, steps=int(15 / learner_s), start_actor_s=1.0)  # 80 rows/s, or 8
    point = simulate(plan, actors, 1, tmp_path / "buffer")
    assert point.actors_at_end == wanted
    assert point.inserted == point.live + sum(point.removed.values())


def test_the_same_again_is_the_same(tmp_path):
    plan = plan_of(0.3, "buffer.shards=2", actions_per_rollout=[2, 4, 7], insert_s=0.01, call_s=0.001)
    first, again = (point_of(plan, 3, tmp_path) for _ in range(2))
    assert first == again
    other = point_of(dataclasses.replace(plan, seed=1), 3, tmp_path)
    assert other != first


def test_a_run_that_would_end_says_why(tmp_path):
    starving = simulate(plan_of(0.1, "learner.data_timeout_s=3"), 1, 1, tmp_path / "starving")
    assert starving.failure == (
        "waited 3 s for 8 policy trajectories: 0 are live and 16 are needed; no actor has inserted anything since the "
        "buffer started"
    )
    hopeless = plan_of(0.1, "actors.start_timeout_s=2", "actors.max_restarts=1", "learner.data_timeout_s=30")
    point = simulate(hopeless, 1, 1, tmp_path / "hopeless")
    assert point.failure == ("actor-0 failed 2 times in a row, the last time: its engine did not start within 2 s")
    assert point.inserted == 0


def test_rollouts_last_as_long_as_they_are_and_know_their_weights():
    engine = SimulatedEngine(StepTimes(actions_per_rollout=(3,)), "a", (0,))
    engine.load_weights(4)
    engine.add(2)
    assert engine.step() == []
    engine.load_weights(5)
    engine.add(1)
    assert engine.step() == []
    logs = engine.step()
    assert [log.request_id for log in logs] == ["a-1", "a-2"]
    assert [log.policy_version.tolist() for log in logs] == [[4, 5, 5]] * 2
    engine.load_weights(6)
    (late,) = engine.step()
    assert late.policy_version.tolist() == [5, 5, 6]
    assert engine.num_unfinished == 0


def test_times_between_two_batches_are_between_theirs():
    times = StepTimes(decode_step_s={8: 0.2, 1: 0.1}, prefill_s=0.01)
    assert times.decode_s(1, 0) == pytest.approx(0.1)
    assert times.decode_s(4, 0) == pytest.approx(np.interp(4, [1, 8], [0.1, 0.2]))
    assert times.decode_s(8, 3) == pytest.approx(0.23)


def run_command(*arguments: str):
    return CliRunner().invoke(app, ["bench", "scaling", *arguments])


def test_the_command_prints_one_object_or_a_table(tmp_path):
    times = tmp_path / "times.json"
    times.write_text(json.dumps({"learner_step_s": 0.5, "actions_per_rollout": [2]}))
    arguments = [
        "--simulate",
        "--actors",
        "1,2",
        "--ranks",
        "1",
        "--steps",
        "5",
        "--warmup",
        "1",
        "--times",
        str(times),
    ]
    result = run_command(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(point["actors"], point["ranks"]) for point in found["points"]] == [(1, 1), (2, 1)]
    assert found["times"]["learner_step_s"] == 0.5
    table = run_command(str(TIMED_RECIPE), *arguments)
    assert table.exit_code == 0
    assert "1 learner ranks: learner from 1 actors" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "add --simulate"),
        (["--simulate", "--actors", "1,x"], "--actors '1,x' is no list of positive numbers"),
        (["--simulate", "--ranks", "0"], "--ranks '0' is no list of positive numbers"),
        (["--simulate", "--times", "nowhere.json"], "nowhere.json"),
        (["--simulate", "--stage", "trunk"], "those are: sequencematch"),
        (["nowhere.yaml", "--simulate"], "no recipe at nowhere.yaml"),
        ([str(TIMED_RECIPE), "actors.max_concurrent=65", "--simulate"], "decode_step_s for 64 rollouts at most"),
        ([str(TIMED_RECIPE), "noise.kind=policy", "--simulate"], "choose another noise.kind"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_bad_input_ends_with_2(arguments, message):
    result = run_command(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"decode_s": 1}', "decode_s: Extra inputs are not permitted (known: decode_step_s, "),
        ('{"learner_step_s": 0}', "learner_step_s: Input should be greater than 0"),
        ("{", "is not valid JSON"),
        ('{"draw_s": 1, "draw_s": 2}', "key 'draw_s' stands twice"),
    ],
)
def test_bad_times_end_with_2(tmp_path, text, message):
    times = tmp_path / "times.json"
    times.write_text(text)
    result = run_command("--simulate", "--times", str(times))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
