"""Evaluation and generation with a real engine: one process evaluates two checkpoints, the tests look at what it found.

The models are made, not trained: one always ends at once, the other takes every token back, so that the numbers are
known beforehand.
"""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from buffer.experts.tasks import load_task
from launch.api import generate
from launch.errors import UserError
from launch.evaluation.report import show_evaluation, write_evaluation
from launch.evaluation.results import Evaluation, Target
from launch.evaluation.rollouts import KeptRollouts
from launch.evaluation.run import evaluate, labeled, settings_for
from launch.generation import Rollout, encode_prompt, open_checkpoint, rollout_to_json
from launch.settings.evaluation import GREEDY, RECOVERY, SAMPLED
from launch.settings.recipe import read_recipe, write_recipe
from launch.settings.run import RunSettings
from learner.model.policy import load_policy
from tests.checkpoints import progress_at, save_checkpoint
from tests.integration.engine_worker import EngineProcessFailed, in_engine_process_for
from tests.tiny_models import make_constant

# Starting the engine's process, vLLM's import included, takes half a minute and more on a busy machine.
pytestmark = pytest.mark.slow

RECIPE = Path("launch/recipes/arithmetic_cpu.yaml")
NUM_EXAMPLES = 40
OVERRIDES = (
    "model.hidden_size=64",
    "model.num_heads=2",
    "model.num_layers=1",
    "task.train_questions=50",
    f"task.held_out_questions={NUM_EXAMPLES}",
    "evaluation.shown_rollouts=4",
)


def make_run(folder: Path) -> Path:
    """A run folder with two finished stages, `ender` and `hesitant`."""
    settings = read_recipe(RECIPE, OVERRIDES)
    folder.mkdir()
    write_recipe(settings, folder / "config.yaml")
    task = load_task(settings.task, max_length=64)
    for stage, likely in (("ender", "eos"), ("hesitant", "backspace")):
        policy = load_policy(settings.model, task.tokenizer)
        make_constant(policy.model, policy.tokenizer.eos_token_id if likely == "eos" else policy.backspace_id)
        progress = progress_at(1, stage=stage, stage_steps=1)
        save_checkpoint(folder / "checkpoints" / stage, policy.model, policy.tokenizer, progress, {})
    return folder


def checkpoint_of(run: Path, stage: str) -> Path:
    return run / "checkpoints" / stage / "step-000001"


def evaluate_in_engine_process(run: Path, stages: list[str], settings: RunSettings) -> Evaluation:
    targets = labeled([checkpoint_of(run, stage) for stage in stages])
    return evaluate(targets, settings, Console(file=io.StringIO()))


def evaluate_and_count(run: Path, settings: RunSettings, keep_in: Path, kill_after: int | None) -> tuple[int, ...]:
    """Evaluate both stages; gives how many groups of rollouts were made, what was found, and what was said.

    kill_after: end the process, by kill -9, when so many groups are kept.
    """
    original, made = KeptRollouts.keep, 0

    def counted(kept: KeptRollouts, key: str, batch: pa.RecordBatch) -> None:
        nonlocal made
        original(kept, key, batch)
        made += 1
        if made == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    console = Console(file=io.StringIO(), width=200)
    KeptRollouts.keep = counted
    try:
        targets = labeled([checkpoint_of(run, stage) for stage in ("ender", "hesitant")])
        evaluation = evaluate(targets, settings, console, keep_in)
    finally:
        KeptRollouts.keep = original
    return made, evaluation, console.file.getvalue()


