"""Which settings may change in mid-run: every one is decided, and stages as far as they have gone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.errors import UserError
from launch.run_folder.resuming import changes_between, check_changes, why_fixed
from launch.settings.recipe import read_recipe
from launch.settings.run import RunSettings

RECIPE = Path("launch/recipes/arithmetic_cpu.yaml")


def setting_keys(schema: dict, node: dict, key: str) -> Iterator[str]:
    """Every key that a recipe can have; `x` stands for the name of a stage or a feature."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    options = [*node.get("anyOf", []), *node.get("oneOf", [])]
    if "$ref" in node.get("items", {}):
        options.append({"additionalProperties": node["items"]})
    below = dict(node.get("properties", {}))
    if isinstance(of_any_key := node.get("additionalProperties"), dict):
        below["x"] = of_any_key
    if not options and not below:
        yield key
    for option in options:
        yield from setting_keys(schema, option, key)
    for name, child in below.items():
        yield from setting_keys(schema, child, f"{key}.{name}" if key else name)


def test_every_setting_is_decided() -> None:
    schema = RunSettings.model_json_schema()
    keys = set(setting_keys(schema, schema, ""))
    assert {"stages.x.optimizer.betas", "scoring.features.x.pattern", "model.adapter.rank", "trackers"} <= keys
    assert len(keys) > 150
    undecided = []
    for key in sorted(keys):
        try:
            why_fixed(key)
        except KeyError:
            undecided.append(key)
    assert undecided == [], "decide in launch/run_folder/resuming.py whether these may change when a run is resumed"


BEGUN = {"pretrain": 600}
"""Of the recipe's stages the pretrain is finished; the others have no step."""


def refusal(steps_taken: dict[str, int], *overrides: str) -> str:
    pretrain = f"stages.pretrain.steps={BEGUN['pretrain']}"
    before, after = read_recipe(RECIPE, [pretrain]), read_recipe(RECIPE, [pretrain, *overrides])
    changes = changes_between(before, after)
    assert len(changes) == len(overrides)
    try:
        check_changes(changes, after, steps_taken)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "override",
    [
        "actors.count=3",
        "buffer.capacity=4096",
        "learner.checkpoint_dir=/elsewhere",
        "trackers=[]",
        "stages.pretrain.steps=700",
        "stages.sequencematch.objective.alpha=0.3",
        "stages.sequencematch.batch_size=3",
    ],
)
def test_what_shaped_no_step_may_change(override: str) -> None:
    assert refusal(BEGUN, override) == ""


def test_a_start_that_is_said_otherwise_is_no_change() -> None:
    implied = read_recipe(RECIPE, ["stages.sequencematch.start_from=null"])
    assert changes_between(implied, read_recipe(RECIPE, ["stages.sequencematch.start_from=pretrain"])) == []


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("seed=1", "were taken with it"),
        ("name=other", "has its name already"),
        ("runs_folder=/elsewhere", "move its folder instead"),
        ("model.num_layers=1", "hold the model as it was begun"),
        ("buffer.archive=/elsewhere", "lie there"),
        ("stages.pretrain.steps=500", "has taken 600 steps"),
        ("stages.pretrain.batch_size=3", "raise stages.pretrain.steps"),
    ],
)
def test_what_shaped_the_steps_may_not(override: str, why: str) -> None:
    message = refusal(BEGUN, override)
    assert why in message
    assert f"{override.partition('=')[0]}: " in message


def test_the_objective_of_a_stage_stays_once_it_has_begun() -> None:
    before = read_recipe(RECIPE)
    after = read_recipe(RECIPE, ["stages.pretrain.objective={name: unlikelihood}"])
    changes = changes_between(before, after)
    check_changes(changes, after, {})
    for steps, why in ((after.stages[0].steps, "nothing would come"), (3, "taken with it")):
        with pytest.raises(UserError, match=rf"objective\.name: .* -> unlikelihood .*{why}"):
            check_changes(changes, after, {"pretrain": steps})


def test_a_stage_that_others_have_begun_from_gets_no_more_steps() -> None:
    assert "stage sequencematch has begun" in refusal(BEGUN | {"sequencematch": 0}, "stages.pretrain.steps=700")


def test_a_stage_may_leave_as_long_as_it_has_not_begun() -> None:
    before = read_recipe(RECIPE)
    after = before.model_copy(update={"stages": before.stages[:-1]})
    left = before.stages[-1].name
    check_changes(changes_between(before, after), after, BEGUN)
    with pytest.raises(UserError, match=f"stages.{left}.steps: .* -> null .the stage has begun"):
        check_changes(changes_between(before, after), after, BEGUN | {left: 3})
