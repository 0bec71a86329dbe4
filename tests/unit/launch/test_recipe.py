"""Recipes: overrides, and errors that say what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from buffer.settings import TextTaskSettings
from launch.errors import UserError
from launch.settings.recipe import read_recipe, write_recipe
from launch.settings.run import introduces_backspace
from learner.settings.model import PretrainedModelSettings

RECIPES = sorted(Path("launch/recipes").glob("*.yaml"))
ARITHMETIC = Path("launch/recipes/arithmetic_cpu.yaml")


def error_of(*overrides: str, path: Path = ARITHMETIC) -> str:
    with pytest.raises(UserError) as caught:
        read_recipe(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_packaged_recipes_are_valid_and_survive_writing(path: Path, tmp_path: Path) -> None:
    settings = read_recipe(path)
    assert settings.result_stage != "mle_control"
    write_recipe(settings, tmp_path / "config.yaml")
    assert read_recipe(tmp_path / "config.yaml") == settings


def test_an_engine_is_divided_only_where_its_heads_can_be() -> None:
    heads = ("model.num_heads=6", "model.hidden_size=192", "model.num_key_value_heads=2", "model.intermediate_size=256")
    assert read_recipe(ARITHMETIC, [*heads, "actors.tensor_parallel_size=2"]).actors.needs()["CPU"] == 2.0
    assert "does not divide the model's 6 attention heads: choose one of 1, 2" in error_of(
        *heads, "actors.tensor_parallel_size=4"
    )
    assert "2 heads of keys and values" in error_of(*heads, "actors.tensor_parallel_size=3")
    sharing = ("actors.tensor_parallel_size=2", "actors.num_gpus=0.5")
    assert "set num_gpus=1, or tensor_parallel_size=1" in error_of(*sharing)


def test_overrides_take_yaml_values() -> None:
    settings = read_recipe(
        ARITHMETIC,
        [
            "cluster.num_cpus=8",
            "task.bases=[10, 16]",
            "buffer.max_staleness=null",
            "noise.kind=random",
            "seed=1",
            "seed=2",
        ],
    )
    assert settings.task.name == "arithmetic"
    assert settings.task.bases == (10, 16)
    assert settings.buffer.max_staleness is None
    assert (settings.noise.kind, settings.cluster.num_cpus, settings.seed) == ("random", 8, 2)


@pytest.mark.parametrize("stage", ["sequencematch", "1"])
def test_a_stage_is_addressed_by_name_or_index(stage: str) -> None:
    before = read_recipe(ARITHMETIC).stages
    after = read_recipe(ARITHMETIC, [f"stages.{stage}.objective.alpha=0.5", f"stages.{stage}.steps=7"]).stages
    assert (after[1].steps, after[1].objective.model_dump()["alpha"]) == (7, 0.5)
    assert (after[0], after[2]) == (before[0], before[2])


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("actor.count=2", ["unknown key 'actor'", "did you mean 'actors'?"]),
        ("actors.cuont=2", ["actors: unknown key 'cuont'", "did you mean 'count'?"]),
        ("stages.sequencematch.objective.alhpa=1", ["did you mean 'alpha'?"]),
        ("stages.pretrain.objective.alpha=1", ["stages.0.objective: unknown key 'alpha'", "known keys: name"]),
        ("task.digits=2", ["task: unknown key 'digits'", "did you mean 'max_digits'?"]),
        ("actors.zzz=2", ["actors: unknown key 'zzz'", "known keys: autoscale, count"]),
        ("actors.count", ["key=value"]),
        ("=2", ["key=value"]),
        ("actors.count=[1", ["'[1' is not a YAML value"]),
        ("noise={kind: task, kind: random}", ["key 'kind' stands twice"]),
        ("stages.nothing.steps=2", ["no entry 'nothing' (entries: pretrain, sequencematch, mle_control)"]),
        ("stages.3.steps=2", ["no entry '3'"]),
        ("name.first=x", ["nothing lies below"]),
        ("actors.count=many", ["actors.count", "valid integer"]),
        ("stages.pretrain.steps=0", ["stages.0.steps", "greater than 0"]),
        ("noise.kind=loud", ["noise.kind", "'policy'"]),
        ("name=a/b", ["name", "pattern"]),
        ("actors.count=0", ["needs rollouts", "set actors.count to 1 or more"]),
        ("result=trunc", ["result names 'trunc'", "pretrain"]),
        ("evaluation.stages=[trunc]", ["evaluation.stages names 'trunc'", "pretrain"]),
        ("stages.pretrain.start_from=mle_control", ["not an earlier stage"]),
        ("stages.mle_control.name=pretrain", ["two stages are called 'pretrain'"]),
        ("learner.publish=adapter", ["the model has none: set model.adapter"]),
        ("buffer={capacity: 32, min_size: 32}", ["rollout_batch_size"]),
        ("trackers=[tensorboard, tensorboard]", ["names one twice"]),
        ("evaluation={loss_examples: 9}", ["evaluation: loss_examples has no effect with every_steps=null"]),
        ("evaluation={questions: 9}", ["evaluation: questions has no effect with every_steps=null"]),
        ("evaluation={patience: 2}", ["evaluation: patience has no effect with every_steps=null"]),
        ("evaluation={every_steps: 5, stop_metric: held_out_accuracy}", ["no effect with patience=null"]),
        ("learner.checkpoint_best_metric=held_out_accuracy", ["known only some steps after", "choose held_out_loss"]),
        ("trackers=[mlflow]", ["'tensorboard', 'wandb' or 'trackio'"]),
        ("stages.sequencematch.objective.divergence=tv", ["exactly maximum likelihood (choose divergence=mle)"]),
    ],
)
def test_what_is_wrong_is_named_with_what_to_write_instead(override: str, parts: list[str]) -> None:
    message = error_of(override)
    assert all(part in message for part in parts), message


def test_evaluation_during_training_is_refused_what_the_run_cannot_give() -> None:
    best = "learner.checkpoint_best_metric=held_out_loss"
    assert read_recipe(ARITHMETIC, ["evaluation.every_steps=250", best]).evaluation.held_out.every_steps == 250
    for every in ("300", "null"):
        message = error_of(f"evaluation.every_steps={every}", best)
        assert "compares checkpoints by the loss of their weights: set evaluation.every_steps to 500" in message
    accuracy = "evaluation={every_steps: 5, patience: 2, stop_metric: held_out_accuracy}"
    assert read_recipe(ARITHMETIC, [accuracy]).evaluation.patience == 2
    data_only = ("stages.sequencematch.objective={name: mle}", "actors.count=0")
    assert "needs a stage with rollout actors" in error_of(accuracy, *data_only)


def test_a_tolerance_in_which_no_step_could_draw_is_refused_with_one_that_would_do() -> None:
    ratio, batch = "buffer.samples_per_insert=0.25", "stages.sequencematch.rollout_batch_size=48"
    message = error_of(ratio, batch, "buffer.min_size=8")
    assert "a sample of 48 policy trajectories does not fit" in message
    assert "Set buffer.samples_per_insert_tolerance to 24.125 or more" in message
    fitting = [ratio, batch, "buffer.min_size=8", "buffer.samples_per_insert_tolerance=24.125"]
    assert read_recipe(ARITHMETIC, fitting).buffer.tolerance == 24.125
    # A stage that draws no rollouts may have any batch size.
    read_recipe(ARITHMETIC, [*fitting, "stages.pretrain.rollout_batch_size=500"])


def test_priorities_come_from_a_stage_that_draws_rollouts() -> None:
    assert read_recipe(ARITHMETIC, ["buffer.sampler=prioritized"]).buffer.sampler == "prioritized"
    overrides = ["stages.sequencematch.objective.divergence=chi2", "noise.kind=policy"]
    message = error_of("buffer.sampler=prioritized", *overrides)
    assert "no stage draws any (pretrain, sequencematch, mle_control): choose another sampler" in message


def test_rollouts_are_not_needed_without_a_stage_that_draws_them() -> None:
    overrides = ["actors.count=0", "stages.sequencematch.objective.divergence=chi2"]
    assert read_recipe(ARITHMETIC, overrides).actors.count == 0
    assert "needs rollouts" in error_of(*overrides, "noise.kind=policy")


def test_keys_of_settings_that_may_be_left_out() -> None:
    path = Path("launch/recipes/text_lora_cpu.yaml")
    assert read_recipe(path, ["learner.publish=adapter"]).learner.publish == "adapter"
    assert "model.adapter: unknown key 'rnak'; did you mean 'rank'?" in error_of("model.adapter.rnak=3", path=path)
    assert "model: unknown key 'adaptre'; did you mean 'adapter'?" in error_of("model.adaptre={}", path=path)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    assert "launch/recipes/" in error_of(path=tmp_path / "nowhere.yaml")
    assert f"{tmp_path} is a folder" in error_of(path=tmp_path)
    broken = tmp_path / "broken.yaml"
    for text, message in (("name: [", "is not valid YAML"), ("- a\n", "holds no settings"), ("name: a\n", "task: ")):
        broken.write_text(text)
        assert message in error_of(path=broken)


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    text = Path("launch/recipes/text_cpu.yaml")
    overrides = [
        "runs_folder=~/runs",
        "model.name=~/model",
        "learner.checkpoint_dir=~/kept",
        "buffer.archive=~/archive",
    ]
    settings = read_recipe(text, [*overrides, "task={name: text, dataset: files, files: [~/a.txt, b~.txt]}"])
    assert isinstance(settings.model, PretrainedModelSettings)
    assert isinstance(settings.task, TextTaskSettings)
    assert settings.runs_folder == "/somewhere/runs"
    assert settings.model.name == "/somewhere/model"
    assert settings.learner.checkpoint_dir == "/somewhere/kept"
    assert settings.buffer.archive == "/somewhere/archive"
    assert settings.task.files == ("/somewhere/a.txt", "b~.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nseed: 1\nname: b\n", "key 'name' stands twice, in line 1 and line 3"),
        ("noise: {rate: 0.1, rate: 0.2}\n", "key 'rate' stands twice, in line 1"),
        ("stages:\n  - name: a\n    steps: 1\n    steps: 2\n", "key 'steps' stands twice, in line 3 and line 4"),
    ],
)
def test_a_key_that_stands_twice_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert error_of(path=path) == f"{path}: {message}: leave one of them out"


def test_a_key_may_stand_in_a_merge_and_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{ARITHMETIC.read_text()}\nlearner:\n  <<: &usual {{num_cpus: 2, num_ranks: 2}}\n  num_cpus: 3\n")
    learner = read_recipe(path).learner
    assert (learner.num_ranks, learner.num_cpus) == (2, 3)


def test_a_recipe_is_read_in_utf8_with_or_without_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(ARITHMETIC.read_text(), encoding="utf-8-sig")
    assert read_recipe(path) == read_recipe(ARITHMETIC)
    path.write_text(f"# f\u00fcr alle\n{ARITHMETIC.read_text()}", encoding="latin-1")
    message = error_of(path=path)
    assert message.startswith(f"{path} is not in UTF-8")
    assert message.endswith("save it as UTF-8")


def test_several_errors_are_told_at_once() -> None:
    message = error_of("actors.cuont=2", "seed=-1")
    assert "did you mean 'count'?" in message
    assert "seed: " in message


def test_a_recipe_written_by_hand_needs_little(tmp_path: Path) -> None:
    tree = {
        "name": "small",
        "task": {"name": "arithmetic"},
        "model": {"source": "scratch"},
        "stages": [{"name": "only", "objective": {"name": "mle"}, "steps": 1}],
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert read_recipe(path).stages[0].batch_size > 0


ADVERSARIAL = ["stages.sequencematch.objective={name: adversarial_js, discriminator: {body: own}}"]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("stages.sequencematch.rollout_batch_size=1", ["'sequencematch'", "set rollout_batch_size to 2 or more"]),
        ("stages.sequencematch.steps=50", ["warmup_steps=50 would never train", "steps=50"]),
        ("actors.rollout.top_p=0.9", ["actors.rollout.top_p=0.9", "set it to 1"]),
        ("buffer.sampler=prioritized", ["choose another sampler"]),
        ("learner.num_ranks=2", ["learner.num_ranks=2", "set learner.num_ranks=1 or discriminator.body=policy"]),
        ("actors.count=0", ["needs rollouts"]),
        ("stages.sequencematch.objective.discriminator.boddy=own", ["did you mean 'body'?"]),
    ],
)
def test_what_an_adversarial_stage_cannot_do(override: str, parts: list[str]) -> None:
    read_recipe(ARITHMETIC, ADVERSARIAL)
    message = error_of(*ADVERSARIAL, override)
    assert all(part in message for part in parts), message


def test_a_discriminator_may_read_a_policy_of_several_ranks_and_copies_no_body_in_four_bits() -> None:
    read_recipe(ARITHMETIC, ["stages.sequencematch.objective={name: adversarial_js}", "learner.num_ranks=2"])
    message = error_of(*ADVERSARIAL, "model.quantization=nf4", path=Path("launch/recipes/text_lora_cpu.yaml"))
    assert "model.quantization=nf4 that is frozen" in message


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize(
    "setting",
    [
        "stages.pretrain.optimizer.learning_rate={}",
        "stages.pretrain.optimizer.betas=[0.9, {}]",
        "stages.sequencematch.objective.alpha={}",
        "noise.rate={}",
        "model.initializer_range={}",
        "learner.num_gpus={}",
        "learner.resources={{x: {}}}",
        "learner.alarms.max_log_prob_mismatch={}",
        "actors.health_timeout_s={}",
        "actors.rollout.temperature={}",
        "buffer.max_age_s={}",
        "cluster.object_store_gib={}",
        "scoring.reward={{name: classifier, model: x, at_least: {}}}",
    ],
)
def test_a_number_that_is_not_finite_is_refused(setting: str, number: str) -> None:
    override = setting.format(number)
    assert "finite number" in error_of(override) or number == "-.inf", override
    assert override.partition("=")[0].rpartition(".")[2] in error_of(override)


TEXT = Path("launch/recipes/text_cpu.yaml")


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        (TEXT, [], ["behavior_cloning"]),
        (TEXT, ["noise.kind=none"], []),
        (TEXT, ["noise.kind=policy"], ["behavior_cloning"]),
        (TEXT, ["stages.behavior_cloning.objective={name: mle}"], ["sequencematch"]),
        (ARITHMETIC, [], ["sequencematch"]),  # its control starts from the pretrain and shows none
        (ARITHMETIC, ["stages.mle_control.objective={name: behavior_cloning}"], ["sequencematch", "mle_control"]),
    ],
)
def test_the_first_stage_of_each_line_that_shows_any(recipe: Path, overrides: list[str], expected: list[str]) -> None:
    settings = read_recipe(recipe, overrides)
    assert [stage.name for stage in settings.stages if introduces_backspace(settings, stage)] == expected
