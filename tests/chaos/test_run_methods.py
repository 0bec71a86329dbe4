"""The methods that go by features of rollouts, in one run: without backspace, and with a scorer that fails at times.

All stages start from the pretrain, so what acts at their first steps are its weights: those rollouts are computed
again.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from buffer.experts.tasks import load_task
from launch.settings.recipe import read_recipe
from tests.checkpoints import checkpoints_of
from tests.integration import failing_scores
from tests.integration.test_run_arithmetic import FinishedRun, recompute
from tests.integration.train_process import ROOT, TINY, TrainProcess, metrics_of, trajectories_of, trajectory_of
from tests.unit.actors.test_classifier import save as save_classifier

RECIPE = "launch/recipes/arithmetic_kl_control_cpu.yaml"
RUN_TIMEOUT_S = 280.0
pytestmark = pytest.mark.slow
SMALL = {"feature": "small", "target": 0.7}
METHODS = {
    "dpg": {"name": "dpg", "constraints": [SMALL], "fit_samples": 32},
    "gdc": {"name": "gdc", "constraints": [{"feature": "brief"}, SMALL], "fit_samples": 32},
    "gdc_pp": {"name": "gdc_pp", "constraints": [{"feature": "brief"}]},
    "f_dpg": {"name": "f_dpg", "divergence": "reverse_kl", "constraints": [SMALL], "fit_samples": 32},
    "never": {"name": "gdc_pp", "constraints": [{"feature": "never"}]},
}
FITTED = ("dpg", "gdc", "f_dpg")
OUT_OF_REACH = {"name": "dpg", "constraints": [{"feature": "never", "target": 0.5}], "fit_samples": 16}
STEPS = 8
FEATURES = {
    "small": {"name": "custom", "path": f"{failing_scores.__name__}:LastDigitIsSmall"},
    "brief": {"name": "length", "at_most": 2},
    "never": {"name": "word", "word": "never"},
}


def stage(name: str, objective: dict[str, object]) -> dict[str, object]:
    sizes = {"steps": STEPS, "rollout_batch_size": 16, "publish_every_steps": 2}
    return {"name": name, "start_from": "pretrain", "objective": objective, **sizes}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    pretrain = {"name": "pretrain", "objective": {"name": "mle"}, "steps": 60, "batch_size": 16}
    stages = [pretrain, *(stage(*method) for method in METHODS.items()), stage("out_of_reach", OUT_OF_REACH)]
    classifier = save_classifier(tmp_path_factory.mktemp("classifier"), id2label={0: "dull", 1: "fine"})
    features = FEATURES | {"fine": {"name": "classifier", "model": str(classifier), "label": "fine"}}
    overrides = [
        *(each for each in TINY if each.startswith(("model.", "cluster.")) or each == "buffer.fsync=none"),
        f"stages={json.dumps(stages)}",
        "evaluation={}",
        f"scoring={json.dumps({'features': features})}",
        "actors.rollout.backspace=false",
        "actors.max_concurrent=16",
        "actors.insert_batch_size=8",
        "buffer.min_size=16",
    ]
    environment = os.environ | {"SEQUENCEMATCH_TRUSTED_MODULES": failing_scores.__name__, "PYTHONPATH": str(ROOT)}
    folder = tmp_path_factory.mktemp("runs")
    with TrainProcess(folder, RECIPE, "--no-evaluate", *overrides, environment=environment) as process:
        assert process.wait(RUN_TIMEOUT_S) == 1, process.printed()
        # The last stage asks for what no weight gives. It says so, and what was done before stands.
        assert "never over prompts lies between 0 and 0 in the " in process.stderr.splitlines()[-1], process.printed()
        assert "no weight of it gives a mean of 0.5" in process.stderr.splitlines()[-1]
        assert "Traceback" not in process.stderr
        process.assert_nothing_left()
        folder = process.folder
    settings = read_recipe(folder / "config.yaml")
    contract = load_task(settings.task, max_length=64).contract()
    rows = pa.Table.from_batches(trajectories_of(folder)).to_pylist()
    return FinishedRun(folder, settings, contract, rows)


def weights(run: FinishedRun, name: str) -> dict[str, torch.Tensor]:
    return load_file(final(run, name) / "model.safetensors")


def final(run: FinishedRun, name: str) -> Path:
    return checkpoints_of(run.folder / "checkpoints" / name)[-1]


@pytest.mark.parametrize("name", METHODS)
def test_each_method_takes_its_steps(run: FinishedRun, name: str) -> None:
    rows = metrics_of(run.folder, name)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(math.isfinite(value) for row in rows for key, value in row.items() if key != "stage")
    fitting = [row["fitting"] for row in rows]
    assert fitting == sorted(fitting, reverse=True)
    assert (fitting[0], fitting[-1]) == (float(name in FITTED), 0.0)
    # Nothing has moved yet: policy, sampler and frozen start are one, so engine and learner mask backspace alike.
    assert rows[0]["kl_base"] == pytest.approx(0.0, abs=1e-4)
    assert rows[0]["importance_weight_mean"] == pytest.approx(1.0, abs=1e-3)
    assert rows[0]["log_prob_mismatch_max_abs"] < 1e-4
    start, end = weights(run, "pretrain"), weights(run, name)
    assert all(torch.equal(end[key], start[key]) for key in start) == (name == "never")


def test_a_constraint_that_no_rollout_meets_is_said(run: FinishedRun) -> None:
    for row in metrics_of(run.folder, "never"):
        assert (row["loss"], row["gradient_norm"], row["unsatisfied_fraction"], row["alarm_unsatisfied"]) == (
            0,
            0,
            1,
            1,
        )
    assert any("few rollouts meet the pointwise constraints" in line["message"] for line in trajectory_of(run.folder))


def test_rollouts_are_those_of_the_policy_without_backspace(run: FinishedRun) -> None:
    """The stored log-probabilities, by transformers; with backspace among the actions they would be others."""
    first_versions = {metrics_of(run.folder, name)[0]["policy_version"] for name in METHODS}
    backspace_id = run.contract.backspace_id
    masked, offered = [], []
    for row in run.rows:
        assert row["sampling"] == {"temperature": 1.0, "top_p": 1.0, "backspace": False}
        assert backspace_id not in row["actions"]
        if not set(row["policy_version"]) <= first_versions:
            continue
        text = list(row["prompt_ids"])
        for action, recorded in zip(row["actions"], row["logprobs"], strict=True):
            masked.append((list(text), len(text), action, recorded))  # every state as if it were the floor
            offered.append((list(text), 0, action, recorded))
            text.append(action)
    model = AutoModelForCausalLM.from_pretrained(final(run, "pretrain"))
    assert len(masked) > 200
    assert max(abs(expected - recorded) for expected, recorded in recompute(run, model, masked)) < 1e-4
    assert max(abs(expected - recorded) for expected, recorded in recompute(run, model, offered)) > 1e-3


def test_rollouts_without_a_number_are_dropped_and_the_run_goes_on(run: FinishedRun) -> None:
    reasons = [line["message"] for line in trajectory_of(run.folder) if line["event"] == "rollouts_dropped"]
    assert reasons
    assert all(
        re.search(r" feature small \(\S+:LastDigitIsSmall\) (raised ValueError: invalid literal|is nan)", reason)
        for reason in reasons
    )
    assert all(row["features"][0] in (0.0, 1.0) for row in run.rows)


def test_a_classifier_scores_beside_the_engine(run: FinishedRun) -> None:
    scores = {row["features"][-1] for row in run.rows}
    assert all(0.0 < score < 1.0 for score in scores)
    assert len(scores) > 1
