"""An exported model in the engine, and adapters pushed into it: both are the policy that the learner trains."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from actors.engine.interface import FinishedRollout
from buffer.weights import WeightManifest, WeightPayload, fingerprint, pack_tensors, unpack
from launch.export import export
from learner.model.policy import Policy, load_policy
from learner.publication import frozen_tensors, low_rank_updates, trained_tensors
from learner.settings.model import AdapterSettings, PretrainedModelSettings
from learner.state_tree.policy import TreePolicy
from tests.checkpoints import progress_at, save_checkpoint
from tests.integration.engine_worker import answer, fresh_engine, in_engine_process_for, small_engine
from tests.integration.reference import Comparison, compare
from tests.integration.traffic import Request, rollouts
from tests.tiny_models import BACKSPACE_ID, FIRST_TEXT_ID, VOCAB_SIZE, tiny_model
from tests.unit.learner.test_adapters import train_a_little
from tests.unit.learner.test_model import word_tokenizer

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
PROBE = tuple(range(FIRST_TEXT_ID, FIRST_TEXT_ID + 16))
PROGRESS = progress_at(1, stage="sequencematch", stage_steps=1)


@dataclass
class Outcome:
    """What the engine process brings back: rollouts of the export, rollouts of the push after it, its probe."""

    exported: list[FinishedRollout]
    pushed: list[FinishedRollout]
    probe_logprobs: np.ndarray


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    """A tiny model with tied embeddings that takes tokens back, and adapters that have moved."""
    base = tmp_path / "base"
    model = tiny_model(tied=True)
    model.config.backspace_token_id = BACKSPACE_ID
    model.save_pretrained(base)
    word_tokenizer("<backspace>", size=VOCAB_SIZE).save_pretrained(base)
    settings = PretrainedModelSettings(name=str(base), dtype="float32", adapter=AdapterSettings(rank=4))
    found = load_policy(settings)
    assert found.backspace_id == BACKSPACE_ID
    train_a_little(found.model)
    return found


def generate(folder: str, requests: list[Request], manifest: WeightManifest, payload: WeightPayload) -> Outcome:
    engine = fresh_engine(small_engine(folder))
    exported = answer(engine, requests)
    engine.load_weights(unpack(payload, manifest), manifest.version)
    return Outcome(exported, answer(engine, requests), engine.probe(PROBE))


def check(result: Comparison) -> None:
    assert not result.errors, "\n".join(result.errors[:5])
    assert result.worst <= TOLERANCE
    assert result.num_backspaces > 0.02 * result.num_actions


def test_an_export_and_a_push_of_adapters_generate_as_the_learners_model(policy: Policy, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "run", policy.model, policy.tokenizer, PROGRESS, {"step": 1}, 1)
    out = export(tmp_path / "run" / "step-000001", tmp_path / "out").out
    exported = AutoModelForCausalLM.from_pretrained(out)

    train_a_little(policy.model, seed=2)
    # Adapters apart, so the engine's side merges.
    payload, entries = pack_tensors(chain(frozen_tensors(policy.model), trained_tensors(policy.model)))
    logprobs, before = (TreePolicy(m, BACKSPACE_ID).sequence_logprobs(PROBE) for m in (policy.model, exported))
    manifest = WeightManifest(
        1, fingerprint(entries, payload), entries, PROBE, tuple(logprobs.tolist()), low_rank_updates(policy.model)
    )
    assert abs(logprobs - before).max() > 0.1, "the push changes nothing"

    requests = rollouts(24, seed=7)
    outcome = in_engine_process_for(120.0, generate, str(out), requests, manifest, payload)
    samplings = {request.request_id: request.sampling for request in requests}
    check(compare(outcome.exported, samplings, {0: exported}))
    check(compare(outcome.pushed, samplings, {1: policy.model}))
    assert abs(outcome.probe_logprobs - logprobs).max() <= TOLERANCE
