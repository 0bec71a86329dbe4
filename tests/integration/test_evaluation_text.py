"""Evaluation of texts with a real engine: a model that rather takes everything back, in every way to decode."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from actors.settings import RolloutSettings
from buffer.experts.tasks import load_task
from buffer.settings import TextTaskSettings
from launch.errors import UserError
from launch.evaluation.results import Evaluation, Target
from launch.evaluation.run import evaluate
from launch.settings.evaluation import EvaluationSettings, MauveSettings
from launch.settings.recipe import read_recipe
from launch.settings.run import RunSettings
from learner.model.policy import load_policy
from tests.checkpoints import progress_at, save_checkpoint
from tests.integration.engine_worker import in_engine_process_for
from tests.tiny_models import make_constant

pytestmark = pytest.mark.slow  # for the engine's process
pytest.importorskip("mauve", reason="needs the extra `mauve`")

RECIPE = Path("launch/recipes/arithmetic_cpu.yaml")
TARGET_TOKENS, MAX_ACTIONS = 8, 24


def make_settings(folder: Path) -> RunSettings:
    rng = np.random.default_rng(0)
    files = []
    for number in range(4):
        files.append(folder / f"{number}.txt")
        files[-1].write_text("".join(rng.choice(list("abcdefgh "), 400)))
    settings = read_recipe(RECIPE, ["model.hidden_size=64", "model.num_heads=2", "model.num_layers=1"])
    task = TextTaskSettings(
        dataset="files",
        files=tuple(map(str, files)),
        prompt_tokens=6,
        target_tokens=TARGET_TOKENS,
        held_out_fraction=0.5,
    )
    rollout = RolloutSettings(max_new_tokens=TARGET_TOKENS, max_actions=MAX_ACTIONS)
    evaluation = EvaluationSettings(
        examples=24,
        decoding=("greedy", "top_p=0.9", "contrastive=3:0.5"),
        ban_deleted="both",
        mauve=MauveSettings(features="model", clusters=2),
        shown_rollouts=2,
    )
    actors = settings.actors.model_copy(update={"rollout": rollout})
    return settings.model_copy(update={"task": task, "evaluation": evaluation, "actors": actors})


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> RunSettings:
    return make_settings(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def hesitant(settings: RunSettings, tmp_path_factory: pytest.TempPathFactory) -> Target:
    policy = load_policy(settings.model, load_task(settings.task).tokenizer)
    make_constant(policy.model, policy.backspace_id)
    folder = tmp_path_factory.mktemp("hesitant")
    return Target("hesitant", save_checkpoint(folder, policy.model, policy.tokenizer, progress_at(1), {}))


def evaluate_in_engine_process(target: Target, settings: RunSettings) -> Evaluation:
    return evaluate([target], settings, Console(file=io.StringIO()))


def test_every_way_to_decode_a_policy_that_takes_everything_back(settings: RunSettings, hesitant: Target) -> None:
    evaluation = in_engine_process_for(180.0, evaluate_in_engine_process, hesitant, settings)
    metrics = evaluation.checkpoints[0].metrics
    assert list(metrics) == [
        "sampled", "greedy", "top_p=0.9", "contrastive=3:0.5", "recovery",
        "sampled, banned", "greedy, allowed", "top_p=0.9, banned", "recovery, banned", "held_out",
    ]  # fmt: skip
    # What was forced is taken back before it writes anything of its own.
    assert metrics["recovery"]["recovery"].value > 0.9
    assert "recovery" not in metrics["sampled"]
    # Greedily it writes, takes back, and writes the same again until the actions are used up; with the ban it moves on.
    circles = metrics["greedy, allowed"]
    assert circles["rewritten_rate"].value == pytest.approx(1 - 2 / MAX_ACTIONS)  # nothing follows the last one
    assert circles["max_actions_rate"].value == 1.0
    assert circles["longest_rewrite_run"].value == MAX_ACTIONS // 2 - 1
    assert circles["tokens_per_text"].value == 0.0
    assert metrics["greedy"]["rewritten_rate"].value == 0.0
    assert metrics["sampled, banned"]["rewritten_rate"].value == 0.0 < metrics["sampled"]["rewritten_rate"].value
    # The search never takes back, and the model has nothing to tell texts by.
    assert metrics["contrastive=3:0.5"]["backspace_rate"].value == 0.0
    held_out = metrics["held_out"]
    assert held_out["perplexity"].value > 1.5 * held_out["perplexity_without_backspace"].value
    # All tokens but backspace are alike to it.
    num_tokens = len(load_task(settings.task).tokenizer) - 1
    assert held_out["perplexity_without_backspace"].value == pytest.approx(num_tokens, rel=1e-3)
    assert all(numbers["mauve"].count == 24 for group, numbers in metrics.items() if group != "held_out")
    assert "accuracy, wrong and right tokens taken back" in evaluation.left_out
    assert evaluation.conditions["mauve"]["clusters"] == 2


def test_too_few_texts_end_before_the_engine_starts(settings: RunSettings, hesitant: Target) -> None:
    wanting = settings.evaluation.model_copy(update={"mauve": MauveSettings(features="model", clusters=9)})
    with pytest.raises(
        UserError, match=r"needs 90 texts .* raise task.held_out_fraction, or lower --mauve-clusters to 2"
    ):
        evaluate([hesitant], settings.model_copy(update={"evaluation": wanting}), Console(file=io.StringIO()))
