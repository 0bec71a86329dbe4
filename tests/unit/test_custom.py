"""Objectives, tasks, scorers and samplers of the user's own: how they are found, what is refused, and what they do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from actors.scoring import Answer, make_scorer
from buffer.custom import TRUSTED_MODULES
from buffer.experts.tasks import load_task
from buffer.settings import BufferSettings, CustomSettings
from buffer.store.sampling import make_sampler
from launch.cli import app
from launch.errors import UserError
from launch.run.checks import check_custom_parts
from launch.run_folder.resuming import why_fixed
from launch.settings.recipe import read_recipe, to_yaml
from learner.objectives import make_objective
from learner.objectives.sequencematch import SequenceMatch
from learner.settings.objectives import CustomObjectiveSettings
from learner.settings.stages import StageSettings
from tests import custom_parts
from tests.stores import draw, open_store
from tests.training import HandMadeRollouts, make_model, make_stream, make_trainer
from tests.trajectories import batch_of, row

RECIPE = Path("launch/recipes/arithmetic_cpu.yaml")
MODULE = custom_parts.__name__


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUSTED_MODULES, f"other, {MODULE}")


def part(name: str, **options: object) -> dict[str, object]:
    return {"name": "custom", "path": f"{MODULE}:{name}", "options": options}


def custom(name: str, **options: object) -> CustomSettings:
    return CustomSettings.model_validate(part(name, **options))


def override(key: str, name: str, **options: object) -> str:
    return f"{key}={json.dumps(part(name, **options))}"


OBJECTIVE = "stages.sequencematch.objective"
ALL_FOUR = (
    override("task", "Listed"),
    override(OBJECTIVE, "Doubled", weight=1.5),
    override("scoring.reward", "Near", scale=0.5),
    override("buffer.sampler", "Newest"),
)


def test_a_recipe_with_all_four_is_accepted_and_reads_back_without_running_code(monkeypatch):
    settings = read_recipe(RECIPE, ALL_FOUR)
    check_custom_parts(settings)
    monkeypatch.delenv(TRUSTED_MODULES)
    assert read_recipe(settings.model_dump(mode="json")) == settings  # as config.yaml of a run does
    assert "needs_rollouts: true" in to_yaml(settings)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (override("task", "Listed"), "task of the recipe runs code, class tests.custom_parts:Listed. Read it, and if"),
        (override(OBJECTIVE, "Doubled"), "objective of the recipe runs code, class tests.custom_parts:Doubled"),
        (override("scoring.reward", "Near"), "reward of the recipe runs code"),
        (override("scoring.features.f", "Near"), "feature f of the recipe runs code"),
        (override("buffer.sampler", "Newest"), "buffer.sampler of the recipe runs code"),
    ],
)
def test_no_code_runs_that_is_not_trusted_by_name(override, message, monkeypatch, tmp_path):
    """`tests` is another module than `tests.custom_parts`. The command leaves nothing."""
    monkeypatch.setenv(TRUSTED_MODULES, "tests, other")
    result = CliRunner().invoke(app, ["train", str(RECIPE), f"runs_folder={tmp_path}", "--no-evaluate", override])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert f"{TRUSTED_MODULES}={MODULE}" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "task={name: custom, path: tests.custom_parts.Listed}",
            "task.path: 'tests.custom_parts.Listed' is not of the form MODULE:CLASS",
        ),
        ("task={name: custom, paht: 'a:B'}", "task: unknown key 'paht'; did you mean 'path'?"),
        (f"{OBJECTIVE}={{name: custom, path: nothing}}", "objective.path: 'nothing' is not of the form MODULE:CLASS"),
        ("buffer.sampler={name: custom}", "buffer.sampler.path: Field required"),
        ("buffer.sampler=newest", "buffer.sampler: Input should be 'uniform', 'fifo'"),
        (override("task", "Lsited"), f"module {MODULE} has no class Lsited: correct `path`"),
        (override("task", "Near"), f"{MODULE}:Near is not a class with the methods of buffer.experts.tasks.CustomTask"),
        (override("buffer.sampler", "Listed"), "with the methods of buffer.store.sampling.Sampler"),
        (override("scoring.reward", "Newest"), "with the methods of actors.scoring.Scorer"),
        (override("scoring.reward", "np"), f"{MODULE}:np is not a class with the methods of"),
        (override(OBJECTIVE, "Newest"), f"{MODULE}:Newest is no objective: derive it from"),
        (override(OBJECTIVE, "Near"), f"{MODULE}:Near is no objective: derive it from learner.objectives.base"),
        (override("task", "Listed", held=3), f"{MODULE}:Listed: options: unknown key 'held'; did you mean 'held_out'?"),
        (override("task", "Listed", held_out="x"), f"{MODULE}:Listed: options.held_out: Input should be a valid int"),
        (override("task", "Listed", held_out=51), "Listed: held_out=51 leaves nothing to train on"),
        (override("task", "Texts", x=1), f"{MODULE}:Texts takes no options"),
        (override(OBJECTIVE, "Doubled", alpha=-1), "Doubled: options.alpha: Input should be greater than 0"),
        (override(OBJECTIVE, "Greedy"), "raises a reward, and the recipe has none"),
    ],
)
def test_what_is_wrong_is_said_in_one_message(override, message):
    with pytest.raises(UserError) as caught:
        check_custom_parts(read_recipe(RECIPE, [override]))
    assert message in str(caught.value)


def test_the_examples_of_the_documentation(tmp_path, monkeypatch):
    text = Path("docs/api.md").read_text(encoding="utf-8").partition("## Your own parts")[2]
    recipe, module = (text.partition(f"```{language}\n")[2].partition("```")[0] for language in ("yaml", "python"))
    (tmp_path / "my_parts.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(TRUSTED_MODULES, "my_parts")
    # A likelihood needs no rollouts, so one of our objectives goes with it.
    tree = yaml.safe_load(recipe)
    tree["stages"].append({"name": "sequencematch", "objective": {"name": "sequencematch"}, "steps": 1})
    given = yaml.safe_load(RECIPE.read_text())
    settings = read_recipe({**given, **tree, "evaluation": {}, "result": "own"})
    check_custom_parts(settings)
    assert load_task(settings.task).held_out[0]["target"] == "Madrid"
    assert list(make_scorer(settings.scoring.reward)([Answer("p", "12345", 5, "1", True)])) == [0.0]
    assert make_sampler(settings.buffer)(5, 2, np.random.default_rng(0), np.zeros).tolist() == [3, 4]
    assert make_objective(settings.stages[0].objective).settings.scale == 0.5


def test_a_module_that_cannot_be_imported(monkeypatch):
    monkeypatch.setenv(TRUSTED_MODULES, "no_such_module")
    settings = read_recipe(RECIPE, ["scoring.reward={name: custom, path: 'no_such_module:Score'}"])
    with pytest.raises(UserError, match=r"no_such_module:Score cannot be imported .*PYTHONPATH"):
        check_custom_parts(settings)


def test_the_needs_of_an_objective_are_respected():
    reward = "scoring.reward={name: exact_answer}"
    with pytest.raises(UserError, match=r"needs feature 'brief', which scoring\.features does not have"):
        read_recipe(RECIPE, [override(OBJECTIVE, "Greedy"), reward])
    needed = [override(OBJECTIVE, "Greedy"), reward, "scoring.features.brief={name: length, at_most: 3}"]
    with pytest.raises(UserError, match=r"actors\.rollout\.top_p=0\.9 the sampler never makes"):
        read_recipe(RECIPE, [*needed, "actors.rollout.top_p=0.9"])
    with pytest.raises(UserError, match=r"needs rollouts, but actors\.count is 0"):
        read_recipe(RECIPE, [*needed, "actors.count=0"])
    objective = read_recipe(RECIPE, needed).stages[1].objective
    assert (objective.needs_experts, objective.needs_features) == (False, ("brief",))
    with pytest.raises(ValueError, match="says needs_experts=False, and the settings True: leave it out"):
        make_objective(objective.model_copy(update={"needs_experts": True}))


def test_options_shaped_the_steps_whatever_they_are_called():
    assert why_fixed("stages.own.objective.options.steps")
    assert not why_fixed("stages.own.steps")


def test_an_objective_is_made_from_its_options(task):
    settings = CustomObjectiveSettings.model_validate(part("Doubled", weight=3.0, alpha=0.05))
    assert (settings.needs_rollouts, settings.uses_noise, settings.needs_reward) == (True, True, False)
    assert hash(settings) == hash(settings.model_copy())
    own = make_objective(settings)
    assert isinstance(own, SequenceMatch)
    assert (own.settings.weight, own.settings.alpha) == (3.0, 0.05)
    stage = StageSettings(name="own", objective=settings, steps=2, batch_size=4, rollout_batch_size=4)
    torch.manual_seed(0)
    trainer = make_trainer(task, make_model(task), stage, make_stream(task), HandMadeRollouts(task))
    assert np.isfinite(trainer.train_step()["loss"])


def test_a_task_from_a_list():
    task = load_task(custom("Listed", held_out=7), max_length=12)
    assert (task.name, len(task.train), len(task.held_out)) == ("custom", 48, 7)
    first = task.held_out[0]
    assert (first["prompt"], first["target"]) == ("0+0=", "0")
    assert task.tokenizer.decode(first["prompt_ids"]) == "0+0="
    assert first["target_ids"] == [*task.tokenizer("0")["input_ids"], task.eos_id]
    assert task.is_correct("0", first)
    assert not task.is_correct("1", first)
    assert task.contract() == load_task(custom("Listed")).contract()
    assert load_task(custom("Texts")).is_correct is None
    with pytest.raises(ValueError, match="takes 7 tokens, but the model takes 6"):
        load_task(custom("Listed"), max_length=6)
    with pytest.raises(ValueError, match="gives 1 examples to train on and 0 that are held out"):
        load_task(custom("Nothing"))
    with pytest.raises(ValueError, match="Listed: held_out=51 leaves nothing to train on"):
        load_task(custom("Listed", held_out=51))


def test_a_scorer_knows_answer_and_reference():
    answers = [Answer("p", "12", 2, "12", True), Answer("p", "1", 1, "123", True)]
    assert list(make_scorer(custom("Near", scale=0.5))(answers)) == [1.0, 0.0]


def test_a_sampler_chooses_in_a_store(tmp_path):
    store = open_store(tmp_path / "b", sampler=part("Newest"))
    store.insert(batch_of([row(f"a{number}") for number in range(6)]))
    batch = draw(store, 2, 1)
    assert batch is not None
    assert batch.column("id").to_pylist() == ["a5", "a4"]
    store.close()


def test_a_sampler_may_ask_for_every_column(tmp_path):
    store = open_store(tmp_path / "b")
    store.insert(batch_of([row("a", reward=0.5), row("b", [4, 4], policy_version=[3, 4]), row("c", task="other")]))
    rows = store._shard.table.live_rows("policy")
    column = store._shard.gather.column
    assert np.isnan(column("reward", rows)).tolist() == [False, True, True]
    assert column("oldest_version", rows).tolist() == [0, 3, 0]
    assert column("times_sampled", rows).tolist() == [0, 0, 0]
    assert len(set(column("task", rows).tolist())) == 2
    assert column("priority", rows).tolist() == [1, 1, 1]
    assert (column("created_us", rows) > 0).all()
    store.close()


def test_what_a_sampler_chooses_is_checked():
    choose = make_sampler(BufferSettings.model_validate({"sampler": part("Repeating")}))
    with pytest.raises(ValueError, match=r"Repeating has to choose 3 distinct integers from 0 to 4: it gave \[0 0 0\]"):
        choose(5, 3, np.random.default_rng(0), np.zeros)
    choose = make_sampler(BufferSettings.model_validate({"sampler": part("Beyond")}))
    with pytest.raises(ValueError, match=r"from 0 to 4: it gave \[5 6 7\]"):
        choose(5, 3, np.random.default_rng(0), np.zeros)
