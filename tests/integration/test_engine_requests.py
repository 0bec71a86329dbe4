"""What single requests can ask for: floor and limits, forced tokens, banned tokens, draws, aborts, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from transformers import PreTrainedModel

from actors.engine.interface import EngineSettings, FinishedRollout, Int32, SamplingSettings
from buffer.trajectory.schema import TokenContract
from tests.integration.engine_worker import answer, in_engine_process, message_of, shared_engine, small_engine
from tests.integration.reference import compare, texts_of
from tests.integration.traffic import Request, rollouts, shared_prompts
from tests.tiny_models import BACKSPACE_ID, CONTRACT, EOS_ID, save_tiny_model, tiny_model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Takes back every other token: greedy decoding appends and deletes the same token for ever."""
    return tiny_model(backspace_rate=0.6)


@pytest.fixture(scope="module")
def settings(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), model)
    return small_engine(folder, max_batched_tokens=64)


def generate(
    settings: EngineSettings,
    requests: list[Request],
    forced_prefixes: dict[str, list[int]],
    preempt_after_steps: tuple[int, ...] = (),
    contract: TokenContract = CONTRACT,
) -> list[FinishedRollout]:
    engine = shared_engine(settings, contract)
    for request in requests:
        engine.add(
            request.request_id, request.prompt_ids, request.sampling, forced_prefixes.get(request.request_id, ())
        )
    trajectories = []
    num_steps = 0
    while engine.num_unfinished:
        trajectories += engine.step()
        num_steps += 1
        if num_steps in preempt_after_steps:
            engine._core.scheduler.reset_prefix_cache(reset_running_requests=True)
    return trajectories


def _assert_exact(
    trajectories: list[FinishedRollout], requests: list[Request], model: PreTrainedModel, **forced_prefixes: list[int]
) -> None:
    result = compare(
        trajectories, {each.request_id: each.sampling for each in requests}, {0: model}, forced_prefixes=forced_prefixes
    )
    assert not result.errors, "\n".join(result.errors[:10])


def test_max_actions_ends_a_policy_that_deletes_for_ever(settings: EngineSettings, model: PreTrainedModel) -> None:
    sampling = SamplingSettings(max_new_tokens=50, max_actions=41, temperature=0.0)
    requests = [Request("loop", shared_prompts(1, 20, seed=0)[0], sampling)]
    (trajectory,) = in_engine_process(generate, settings, requests, {})
    assert trajectory.finish_reason == "max_actions"
    assert len(trajectory.actions) == 41
    assert (trajectory.actions == BACKSPACE_ID).sum() == 20
    _assert_exact([trajectory], requests, model)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_break_the_loop_across_preemption(
    temperature: float, settings: EngineSettings, model: PreTrainedModel
) -> None:
    sampling = SamplingSettings(max_new_tokens=20, max_actions=120, temperature=temperature, ban_deleted=True)
    requests = [Request(f"r{i}", prompt, sampling) for i, prompt in enumerate(shared_prompts(12, 40, seed=1))]
    trajectories = in_engine_process(generate, settings, requests, {}, preempt_after_steps=(9, 30, 55))
    _assert_exact(trajectories, requests, model)
    num_deletions = 0
    for trajectory in trajectories:
        texts = texts_of(trajectory)
        deleted = [(texts[i + 1][:-1], texts[i + 1][-1]) for i in range(len(texts) - 1) if _deletes(trajectory, i + 1)]
        num_deletions += len(deleted)
        assert len(set(deleted)) == len(deleted), "a token was deleted twice at one state"
    assert num_deletions > 100


def _deletes(trajectory: FinishedRollout, index: int) -> bool:
    return bool(trajectory.actions[index] == BACKSPACE_ID)


def test_greedy_with_bans_finishes_where_greedy_alone_does_not(settings: EngineSettings) -> None:
    alone = SamplingSettings(max_new_tokens=8, max_actions=600, temperature=0.0)
    prompts = shared_prompts(6, 30, seed=2)
    requests = [Request(f"alone{i}", prompt, alone) for i, prompt in enumerate(prompts)]
    banned = alone.model_copy(update={"ban_deleted": True})
    requests += [Request(f"banned{i}", prompt, banned) for i, prompt in enumerate(prompts)]
    trajectories = in_engine_process(generate, settings, requests, {})
    reasons = {trajectory.request_id: trajectory.finish_reason for trajectory in trajectories}
    assert {reasons[f"alone{i}"] for i in range(6)} == {"max_actions"}
    assert sum(reasons[f"banned{i}"] != "max_actions" for i in range(6)) >= 4


