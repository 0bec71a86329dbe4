"""Every action's log-probability against transformers on the reduced text, over cache, budget and traffic variants.

Of the model's vocabulary, some ids in the middle and at the end have no token (`IDS_WITHOUT_TOKEN`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from actors.engine.interface import EngineSettings, FinishedRollout, SamplingSettings
from tests.integration.engine_worker import in_engine_process, in_engine_process_for, shared_engine, small_engine
from tests.integration.reference import compare, texts_of
from tests.integration.traffic import Request, rollouts, shared_prompts
from tests.tiny_models import BACKSPACE_ID, CONTRACT, EOS_ID, IDS_WITHOUT_TOKEN, save_tiny_model, tiny_model

TOLERANCE = 1e-4


@dataclass
class Outcome:
    """What a scenario in the engine process brings back."""

    trajectories: list[FinishedRollout]
    num_preemptions: int
    free_blocks_before: int
    free_blocks_after: int
    num_compiled: int
    """Functions that torch was about to compile since the process began."""


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(backspace_rate=0.25)


@pytest.fixture(scope="module")
def model_dir(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), model)


def generate(
    settings: EngineSettings, requests: list[Request], *, reset_every: int = 0, abort_every: int = 0
) -> Outcome:
    """Run requests to their end; now and then preempt everything, or abort one of the running requests."""
    engine = shared_engine(settings, replace(CONTRACT, ids_without_token=IDS_WITHOUT_TOKEN))
    scheduler = engine._core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    preempted = 0
    preempt = scheduler._preempt_request

    def counting_preempt(*args: object, **kwargs: object) -> None:
        nonlocal preempted
        preempted += 1
        preempt(*args, **kwargs)

    scheduler._preempt_request = counting_preempt
    try:
        before = pool.get_num_free_blocks()
        waiting = list(reversed(requests))
        trajectories: list[FinishedRollout] = []
        running: list[str] = []
        num_steps = 0
        while waiting or engine.num_unfinished:
            while waiting and engine.num_unfinished < settings.actors.max_concurrent + 4:
                request = waiting.pop()
                running.append(request.request_id)
                engine.add(request.request_id, request.prompt_ids, request.sampling)
            finished = engine.step()
            num_steps += 1
            running = [name for name in running if name not in {trajectory.request_id for trajectory in finished}]
            trajectories += finished
            if reset_every and num_steps % reset_every == 0:
                scheduler.reset_prefix_cache(reset_running_requests=True)
            if abort_every and num_steps % abort_every == 0 and running:
                trajectories += engine.abort([running.pop(len(running) // 2)])
        compiled = torch._dynamo.utils.counters["frames"]["total"]
        return Outcome(trajectories, preempted, before, pool.get_num_free_blocks(), compiled)
    finally:
        scheduler._preempt_request = preempt


def _check(
    outcome: Outcome,
    requests: list[Request],
    model: PreTrainedModel,
    block_size: int = 32,
    min_returns_to_floor: int = 20,
) -> None:
    """The least counts are far below what any seed gives: on another processor some rollouts go another way."""
    samplings = {request.request_id: request.sampling for request in requests}
    assert sorted(trajectory.request_id for trajectory in outcome.trajectories) == sorted(samplings)
    result = compare(outcome.trajectories, samplings, {0: model}, block_size, IDS_WITHOUT_TOKEN)
    assert not result.errors, "\n".join(result.errors[:10])
    assert result.worst <= TOLERANCE
    assert result.worst_greedy_gap <= TOLERANCE
    assert result.num_backspaces > 0.05 * result.num_actions
    assert result.num_returns_to_floor >= min_returns_to_floor
    assert result.num_back_over_block_edge > 2
    assert outcome.free_blocks_after == outcome.free_blocks_before
    assert outcome.num_compiled == 0
    for trajectory in outcome.trajectories:
        _check_limits(trajectory, samplings[trajectory.request_id])


def _check_limits(trajectory: FinishedRollout, sampling: SamplingSettings, max_length: int = 256) -> None:
    """The finish reason is the first limit that the trajectory met, and no limit was passed."""
    texts = texts_of(trajectory)
    lengths = [len(text) - len(trajectory.prompt_ids) for text in texts[1:]]
    actions = trajectory.actions.tolist()
    final = lengths[-1] if lengths else 0
    if actions:
        final = len(texts[-1]) - len(trajectory.prompt_ids) + (-1 if actions[-1] == BACKSPACE_ID else 1)
    assert all(length < sampling.max_new_tokens for length in lengths)
    assert EOS_ID not in actions[:-1]
    reached_length = final == sampling.max_new_tokens or len(trajectory.prompt_ids) + final == max_length
    if trajectory.finish_reason == "aborted":
        assert len(actions) < sampling.max_actions
    elif actions[-1] == EOS_ID:
        assert trajectory.finish_reason == "eos"
    elif reached_length and actions[-1] != BACKSPACE_ID:
        assert trajectory.finish_reason == "max_length"
    else:
        assert trajectory.finish_reason == "max_actions"
        assert len(actions) == sampling.max_actions


def test_chunked_prefill_with_prefix_cache(model: PreTrainedModel, model_dir: Path) -> None:
    requests = rollouts(60, seed=1)
    _check(in_engine_process(generate, small_engine(model_dir), requests), requests, model)


def test_few_blocks_force_preemption(model: PreTrainedModel, model_dir: Path) -> None:
    requests = rollouts(50, seed=2)
    outcome = in_engine_process(generate, small_engine(model_dir, num_kv_blocks=11), requests)
    assert outcome.num_preemptions > 1
    _check(outcome, requests, model)


def test_mixed_traffic_with_aborts_and_forced_preemption(model: PreTrainedModel, model_dir: Path) -> None:
    requests = rollouts(60, seed=3, share_plain=0.4)
    outcome = in_engine_process(generate, small_engine(model_dir), requests, reset_every=40, abort_every=17)
    assert sum(trajectory.finish_reason == "aborted" for trajectory in outcome.trajectories) > 3
    assert outcome.num_preemptions > 20
    _check(outcome, requests, model)


def test_next_turns_share_blocks_with_earlier_outputs(model: PreTrainedModel, model_dir: Path) -> None:
    """Prompts that continue earlier texts may hit cached blocks; only true ones may be there to hit."""
    settings = small_engine(model_dir)
    first = rollouts(30, seed=4, max_new_tokens=80, max_actions=160)
    outcome = in_engine_process(generate, settings, first)
    texts = [[text for text in texts_of(trajectory) if len(text) < 200] for trajectory in outcome.trajectories]
    second = []
    for index, candidates in enumerate(texts):
        # The longest text that was ever reached, deleted parts included, and the last one.
        for name, text in (("longest", max(candidates, key=len)), ("last", candidates[-1])):
            sampling = SamplingSettings(max_new_tokens=20, max_actions=30, backspace=index % 2 == 0)
            second.append(Request(f"{name}{index}", list(text), sampling))  # type: ignore[arg-type]
    outcome_second = in_engine_process(generate, settings, second)
    samplings = {request.request_id: request.sampling for request in second}
    result = compare(outcome_second.trajectories, samplings, {0: model}, ids_without_token=IDS_WITHOUT_TOKEN)
    assert not result.errors, "\n".join(result.errors[:10])
    _check(outcome, first, model)


def test_length_limit_counts_prompt_and_text(model: PreTrainedModel, model_dir: Path) -> None:
    sampling = SamplingSettings(max_new_tokens=400, max_actions=800, ban_eos=True)
    prompts = shared_prompts(4, 230, seed=5)
    requests = [Request(f"r{i}", prompts[i % 4][: 200 + i], sampling) for i in range(12)]
    outcome = in_engine_process(generate, small_engine(model_dir), requests)
    assert {trajectory.finish_reason for trajectory in outcome.trajectories} == {"max_length"}
    _check(outcome, requests, model, min_returns_to_floor=0)  # texts of 200 tokens rarely go all the way back


def test_draws_after_a_roll_back_are_independent(model_dir: Path) -> None:
    """After `t, <backspace>` the state is as before: t must return at its probability, not always and not never."""
    sampling = SamplingSettings(max_new_tokens=60, max_actions=200, temperature=0.6, ban_eos=True)
    prompts = shared_prompts(4, 20, seed=6)
    requests = [Request(f"r{i}", prompts[i % 4], sampling) for i in range(64)]
    outcome = in_engine_process(generate, small_engine(model_dir, max_batched_tokens=512), requests)
    expected = observed = variance = 0.0
    num_trials = 0
    for trajectory in outcome.trajectories:
        actions = trajectory.actions.tolist()
        for index in range(len(actions) - 2):
            if actions[index] != BACKSPACE_ID and actions[index + 1] == BACKSPACE_ID:
                probability = math.exp(trajectory.logprobs[index])
                expected += probability
                variance += probability * (1 - probability)
                observed += actions[index + 2] == actions[index]
                num_trials += 1
    # The first draw was itself drawn from the distribution, so conditioning on it is harmless.
    assert num_trials > 500
    assert expected > 20
    assert abs(observed - expected) < 4 * math.sqrt(variance)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"enable_prefix_caching": False},
        {"max_batched_tokens": 1024},
        {"block_size": 128, "kv_cache_gib": 1 / 16},
        {"num_kv_blocks": 16, "max_batched_tokens": 17},
        {"max_concurrent": 1, "max_batched_tokens": 32},
        {"num_kv_blocks": 24, "enable_prefix_caching": False, "seed": 7},
    ],
    ids=lambda changes: ",".join(f"{key}={value}" for key, value in changes.items()),
)
def test_sweep(changes: dict[str, object], model: PreTrainedModel, model_dir: Path) -> None:
    requests = rollouts(120, seed=8, longest_prompt=130, share_plain=0.2, max_new_tokens=90, max_actions=150)
    outcome = in_engine_process_for(
        240.0, generate, small_engine(model_dir, **changes), requests, reset_every=150, abort_every=61
    )
    block_size = changes.get("block_size", 32)
    assert isinstance(block_size, int)
    _check(outcome, requests, model, block_size)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tied_embeddings(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_model(kind, tied=True, backspace_rate=0.25)  # type: ignore[arg-type]
    requests = rollouts(60, seed=9)
    outcome = in_engine_process(generate, small_engine(save_tiny_model(tmp_path, model)), requests)
    _check(outcome, requests, model)
