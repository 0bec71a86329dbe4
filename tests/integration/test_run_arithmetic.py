"""A whole run, from the command line to the last checkpoint: one run of seconds, looked at from many sides.

Every published version of the weights is kept as a checkpoint, so that every action of every rollout in the buffer can
be computed again by transformers.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from buffer.custom import TRUSTED_MODULES
from buffer.experts.tasks import load_task
from buffer.trajectory.schema import TokenContract
from buffer.trajectory.validation import validate
from buffer.weights import fingerprint, pack_tensors
from launch.api import open_run
from launch.settings.recipe import read_recipe
from launch.settings.run import RunSettings
from learner.checkpoints.store import read_progress
from learner.publication import publication_tensors
from tests import custom_parts
from tests.checkpoints import checkpoints_of
from tests.integration.train_process import (
    ARITHMETIC,
    ROOT,
    TINY,
    TrainProcess,
    metrics_of,
    trajectories_of,
    trajectory_of,
)

STEPS = {"pretrain": 20, "sequencematch": 40, "mle_control": 5}
PUBLISH_EVERY = 10
MAX_STALENESS = 2
RUN_TIMEOUT_S = 280.0
ROLLOUT_METRICS = {"policy_version", "staleness_mean", "staleness_max"}


@dataclass(frozen=True)
class FinishedRun:
    folder: Path
    settings: RunSettings
    contract: TokenContract
    rows: list[dict[str, object]]
    """The policy's rollouts."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    # As on a machine without a compiler, and without what another run may have compiled: eager engines compile nothing.
    bare = {**os.environ, "CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("compiled"))}
    evaluated = f"evaluation={{every_steps: {PUBLISH_EVERY}, questions: 8}}"
    overrides = ("--no-evaluate", *TINY, evaluated)
    with TrainProcess(tmp_path_factory.mktemp("runs"), ARITHMETIC, *overrides, environment=bare) as process:
        assert process.wait(RUN_TIMEOUT_S) == 0, process.printed()
        process.assert_nothing_left()
        folder = process.folder
    settings = read_recipe(folder / "config.yaml")
    task = load_task(settings.task, max_length=64)
    model = AutoModelForCausalLM.from_pretrained(checkpoints_of(folder / "checkpoints" / "pretrain")[-1])
    contract = task.contract(model.config.vocab_size)
    batches = trajectories_of(folder)
    rows = pa.Table.from_batches(batches).to_pylist()
    return FinishedRun(folder, settings, contract, rows)


def checkpoint(run: FinishedRun, stage: str, step: int) -> Path:
    return run.folder / "checkpoints" / stage / f"step-{step:06d}"


def models_by_version(run: FinishedRun) -> dict[int, PreTrainedModel]:
    """Version 0 is the initial model, version 1 what the stage starts from, then one every PUBLISH_EVERY steps."""
    paths = {1: checkpoint(run, "pretrain", STEPS["pretrain"])}
    for step in range(PUBLISH_EVERY, STEPS["sequencematch"] + 1, PUBLISH_EVERY):
        paths[1 + step // PUBLISH_EVERY] = checkpoint(run, "sequencematch", step)
    return {version: AutoModelForCausalLM.from_pretrained(path) for version, path in paths.items()}


def test_every_step_of_every_stage_is_logged_once_with_finite_numbers(run: FinishedRun) -> None:
    expected = [(stage, step) for stage, steps in STEPS.items() for step in range(1, steps + 1)]
    rows = metrics_of(run.folder)
    assert [(row["stage"], row["step"]) for row in rows] == expected
    for row in rows:
        numbers = [value for name, value in row.items() if name != "stage"]
        assert all(value is not None and math.isfinite(value) for value in numbers), row
    for stage in STEPS:
        rows = metrics_of(run.folder, stage)
        names = {frozenset(name for name in row if not name.startswith("held_out_")) for row in rows}
        assert len(names) == 1, f"metrics of {stage} come and go"
        assert (names.pop() >= ROLLOUT_METRICS) == (stage == "sequencematch")


def test_evaluations_are_logged_and_leave_the_rollouts_alone(run: FinishedRun) -> None:
    for stage, steps in STEPS.items():
        evaluated = [row["step"] for row in metrics_of(run.folder, stage) if "held_out_loss" in row]
        assert evaluated == sorted({*range(PUBLISH_EVERY, steps + 1, PUBLISH_EVERY), steps})
    lines = trajectory_of(run.folder)
    answered = [line for line in lines if line["event"] == "questions_answered"]
    assert answered, "no actor answered"
    told = [line["held_out_accuracy"] for line in answered]
    for row in metrics_of(run.folder, "sequencematch"):
        if "held_out_accuracy" in row:
            assert row["held_out_answers_version"] == 1 + row["held_out_answers_step"] // PUBLISH_EVERY
            assert row["held_out_accuracy"] == pytest.approx(told.pop(0), rel=1e-5)
    task = load_task(run.settings.task, max_length=64)
    training = {tuple(ids) for ids in task.train["prompt_ids"]}
    assert {tuple(row["prompt_ids"]) for row in run.rows} <= training, "an answer is in the buffer"


def test_rollouts_reach_the_learner_within_the_staleness_bound(run: FinishedRun) -> None:
    rows = metrics_of(run.folder, "sequencematch")
    # Step s is taken with the version published after the last multiple of PUBLISH_EVERY before it.
    assert [row["policy_version"] for row in rows] == [1 + (row["step"] - 1) // PUBLISH_EVERY for row in rows]
    assert all(0 <= row["staleness_mean"] <= row["staleness_max"] <= MAX_STALENESS for row in rows)
    assert any(row["staleness_max"] > 0 for row in rows)
    ratio = run.settings.buffer.samples_per_insert
    assert ratio is not None
    assert len(run.rows) * ratio >= STEPS["sequencematch"] * 8, "more draws than the ratio of draws to inserts allows"


def test_what_the_actors_stored_holds_every_invariant(run: FinishedRun) -> None:
    for batch in trajectories_of(run.folder):
        assert validate(batch, run.contract).rejections == ()
    assert {row["source"] for row in run.rows} == {"policy"}
    assert all(count == 1 for count in Counter(row["id"] for row in run.rows).values())
    assert any(run.contract.backspace_id in row["actions"] for row in run.rows)
    newest = 1 + STEPS["sequencematch"] // PUBLISH_EVERY
    # Nothing from version 0: the actors waited for the weights that the stage starts from.
    assert all(1 <= version <= newest for row in run.rows for version in row["policy_version"])
    assert len({version for row in run.rows for version in row["policy_version"]}) >= 3


def test_stored_log_probabilities_are_those_of_the_version_that_acted(run: FinishedRun) -> None:
    models = models_by_version(run)
    actions_by_version: dict[int, list[tuple[list[int], int, int, float]]] = defaultdict(list)
    for row in run.rows:
        text = list(row["prompt_ids"])
        for action, version, recorded in zip(row["actions"], row["policy_version"], row["logprobs"], strict=True):
            actions_by_version[version].append((list(text), len(row["prompt_ids"]), action, recorded))
            if action == run.contract.backspace_id:
                text.pop()
            else:
                text.append(action)
    assert len(actions_by_version[1]) > 50
    for version, actions in actions_by_version.items():
        worst = max(abs(expected - recorded) for expected, recorded in recompute(run, models[version], actions))
        assert worst < 1e-4, f"version {version}: {worst:.2g} nats over {len(actions)} actions"
        others = [other for other in models if other != version]
        wrong = models[min(others, key=lambda other: abs(other - version))]
        difference = max(abs(expected - recorded) for expected, recorded in recompute(run, wrong, actions))
        assert difference > 1e-3, "the neighboring version explains the rollouts as well, so this proves nothing"


@torch.no_grad()
def recompute(
    run: FinishedRun, model: PreTrainedModel, actions: list[tuple[list[int], int, int, float]]
) -> list[tuple[float, float]]:
    """(log-probability by transformers, recorded one) of each action: text before it, its floor, itself."""
    pairs = []
    for start in range(0, len(actions), 512):
        group = actions[start : start + 512]
        ids = torch.zeros(len(group), max(len(text) for text, *_ in group), dtype=torch.int64)
        for index, (text, *_) in enumerate(group):
            ids[index, : len(text)] = torch.tensor(text)
        last = torch.tensor([len(text) - 1 for text, *_ in group])
        logits = model(ids).logits[torch.arange(len(group)), last].float()
        at_floor = torch.tensor([len(text) == floor for text, floor, *_ in group])
        logits[at_floor, run.contract.backspace_id] = -math.inf
        chosen = logits.log_softmax(-1).gather(1, torch.tensor([[action] for _, _, action, _ in group]))[:, 0]
        pairs += [(float(value), recorded) for value, (*_, recorded) in zip(chosen, group, strict=True)]
    return pairs


def test_checkpoints_are_bit_for_bit_what_was_published(run: FinishedRun) -> None:
    by_version: dict[int, set[object]] = defaultdict(set)
    for row in run.rows:
        by_version[max(row["policy_version"])].add(row["weights_fingerprint"])
    models = models_by_version(run)
    assert len(by_version) >= 3
    for version, found in by_version.items():
        payload, entries = pack_tensors(publication_tensors(models[version]))
        assert found == {fingerprint(entries, payload)}, f"version {version}"


def test_checkpoints_stand_alone(run: FinishedRun) -> None:
    for stage, steps in STEPS.items():
        final = checkpoints_of(run.folder / "checkpoints" / stage)[-1]
        assert final == checkpoint(run, stage, steps)
        assert read_progress(final).finished
        tokenizer = AutoTokenizer.from_pretrained(final)
        config = json.loads((final / "config.json").read_text())
        assert config["backspace_token_id"] == run.contract.backspace_id
        assert tokenizer.convert_ids_to_tokens(run.contract.backspace_id) == run.settings.model.backspace_token
        assert tokenizer.eos_token_id == run.contract.eos_id
        model = AutoModelForCausalLM.from_pretrained(final)
        assert model.config.vocab_size == run.contract.vocab_size
    # Both stages moved away from the pretrain they share, each its own way.
    weights = [
        AutoModelForCausalLM.from_pretrained(checkpoint(run, stage, steps)).get_input_embeddings().weight
        for stage, steps in STEPS.items()
    ]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[1], weights[2])


def test_the_run_folder_is_that_of_a_run_that_ended(run: FinishedRun) -> None:
    names = {path.name for path in run.folder.iterdir()}
    files = {"config.yaml", "environment.txt", "run_id", "metrics.jsonl", "checkpoints.json", "lock"}
    assert names == files | {
        "examples.json",
        "report.html",
        "used_configs",
        "logs",
        "tensorboard",
        "tokenizer",
        "buffer",
        "checkpoints",
    }


def test_the_log_tells_the_run_from_beginning_to_end(run: FinishedRun) -> None:
    lines = trajectory_of(run.folder)
    assert {line["run"] for line in lines} == {run.folder.name}
    assert [lines[0]["event"], lines[-1]["event"]] == ["run_started", "run_finished"]
    begun = [line["stage"] for line in lines if line["event"] == "stage_started"]
    assert begun == list(STEPS)
    assert {line["role"] for line in lines} == {"driver", "learner", "pool", "actor", "buffer"}
    loaded = [line["version"] for line in lines if line["event"] == "weights_loaded"]
    assert loaded
    assert loaded == sorted(loaded)


def own(name: str, **options: object) -> dict[str, object]:
    return {"name": "custom", "path": f"{custom_parts.__name__}:{name}", "options": options}


def test_a_run_of_parts_of_the_users_own(tmp_path: Path) -> None:
    """Objective, task, scorer and sampler, each in the processes that load it, and in an evaluation."""
    stage = {"name": "own", "objective": own("Doubled", weight=1.5), "steps": 8}
    recipe = {
        **{"name": "own", "task": own("Listed", held_out=6), "evaluation": {"examples": 6}},
        "model": {"source": "scratch", "hidden_size": 64, "num_heads": 2, "num_layers": 1, "max_positions": 64},
        "stages": [stage | {"batch_size": 8, "rollout_batch_size": 8}],
        "scoring": {"reward": own("Near", scale=0.5)},
        "buffer": {"min_size": 16, "sampler": own("Newest")},
        "actors": {"rollout": {"max_new_tokens": 8, "max_actions": 16}, "insert_batch_size": 8, "kv_cache_gib": 0.25},
        "cluster": {"num_cpus": 4, "object_store_gib": 0.25},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    environment = os.environ | {TRUSTED_MODULES: custom_parts.__name__, "PYTHONPATH": str(ROOT)}
    with TrainProcess(tmp_path / "runs", str(file), environment=environment) as process:
        assert process.wait(RUN_TIMEOUT_S) == 0, process.printed()
        process.assert_nothing_left()
        run = open_run(process.folder)  # here the module is not trusted, and nothing of it runs
    assert run.metrics("own").column("step").to_pylist() == list(range(1, 9))
    rows = run.query("select prompt_text, final_text, reward from trajectories").to_pylist()
    assert rows
    for found in rows:
        sum_of_digits = str(sum(map(int, found["prompt_text"].rstrip("=").split("+"))))
        assert found["reward"] == 1.0 - 0.5 * abs(len(found["final_text"]) - len(sum_of_digits))
    drawn = run.query('select step, list("row") as rows from draws group by step').to_pylist()
    assert len(drawn) == 8
    assert all(each["rows"] == sorted(each["rows"], reverse=True) for each in drawn), "the newest first"
    assert run.evaluation is not None
    assert "accuracy" in run.evaluation.checkpoints[0].metrics["greedy"]