def generate_in_engine_process(checkpoint: Path, prompts: list[str], temperature: float) -> list[Rollout]:
    return generate(checkpoint, prompts, count=3, temperature=temperature, max_new_tokens=5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def settings(run: Path) -> RunSettings:
    return settings_for(checkpoint_of(run, "ender"), None)


@pytest.fixture(scope="module")
def evaluation(run: Path, settings: RunSettings) -> Evaluation:
    return in_engine_process_for(120.0, evaluate_in_engine_process, run, ["ender", "hesitant"], settings)


def test_numbers_of_known_policies(evaluation: Evaluation) -> None:
    assert (evaluation.task, evaluation.num_examples, evaluation.has_answers) == ("arithmetic", NUM_EXAMPLES, True)
    ender, hesitant = evaluation.checkpoints
    assert (ender.label, hesitant.label) == ("ender", "hesitant")
    # Greedily it ends at once, so that no answer is right, and a forced token stays.
    assert ender.metrics[GREEDY]["empty_rate"].value == 1.0
    assert ender.metrics[GREEDY]["actions_per_answer"].value == 1.0
    assert ender.metrics[GREEDY]["accuracy"].value == 0.0
    assert ender.metrics[RECOVERY]["forced_tokens_deleted"].value == 0.0
    # The other takes what was forced back, each time, and nothing that was taken back is offered again.
    assert hesitant.metrics[RECOVERY]["forced_tokens_deleted"].value == 1.0
    assert hesitant.metrics[SAMPLED]["backspace_rate"].value > 0.2
    for result in evaluation.checkpoints:
        for numbers in result.metrics.values():
            assert all(number.count > 0 or number.value is None for number in numbers.values())
        assert result.metrics[GREEDY]["accuracy"].count == NUM_EXAMPLES


def test_weights_are_replaced_between_checkpoints_and_order_does_not_matter(
    evaluation: Evaluation, run: Path, settings: RunSettings
) -> None:
    other = in_engine_process_for(120.0, evaluate_in_engine_process, run, ["hesitant", "ender"], settings)
    assert {result.label: result.metrics for result in other.checkpoints} == {
        result.label: result.metrics for result in evaluation.checkpoints
    }


def test_an_interrupted_evaluation_goes_on_and_finds_the_same(
    evaluation: Evaluation, run: Path, settings: RunSettings, tmp_path: Path
) -> None:
    with pytest.raises(EngineProcessFailed, match="died"):
        in_engine_process_for(120.0, evaluate_and_count, run, settings, tmp_path, 3)
    files = sorted((tmp_path / "rollouts").iterdir())
    assert len(files) == 3
    files[0].write_bytes(files[0].read_bytes()[:-1])
    made, resumed, said = in_engine_process_for(120.0, evaluate_and_count, run, settings, tmp_path, None)
    assert made == 6 - 3 + 1  # of three groups for each of two checkpoints, one was damaged
    assert said.count("damaged") == 1
    assert resumed.to_json() == evaluation.to_json()
    again, repeated, _ = in_engine_process_for(120.0, evaluate_and_count, run, settings, tmp_path, None)
    assert again == 0
    assert repeated.to_json() == evaluation.to_json()


def test_report_files_and_table(evaluation: Evaluation, tmp_path: Path) -> None:
    write_evaluation(evaluation, tmp_path)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert [entry["label"] for entry in written["checkpoints"]] == ["ender", "hesitant"]
    assert written["seed"] == 0
    number = written["checkpoints"][1]["metrics"]["greedy"]["accuracy"]
    assert number.keys() == {"value", "standard_error", "n"}
    assert number["n"] == NUM_EXAMPLES
    samples = (tmp_path / "samples" / "hesitant.txt").read_text()
    assert samples.count("│") == 4  # between prompt and answer
    assert samples.count("[-{") == 2  # the forced tokens, taken back
    console = Console(file=io.StringIO(), width=80)
    show_evaluation(evaluation, console)
    shown = console.file.getvalue()
    assert shown.count("[-{") == 2  # no terminal, so deletions are marked in the text
    assert all(len(line.rstrip()) <= 80 for line in shown.splitlines())
    (row,) = (line for line in shown.splitlines() if line.startswith("ender "))
    assert "100.0" not in row
    change = written["checkpoints"][1]["differences"]["sampled"]["backspace_rate"]
    assert change["value"] > 0.2
    assert change["within_noise"] is False
    assert "minus ender" in shown


def test_generation_shows_deletions_and_stops_at_the_bound(run: Path) -> None:
    prompts = ["In base 10, what is 1 + 1?", "In base 10, what is 12 - 3?"]
    for temperature in (0.0, 1.0):
        rollouts = in_engine_process_for(
            120.0, generate_in_engine_process, checkpoint_of(run, "hesitant"), prompts, temperature
        )
        assert [rollout.prompt for rollout in rollouts] == [prompt for prompt in prompts for _ in range(3)]
        assert all(len(rollout.text) <= 5 * len("<bos>") for rollout in rollouts)
        assert any("[-" in str(rollout_to_json(rollout)["log"]) for rollout in rollouts)
        for rollout in rollouts:
            assert len(rollout.actions) == len(rollout.logprobs) == len(rollout.is_backspace)
            assert rollout.num_deletions == sum(rollout.is_backspace)
            assert np.isfinite(rollout.logprobs).all()
            assert (rollout.num_deletions > 0) == any(segment.deleted for segment in rollout.segments)


def test_prompts_that_cannot_be_answered(run: Path) -> None:
    opened = open_checkpoint(checkpoint_of(run, "ender"))
    with pytest.raises(ValueError, match="has 64 tokens, the model's context holds 64"):
        encode_prompt(opened, "1" * 64)
    assert len(encode_prompt(opened, "1" * 63)) == 63
    with pytest.raises(ValueError, match="no token for 'é'"):
        encode_prompt(opened, "é1")
    with pytest.raises(ValueError, match="empty"):
        encode_prompt(opened, "")
    with pytest.raises(ValueError, match="leave it out"):
        encode_prompt(opened, "1<backspace>")


def test_labels_tell_checkpoints_apart(run: Path, tmp_path: Path) -> None:
    ender = checkpoint_of(run, "ender")
    later = ender.with_name("step-000002")
    assert [target.label for target in labeled([ender])] == ["ender"]
    assert [target.label for target in labeled([ender, later])] == ["ender/step-000001", "ender/step-000002"]
    assert [target.label for target in labeled([tmp_path / "model"])] == ["model"]
    other = tmp_path / "other" / "checkpoints" / "ender" / "step-000001"
    assert [target.label for target in labeled([ender, other])] == [run.name, "other"]
    assert [target.label for target in labeled([ender, later, other])] == [
        f"{run.name}/ender/step-000001",
        f"{run.name}/ender/step-000002",
        "other/ender/step-000001",
    ]
    with pytest.raises(UserError, match="named twice"):
        labeled([ender, ender])


def test_checkpoints_of_other_models_are_refused(run: Path, settings: RunSettings, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tree = read_recipe(RECIPE, [*OVERRIDES, "model.hidden_size=96", "model.num_heads=3"])
    policy = load_policy(tree.model, open_checkpoint(checkpoint_of(run, "ender")).tokenizer)
    policy.model.save_pretrained(other)
    with pytest.raises(ValueError, match="has no tokenizer"):
        open_checkpoint(other)
    policy.tokenizer.save_pretrained(other)
    with pytest.raises(AssertionError, match="different models cannot be compared"):
        in_engine_process_for(120.0, evaluate_paths_in_engine_process, [checkpoint_of(run, "ender"), other], settings)


def evaluate_paths_in_engine_process(paths: list[Path], settings: RunSettings) -> Evaluation:
    return evaluate([Target(path.name, path) for path in paths], settings, Console(file=io.StringIO()))
