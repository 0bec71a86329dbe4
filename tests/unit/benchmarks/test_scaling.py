"""Laws that a simulated run keeps, and cases that can be computed by hand; the limiter is the product's."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from launch.errors import UserError
from launch.settings.recipe import read_recipe
from tests.benchmarks import scaling_model
from tests.benchmarks.scaling import saturated
from tests.benchmarks.scaling_model import simulate
from tests.benchmarks.scaling_plan import TIMED_RECIPE, StepTimes, make_plan, read_times

BATCH, CONCURRENT, LENGTH = 8, 8, 4
DECODE_S = 0.1
ACTOR_ROWS_PER_S = CONCURRENT / (LENGTH * DECODE_S)  # 20
OVERRIDES = (
    "actors.max_concurrent=8",
    "actors.insert_batch_size=8",
    "stages.sequencematch.batch_size=8",
    "stages.sequencematch.rollout_batch_size=8",
    "stages.sequencematch.publish_every_steps=2",
    "stages.pretrain.rollout_batch_size=8",
    "stages.mle_control.rollout_batch_size=8",
    "buffer.capacity=64",
    "buffer.min_size=16",
    "buffer.samples_per_insert=1",
)
FREE = {"load_weights_s": 0.0, "send_weights_s": 0.0, "publish_s": 0.0, "insert_s": 0.0, "insert_row_s": 0.0}
FREE |= {"draw_s": 0.0, "draw_row_s": 0.0, "call_s": 0.0, "prefill_s": 0.0, "start_actor_s": 5.0}


def plan_of(learner_s, *overrides, steps=40, **changes):
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
    return make_plan(read_recipe(TIMED_RECIPE, [*OVERRIDES, *overrides]), None, times, steps)


def point_of(plan, actors, ranks=1):
    point = simulate(plan, actors, ranks)
    assert point["failure"] is None
    assert point["inserted"] == point["live"] + sum(point["removed"].values()), "every rollout is somewhere"
    assert point["learner_training"] + point["learner_publishing"] + point["learner_waiting"] == pytest.approx(1.0)
    return point


@pytest.mark.parametrize("actors", [1, 4])
def test_actors_that_are_too_slow_set_the_pace_and_more_of_them_help(actors):
    point = point_of(plan_of(learner_s=0.02), actors)  # 400 rows/s
    assert saturated(point) == "actors"
    assert point["samples_per_s"] == pytest.approx(actors * ACTOR_ROWS_PER_S, rel=0.1)
    assert point["actions_per_s"] == pytest.approx(actors * CONCURRENT / DECODE_S, rel=0.05)
    assert point["samples_per_insert"] == pytest.approx(1.0, rel=0.1)
    assert point["actors_generating"] == pytest.approx(1.0, abs=0.05)
    assert point["learner_waiting"] == pytest.approx(1 - actors * ACTOR_ROWS_PER_S / 400, abs=0.05)


@pytest.mark.parametrize("actors", [2, 4])
def test_more_actors_change_nothing_while_the_learner_is_the_bottleneck(actors):
    point = point_of(plan_of(learner_s=1.0), actors)  # 8 rows/s
    assert saturated(point) == "learner"
    assert point["steps_per_s"] == pytest.approx(1.0, rel=0.02)
    assert point["actors_throttled"] == pytest.approx(1 - 8 / (actors * ACTOR_ROWS_PER_S), abs=0.1)
    assert point["samples_per_insert"] == pytest.approx(1.0, rel=0.1), "the limiter holds the actors"


def test_the_limiter_is_the_products(monkeypatch):
    class Refusing(scaling_model.Limiter):
        def allowance(self, traffic):
            return 0

    monkeypatch.setattr(scaling_model, "Limiter", Refusing)
    assert scaling_model.Limiter.__mro__[1].__module__.startswith("buffer.")
    assert "more inserts first" in simulate(plan_of(0.1, "learner.data_timeout_s=20"), 1, 1)["failure"]


def test_more_ranks_shorten_what_they_share():
    plan = plan_of(0.5, learner_trajectory_s=0.5)  # 16 trajectories: 8.5 s alone, 1.5 s with eight
    assert point_of(plan, 2, ranks=8)["steps_per_s"] == pytest.approx(1 / 1.5, rel=0.02)
    assert point_of(plan, 2, ranks=1)["steps_per_s"] == pytest.approx(1 / 8.5, rel=0.02)
    grown = plan.with_batches_of(8)
    assert (grown.stage.rollout_batch_size, grown.buffer.capacity) == (8 * BATCH, 8 * 64)


def test_a_slow_shard_is_named_and_a_second_one_helps():
    slow = {"insert_row_s": 0.05}  # 20 rows/s, of which four actors have 80
    one = point_of(plan_of(0.02, **slow), 4)
    two = point_of(plan_of(0.02, "buffer.shards=2", **slow), 4)
    assert saturated(one) == "buffer"
    assert one["inserts_per_s"] == pytest.approx(20.0, rel=0.1)
    assert two["inserts_per_s"] > 1.5 * one["inserts_per_s"]
    assert one["buffer_busy"] > 0.9


@pytest.mark.parametrize("changes", [{"publish_s": 4.0}, {"load_weights_s": 4.0}, {"send_weights_s": 4.0}])
def test_slow_pushes_are_named(changes):
    learner_s = 1.0 if "publish_s" in changes else 0.02
    assert saturated(point_of(plan_of(learner_s, **changes), 1)) == "push"


def test_staleness_grows_with_what_lies_in_the_buffer_and_its_bound_holds():
    fresh = point_of(plan_of(1.0), 2)
    deep = point_of(plan_of(1.0, "buffer.min_size=32"), 2)
    assert deep["staleness_mean"] > fresh["staleness_mean"] + 0.3
    bounded = point_of(plan_of(1.0, "buffer.min_size=32", "buffer.max_staleness=2"), 2)
    assert deep["staleness_max"] > bounded["staleness_max"] == 2
    assert bounded["dropped_fraction"] > 0.0
    assert bounded["removed"]["stale"] > 0


@pytest.mark.parametrize(("actors", "learner_s", "wanted"), [(1, 0.1, 4), (8, 0.1, 4), (8, 1.0, 1)])
def test_autoscaling_finds_the_number_that_is_needed(actors, learner_s, wanted):
    bounds = ("actors.autoscale.max=8", "actors.autoscale.window_s=4")
    plan = plan_of(learner_s, *bounds, steps=int(15 / learner_s), start_actor_s=1.0)  # 80 rows/s, or 8
    assert simulate(plan, actors, 1)["actors_at_end"] == wanted


def test_the_same_again_is_the_same():
    plan = plan_of(0.3, "buffer.shards=2", actions_per_rollout=[2, 4, 7], insert_s=0.01, call_s=0.001)
    assert point_of(plan, 3) == point_of(plan, 3)
    assert point_of(dataclasses.replace(plan, seed=1), 3) != point_of(plan, 3)


def test_a_run_that_would_end_says_why():
    starving = simulate(plan_of(0.1, "learner.data_timeout_s=3"), 1, 1)
    assert starving["failure"] == "waited 3 s for 8 policy trajectories: 0 are live and 16 are needed"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"decode_s": 1}', "unknown key 'decode_s'; did you mean 'decode_step_s'"),
        ("{", "is not valid JSON"),
    ],
)
def test_bad_times_are_named(tmp_path, text, message):
    times = tmp_path / "times.json"
    times.write_text(text)
    with pytest.raises(UserError, match=message):
        read_times(times)


@pytest.mark.parametrize(
    ("override", "stage", "message"),
    [
        ("actors.max_concurrent=65", None, "decode_step_s for 64 rollouts at most"),
        ("noise.kind=policy", None, "choose another noise.kind"),
        ("actors.start_timeout_s=2", None, "no engine would start"),
        ("seed=1", "pretrain", "those that do are: sequencematch"),
    ],
)
def test_what_cannot_be_simulated_is_refused(override, stage, message):
    with pytest.raises(UserError, match=message):
        make_plan(read_recipe(TIMED_RECIPE, [override]), stage, StepTimes(), steps=1)


def run_command(*arguments):
    command = [sys.executable, "-m", "tests.benchmarks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_prints_one_object_or_a_table(tmp_path):
    times = tmp_path / "times.json"
    times.write_text(json.dumps({"learner_step_s": 0.5, "actions_per_rollout": [2]}))
    arguments = ("scaling", "--actors", "1,2", "--ranks", "1", "--steps", "5", "--warmup", "1", "--times", str(times))
    found = json.loads(run_command(*arguments, "--json").stdout)
    assert [(point["actors"], point["ranks"]) for point in found["points"]] == [(1, 1), (2, 1)]
    assert found["times"]["learner_step_s"] == 0.5
    assert found.keys() >= {"simulated", "stage", "steps", "warmup", "batch_per_rank", "times", "points"}
    fields = (
        "actors ranks virtual_s steps_per_s actions_per_s inserts_per_s samples_per_s samples_per_insert "
        "staleness_mean staleness_max dropped_fraction actors_generating actors_loading actors_throttled "
        "actors_inserting learner_training learner_publishing learner_waiting buffer_busy join_s actors_at_end "
        "saturated inserted sampled live removed failure"
    )
    assert found["points"][0].keys() == set(fields.split())
    assert re.search(r" 1 +1 .* learner *\n +1 +2 .* learner *\n", run_command(*arguments).stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "there is no benchmark 'nothing': choose one of rollouts, buffer"),
        (["scaling", "--actors", "1,x"], "--actors '1,x' is no list of positive numbers"),
    ],
)
def test_bad_input_ends_with_2(arguments, message):
    done = run_command(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line