@pytest.mark.parametrize("backspace", [True, False])
def test_forced_tokens_are_forced_once(backspace: bool, settings: EngineSettings, model: PreTrainedModel) -> None:
    sampling = SamplingSettings(max_new_tokens=30, max_actions=40, backspace=backspace)
    requests = [Request(f"r{i}", prompt, sampling) for i, prompt in enumerate(shared_prompts(16, 33, seed=3))]
    forced_prefixes = {f"r{i}": [100 + i, 50, 60, 70][: 1 + i % 4] for i in range(16)}
    # Preempted in the middle of the forced tokens, right after them, and later.
    trajectories = in_engine_process(generate, settings, requests, forced_prefixes, preempt_after_steps=(9, 11, 13, 20))
    num_deleted = 0
    for trajectory in trajectories:
        forced = forced_prefixes[trajectory.request_id]
        assert trajectory.actions[: len(forced)].tolist() == forced
        floor = len(trajectory.prompt_ids)
        num_deleted += sum(len(text) == floor for text in texts_of(trajectory)[1:])
    assert (num_deleted > 5) == backspace  # some trajectories took all of their forced tokens back and went on
    _assert_exact(trajectories, requests, model, **forced_prefixes)


def test_each_eos_of_several_ends_a_rollout(settings: EngineSettings, model: PreTrainedModel) -> None:
    contract = replace(CONTRACT, other_eos_ids=tuple(range(40, 60)))
    sampling = SamplingSettings(max_new_tokens=30, max_actions=90)
    requests = [Request(f"r{i}", prompt, sampling) for i, prompt in enumerate(shared_prompts(16, 33, seed=5))]
    endless = sampling.model_copy(update={"ban_eos": True})
    banned = [replace(each, request_id=f"b{i}", sampling=endless) for i, each in enumerate(requests)]
    trajectories = in_engine_process(generate, settings, [*requests, *banned], {}, contract=contract)
    ends = {trajectory.actions[-1] for trajectory in trajectories if trajectory.finish_reason == "eos"}
    assert len(ends & set(contract.other_eos_ids)) > 1
    assert ends <= set(contract.eos_ids)
    for trajectory in trajectories:
        assert not np.isin(
            trajectory.actions[: None if trajectory.finish_reason != "eos" else -1], contract.eos_ids
        ).any()
        assert (trajectory.finish_reason == "eos") <= trajectory.request_id.startswith("r")
    assert not compare(
        [trajectory for trajectory in trajectories if trajectory.request_id[0] == "r"],
        {r.request_id: sampling for r in requests},
        {0: model},
    ).errors


def draw_while_running(
    settings: EngineSettings, requests: list[Request], prefixes: list[Int32]
) -> tuple[list[FinishedRollout], list[FinishedRollout], int]:
    engine = shared_engine(settings)
    for request in requests:
        engine.add(request.request_id, request.prompt_ids, request.sampling)
    engine.step()
    drawn = engine.sample_next_tokens(prefixes)
    unfinished = engine.num_unfinished
    return drawn, answer(engine), unfinished


def test_draws_of_next_tokens_beside_running_requests(settings: EngineSettings, model: PreTrainedModel) -> None:
    requests = rollouts(20, seed=5, max_new_tokens=20, max_actions=30)
    prefixes = [prompt[: 5 + i] for i, prompt in enumerate(shared_prompts(40, 60, seed=6))]
    drawn, trajectories, unfinished = in_engine_process(draw_while_running, settings, requests, prefixes)
    assert unfinished == len(requests), "a request that ended during the draws must come out of a later step"
    _assert_exact(trajectories, requests, model)
    for prefix, trajectory in zip(prefixes, drawn, strict=True):
        assert trajectory.prompt_ids.tolist() == prefix.tolist()
        assert len(trajectory.actions) == 1
        assert trajectory.actions[0] != BACKSPACE_ID
    # <eos> has its share of the probability: a policy that would end there makes no mistake, so such a draw is void.
    sampling = SamplingSettings(max_new_tokens=1, max_actions=1, backspace=False)
    result = compare(drawn, {trajectory.request_id: sampling for trajectory in drawn}, {0: model})
    assert not result.errors, "\n".join(result.errors)
    assert result.num_actions == 40


