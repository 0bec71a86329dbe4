"""What a comparison is going to do, and what it refuses before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.compare.plan import (
    COMPARED_STAGE,
    ComparisonPlan,
    compared_stage,
    make_plan,
    parse_objectives,
    read_objectives,
    read_plan,
)
from launch.errors import UserError
from launch.settings.recipe import read_recipe
from launch.settings.run import RunSettings
from learner.settings.stages import stages_before

ARITHMETIC = Path("launch/recipes/arithmetic_cpu.yaml")
KL_CONTROL = Path("launch/recipes/arithmetic_kl_control_cpu.yaml")


def plan_of(
    objectives: str,
    *overrides: str,
    recipe: Path = ARITHMETIC,
    seeds: int = 2,
    stage: str | None = None,
    steps: int | None = None,
) -> ComparisonPlan:
    settings = read_recipe(recipe, overrides)
    parsed = parse_objectives(objectives, (compared_stage(settings, stage), *settings.stages))
    return make_plan(settings, parsed, seeds, stage=stage, steps=steps)


def test_runs_differ_in_their_objective_alone() -> None:
    plan = plan_of("mle,sequencematch,behavior_cloning", "seed=5", steps=7)
    assert plan.seeds == (5, 6)
    runs = [plan.run_settings(label, 6) for label in plan.objectives]
    for run in runs:
        assert run.seed == 6
        assert [stage.name for stage in run.stages] == ["pretrain", COMPARED_STAGE]
        assert run.stages[0] == runs[0].stages[0]
        same = runs[0].stages[1].model_copy(update={"objective": run.stages[1].objective})
        assert run.stages[1] == same
    compared = runs[0].stages[1]
    assert (compared.start_from, compared.steps, compared.publish_every_steps) == ("pretrain", 7, 10)
    assert runs[0].model_copy(update={"stages": ()}) == runs[2].model_copy(update={"stages": ()})


def test_the_way_to_a_stage_leaves_other_stages_out() -> None:
    tree = read_recipe(ARITHMETIC).model_dump(mode="json")
    pretrain, first, control = tree["stages"]
    tree["stages"] = [
        pretrain,
        first,
        control | {"start_from": None},
        control | {"name": "last", "start_from": "pretrain"},
    ]
    recipe = RunSettings.model_validate(tree)
    found = stages_before(recipe.stages, "mle_control")
    assert [(stage.name, stage.start_from) for stage in found] == [("pretrain", None), ("sequencematch", "pretrain")]
    assert [stage.name for stage in stages_before(recipe.stages, "last")] == ["pretrain"]


def test_the_compared_stage_is_the_first_that_learns_from_rollouts() -> None:
    assert compared_stage(read_recipe(KL_CONTROL), None).name == "kl_control"
    expert_alone = read_recipe(ARITHMETIC, ["stages.sequencematch.objective={name: emo}"])
    assert compared_stage(expert_alone, None).name == "mle_control"
    with pytest.raises(UserError, match="no stage 'mle_contrl'; it has pretrain, sequencematch, mle_control"):
        compared_stage(expert_alone, "mle_contrl")
    start = plan_of("mle,emo").start_settings(1)
    assert start is not None
    assert ([stage.name for stage in start.stages], start.seed) == (["pretrain"], 1)
    assert plan_of("mle,emo", stage="pretrain").start_settings(0) is None


def test_an_objective_has_the_recipes_settings_then_its_own() -> None:
    plan = plan_of(
        "sequencematch:alpha=0.5, bc_weight_steps=9, sequencematch,mle", "stages.sequencematch.objective.gamma=0.9"
    )
    label = "sequencematch-alpha-0.5-bc_weight_steps-9"
    assert list(plan.objectives) == [label, "sequencematch", "mle"]
    assert plan.reference == label
    changed, plain = (plan.objectives[each].objective.model_dump() for each in (label, "sequencematch"))
    assert (changed["alpha"], changed["bc_weight_steps"], changed["gamma"]) == (0.5, 9, 0.9)
    assert (plain["alpha"], plain["bc_weight_steps"], plain["gamma"]) == (0.03, 150, 0.9)


def test_what_is_of_rollouts_goes_where_there_are_none() -> None:
    """`scoring` without rollouts is refused in a recipe; as an objective, maximum likelihood has no use for it."""
    plan = plan_of("mle,kl_control,adversarial_js:discriminator.body=own", recipe=KL_CONTROL)
    assert plan.run_settings("mle", 0).scoring.reward is None
    rewarded = plan.run_settings("kl_control", 0)
    assert rewarded.scoring == plan.recipe.scoring
    assert rewarded.buffer == plan.recipe.buffer
    assert plan.recipe.scoring.reward is not None


def test_a_plan_survives_writing(tmp_path: Path) -> None:
    plan = plan_of("mle,sequencematch:divergence=kl", steps=9)
    (tmp_path / "comparison.yaml").write_text(plan.to_yaml())
    assert read_plan(tmp_path) == plan
    assert read_plan(tmp_path, 4).seeds == (0, 1, 2, 3)
    (tmp_path / "comparison.yaml").write_text("objectives: {}")
    with pytest.raises(UserError, match=r"is not a plan that `sequencematch compare` can read"):
        read_plan(tmp_path)
    with pytest.raises(UserError, match="not the folder of a comparison"):
        read_plan(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("objectives", "overrides", "message"),
    [
        ("mle,sequencmatch", [], "unknown objective 'sequencmatch'; known: .*sequencematch"),
        ("mle,zzz", [], "unknown objective 'zzz'; known: .*unlikelihood"),
        ("mle,emo,mle", [], "mle is named twice"),
        ("sequencematch,sequencematch:alpha=0.03", [], "sequencematch and sequencematch-alpha-0.03 are the same"),
        ("mle", [], "at least two"),
        ("mle,sequencematch:alhpa=1", [], "unknown key 'alhpa'.* did you mean 'alpha'"),
        ("mle,sequencematch:alpha=-1", [], "alpha: Input should be greater than 0"),
        ("mle,emo:", [], "emo: is no objective: write NAME, or NAME:KEY=VALUE"),
        ("alpha=1,mle", [], "alpha=1 is no objective"),
        ("mle,kl_control", [], "objective kl_control.*scoring.reward"),
        ("mle,gdc", [], "gdc.*constraints: Field required"),
        ("mle,emo", ["learner.checkpoint_dir=/tmp/elsewhere"], "checkpoint_dir"),
        ("mle,sequencematch", ["stages.sequencematch.objective={name: mle}", "actors.count=0"], "actors.count is 0"),
        ("mle,adversarial_js", ["stages.sequencematch.steps=50"], "would never train the policy"),
    ],
)
def test_what_cannot_be_compared_is_refused(objectives: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_of(objectives, *overrides)


def test_objectives_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "objectives.yaml"
    file.write_text("plain: {name: mle}\nsoft: {name: gdc, constraints: [{feature: brief, target: 0.5}]}\n")
    found = read_objectives(file)
    assert [each.objective.name for each in found.values()] == ["mle", "gdc"]
    for content, part in (
        ("a/b: {name: mle}", "'a/b' cannot name a run"),
        ("a: {name: mel}", "unknown objective 'mel'"),
        ("a: {name: emo, mode: 3}", "a: mode"),
        ("- mle", "no mapping from labels"),
        ("a: [", "not valid YAML"),
        ("a: {name: mle}\na: {name: emo}", "key 'a' stands twice, in line 1 and line 2"),
        ("a: {name: mle, recipe: {noise.rate: 0.1}}", "a: recipe is no list of overrides"),
    ):
        file.write_text(content)
        with pytest.raises(UserError) as caught:
            read_objectives(file)
        assert part in str(caught.value)
    with pytest.raises(UserError, match="no file of objectives at"):
        read_objectives(tmp_path / "none.yaml")


def plan_of_file(tmp_path: Path, content: str) -> ComparisonPlan:
    file = tmp_path / "objectives.yaml"
    file.write_text(content)
    return make_plan(read_recipe(ARITHMETIC), read_objectives(file), 1, steps=7)


def test_an_objective_of_a_file_changes_the_recipe_for_itself(tmp_path: Path) -> None:
    plan = plan_of_file(
        tmp_path,
        "plain: {name: behavior_cloning}\n"
        "noisy: {name: behavior_cloning, recipe: [noise.kind=random, noise.rate=0.1]}\n"
        "slow: {name: sequencematch, recipe: [stages.sequencematch.optimizer.learning_rate=1e-5,"
        " actors.rollout.backspace=false, noise.kind=none]}\n",
    )
    plain, noisy, slow = (plan.run_settings(label, 0) for label in plan.objectives)
    assert (noisy.noise.kind, noisy.noise.rate, plain.noise.kind) == ("random", 0.1, "task")
    assert noisy.model_copy(update={"noise": plain.noise}) == plain
    assert (slow.stages[-1].optimizer.learning_rate, slow.actors.rollout.backspace) == (1e-5, False)
    assert (slow.stages[-1].name, slow.stages[-1].steps, slow.noise.kind) == (COMPARED_STAGE, 7, "none")
    start = plan.start_settings(0)
    assert start is not None
    assert {start.stages} == {each.stages[:-1] for each in (plain, noisy, slow)}, "all start from the same"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("task.max_digits=3", "would change what all objectives have in common"),
        ("stages.pretrain.steps=3", "would change what all objectives have in common"),
        ("stages.sequencematch.steps=3", "would change what all objectives have in common"),
        ("stages.sequencematch.objective.alpha=0.5", "would change what all objectives have in common"),
        ("stages.sequencematch.objective={name: emo}", "would change what all objectives have in common"),
        ("noises=3", "would change what all objectives have in common"),
        ("noise.rat=3", "objective noisy: noise: unknown key 'rat'"),
        ("noise.rate", "not of the form key=value"),
    ],
)
def test_what_an_objective_may_not_change_is_refused(tmp_path: Path, override: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        plan_of_file(tmp_path, f"plain: {{name: mle}}\nnoisy: {{name: behavior_cloning, recipe: ['{override}']}}\n")
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([str(ARITHMETIC)], "say what to compare"),
        ([], "give either a recipe"),
        (["--resume", "runs/none", "--steps", "3"], "--steps is for a new comparison"),
        (["--resume", "runs/none"], "not the folder of a comparison"),
        ([str(ARITHMETIC), "--objectives", "mle,emo", "--seeds", "0"], "--seeds"),
        ([str(ARITHMETIC), "--objectives", "mle,reinforce"], "scoring.reward"),
    ],
)
def test_bad_input_ends_with_exit_code_2(arguments: list[str], part: str) -> None:
    result = CliRunner().invoke(app, ["compare", *arguments])
    assert result.exit_code == 2
    assert part in result.stderr
    assert result.stdout == ""


def test_a_dry_run_makes_nothing(tmp_path: Path) -> None:
    arguments = ["compare", str(ARITHMETIC), f"runs_folder={tmp_path}/runs", "--objectives", "mle,emo", "--dry-run"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    (tmp_path / "comparison.yaml").write_text(result.stdout)
    assert list(read_plan(tmp_path).objectives) == ["mle", "emo"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("file", sorted(Path("docs/results/objectives").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_objectives_of_the_documented_results_can_be_compared(file: Path) -> None:
    name, stage = ("text", "behavior_cloning") if file.stem.startswith("text") else ("arithmetic", None)
    recipe = read_recipe(Path(f"launch/recipes/{name}_cpu.yaml"))
    plan = make_plan(recipe, read_objectives(file), 1, stage=stage, steps=500)
    assert all(plan.run_settings(label, 0).stages[-1].steps == 500 for label in plan.objectives)
