"""What an evaluation asks of the model itself, against plain forward passes: perplexity, search, features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from actors.engine.interface import SamplingSettings
from buffer.experts.ragged import Ragged
from buffer.trajectory.schema import TokenContract
from launch.evaluation.learner_model import contrastive_rollouts, held_out_metrics
from launch.evaluation.mauve_score import model_features
from launch.evaluation.rollouts import RolloutGroup
from launch.settings.evaluation import ContrastiveSearch
from tests.tiny_models import BACKSPACE_ID, EOS_ID, FIRST_TEXT_ID, IDS_WITHOUT_TOKEN, VOCAB_SIZE, tiny_model

CONTRACT = TokenContract(VOCAB_SIZE, BACKSPACE_ID, EOS_ID, "hash", IDS_WITHOUT_TOKEN)
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(backspace_rate=0.3, seed=1)


def random_ids(rng: np.random.Generator, length: int) -> list[int]:
    return rng.integers(FIRST_TEXT_ID, IDS_WITHOUT_TOKEN[0][0], length).tolist()


@torch.no_grad()
def logits_after(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([ids])).logits[0, -1].double()
    for begin, end in IDS_WITHOUT_TOKEN:
        logits[begin:end] = -torch.inf
    return logits


def test_perplexity_equals_plain_forward_passes(model: PreTrainedModel) -> None:
    rng = np.random.default_rng(0)
    prompts = [random_ids(rng, length) for length in (3, 3, 5, 1)]
    targets = [random_ids(rng, length) for length in (4, 2, 6, 1)]
    targets[1].append(EOS_ID)
    losses, without, backspaces = [], [], []
    for prompt, target in zip(prompts, targets, strict=True):
        for index, token in enumerate(target):
            logits = logits_after(model, prompt + target[:index])
            masked = logits.clone()
            masked[BACKSPACE_ID] = -torch.inf
            without.append(-masked.log_softmax(0)[token].item())
            # At the end of the prompt there is nothing to take back.
            losses.append(without[-1] if index == 0 else -logits.log_softmax(0)[token].item())
            if index > 0:
                backspaces.append(logits.softmax(0)[BACKSPACE_ID].item())
    found = held_out_metrics(model, Dataset.from_dict({"prompt_ids": prompts, "target_ids": targets}), CONTRACT, 64)
    # Of this sharp model it is about e^200: the nats are compared, a power would magnify their rounding.
    assert np.log(found["perplexity"].value) == pytest.approx(np.mean(losses), rel=1e-5)
    assert np.log(found["perplexity_without_backspace"].value) == pytest.approx(np.mean(without), rel=1e-5)
    assert found["backspace_prob"].value == pytest.approx(np.mean(backspaces), rel=1e-4)
    assert found["perplexity"].count == len(found["perplexity"].influence) == 4
    assert found["perplexity"].value > found["perplexity_without_backspace"].value * 1.1


def shortfall(model: PreTrainedModel, prompt: list[int], answer: list[int], k: int, alpha: float) -> float:
    """How far the worst token of an answer is below the best one, by its score or by its place among the candidates;
    0 for an exact search, but for rounding, which decides between equals.
    """
    decoder = model.get_decoder()
    worst = 0.0
    for index, chosen in enumerate(answer):
        text = [*prompt, *answer[:index]]
        logits = logits_after(model, text)
        logits[BACKSPACE_ID] = -torch.inf
        probs = logits.softmax(0)
        scores = {}
        for candidate in {*probs.topk(k).indices.tolist(), chosen}:
            with torch.no_grad():
                states = decoder(torch.tensor([[*text, candidate]])).last_hidden_state[0]
            similarity = torch.nn.functional.cosine_similarity(states[-1:], states[:-1]).max().item()
            scores[candidate] = (1 - alpha) * probs[candidate].item() - alpha * similarity
        worst = max(worst, max(scores.values()) - scores[chosen], (probs.topk(k).values[-1] - probs[chosen]).item())
    return worst


def test_contrastive_search_equals_a_loop_without_cache(model: PreTrainedModel) -> None:
    rng = np.random.default_rng(2)
    prompts = [np.array(random_ids(rng, length), dtype=np.int32) for length in (4, 6, 4, 4)]
    sampling = SamplingSettings(max_new_tokens=6, max_actions=20, temperature=0.0, backspace=False)
    group = RolloutGroup(prompts, sampling, name="contrastive", contrastive=ContrastiveSearch(4, 0.6))
    finished: list[int] = []
    batch = contrastive_rollouts(model, group, CONTRACT, 11, "text", finished.append)
    room = [6, 5, 6, 6]  # the second prompt reaches the longest text first
    answers = batch.column("actions").to_pylist()
    for answer, most in zip(answers, room, strict=True):
        assert len(answer) == (answer.index(EOS_ID) + 1 if EOS_ID in answer else most)
    by_loop = [shortfall(model, p.tolist(), answer, 4, 0.6) for p, answer in zip(prompts, answers, strict=True)]
    assert max(by_loop) < ROUNDING
    assert batch.column("prompt_ids").to_pylist() == [prompt.tolist() for prompt in prompts]
    assert sum(finished) == 4
    greedy = [shortfall(model, p.tolist(), answer, 4, 0.0) for p, answer in zip(prompts, answers, strict=True)]
    assert max(greedy) > 100 * ROUNDING  # the penalty matters to this model


def test_contrastive_search_ends_at_eos(model: PreTrainedModel) -> None:
    ender = tiny_model(seed=2)
    with torch.no_grad():
        ender.get_output_embeddings().weight[EOS_ID] += 20 * ender.get_output_embeddings().weight[BACKSPACE_ID]
    prompt = np.array([7, 8, 9], dtype=np.int32)
    sampling = SamplingSettings(max_new_tokens=6, max_actions=20, temperature=0.0, backspace=False)
    group = RolloutGroup([prompt, prompt], sampling, name="contrastive", contrastive=ContrastiveSearch(2, 0.0))
    batch = contrastive_rollouts(ender, group, CONTRACT, 20, "text", lambda _: None)
    first, second = batch.column("actions").to_pylist()
    assert first == second
    assert first.index(EOS_ID) == len(first) - 1
    assert shortfall(ender, prompt.tolist(), first, 2, 0.0) < ROUNDING
    assert batch.column("finish_reason").to_pylist() == ["eos"] * 2


def test_model_features_do_not_see_the_padding(model: PreTrainedModel) -> None:
    rng = np.random.default_rng(3)
    rows = [random_ids(rng, length) for length in (5, 0, 9, 1)]
    texts = Ragged.from_lengths(
        np.array([len(row) for row in rows]), np.array([i for row in rows for i in row], dtype=np.int32)
    )
    found = model_features(model, texts, EOS_ID)
    for row, feature in zip(rows, found, strict=True):
        with torch.no_grad():
            alone = model.get_decoder()(torch.tensor([[EOS_ID, *row]])).last_hidden_state[0, -1]
        np.testing.assert_allclose(feature, alone.numpy(), atol=1e-5)