def abort_midway(settings: EngineSettings, requests: list[Request]) -> tuple[list[FinishedRollout], int, int]:
    engine = shared_engine(settings)
    before = engine._core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    for request in requests:
        engine.add(request.request_id, request.prompt_ids, request.sampling)
    finished = []
    for _ in range(12):
        finished += engine.step()
    aborted = engine.abort([request.request_id for request in requests] + ["unknown"])
    assert engine.num_unfinished == 0
    assert engine.step() == []
    after = engine._core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    return finished + aborted, before, after


def test_abort_returns_what_was_done_so_far(settings: EngineSettings, model: PreTrainedModel) -> None:
    sampling = SamplingSettings(max_new_tokens=60, max_actions=100, ban_eos=True)
    prompts = shared_prompts(24, 20, seed=7)
    requests = [Request(f"r{i}", prompt, sampling) for i, prompt in enumerate(prompts)]
    trajectories, before, after = in_engine_process(abort_midway, settings, requests)
    assert {trajectory.finish_reason for trajectory in trajectories} == {"aborted"}
    assert sorted({len(trajectory.actions) for trajectory in trajectories})[0] == 0  # some never left the queue
    assert max(len(trajectory.actions) for trajectory in trajectories) > 5
    assert before == after
    _assert_exact(trajectories, requests, model)


def refusals(settings: EngineSettings) -> dict[str, str]:
    engine = shared_engine(settings)
    fine = SamplingSettings(max_new_tokens=5, max_actions=10)
    attempts: dict[str, tuple[list[int], SamplingSettings, list[int]]] = {
        "empty prompt": ([], fine, []),
        "long prompt": ([5] * 256, fine, []),
        "foreign id": ([5, 256], fine, []),
        "negative id": ([5, -1], fine, []),
        "backspace in the prompt": ([5, BACKSPACE_ID], fine, []),
        "forced eos": ([5], fine, [EOS_ID]),
        "forced backspace": ([5], fine, [BACKSPACE_ID]),
        "too much forced": ([5], fine, [7] * 6),
    }
    messages = {
        name: message_of(lambda request=request: engine.add("refused", *request)) for name, request in attempts.items()
    }
    engine.add("twice", [5], fine)
    messages["twice"] = message_of(lambda: engine.add("twice", [5], fine))
    messages["bad draw"] = message_of(lambda: engine.sample_next_tokens([[5], [5, 999]]))
    messages["short probe"] = message_of(lambda: engine.probe([5]))
    messages["long probe"] = message_of(lambda: engine.probe([5] * 256))
    assert engine.num_unfinished == 1, "a refused request must leave nothing behind"
    answer(engine)
    return messages


def test_bad_requests_are_refused_with_a_reason(settings: EngineSettings) -> None:
    messages = in_engine_process(refusals, settings)
    expected = {
        "empty prompt": "has 0",
        "long prompt": "has 256",
        "foreign id": "prompt_ids holds ids outside of the vocabulary of 256",
        "negative id": "prompt_ids holds ids outside",
        "backspace in the prompt": "prompt_ids holds id 3",
        "forced eos": "forced_prefix holds id 2",
        "forced backspace": "forced_prefix holds id 3",
        "too much forced": "a forced prefix of 6 tokens, its limits allow 5",
        "twice": "'twice' is already in use",
        "bad draw": "prompt_ids holds ids outside",
        "short probe": "this one has 1",
        "long probe": "this one has 256",
    }
    assert messages.keys() == expected.keys()
    for name, text in expected.items():
        assert text in messages[name]


def test_a_ban_without_an_effect_is_refused() -> None:
    with pytest.raises(ValueError, match="ban_deleted has no effect without backspace"):
        SamplingSettings(backspace=False, ban_deleted=True)
