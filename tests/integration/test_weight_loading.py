"""New weights in a running engine: tied and untied, in flight, after a start without weights, incomplete."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from actors.engine.interface import EngineSettings, FinishedRollout, Float32, Int32
from tests.integration.engine_worker import answer, fresh_engine, in_engine_process, message_of, small_engine
from tests.integration.reference import compare, sequence_logprobs
from tests.integration.traffic import Request, rollouts, shared_prompts
from tests.tiny_models import perturbed, save_tiny_model, tiny_model

TOLERANCE = 1e-4
PROBE = shared_prompts(1, 100, seed=11)[0]
Tensors = dict[str, torch.Tensor]


def _parameters(model: PreTrainedModel) -> Tensors:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@dataclass
class UpdateOutcome:
    """Logs of requests that lived through updates, and what happened around the probes."""

    logs: list[FinishedRollout]
    probes: list[Float32]
    actions_moved_by_probes: int
    noise_moved_by_probes: bool
    free_blocks_before: int
    free_blocks_after: int


def update_in_flight(
    settings: EngineSettings, updates: list[Tensors], requests: list[Request], probe: Int32
) -> UpdateOutcome:
    """Load each update after some steps, with requests running and waiting, and probe after each and in between."""
    engine = fresh_engine(settings)
    scheduler = engine._core.scheduler
    free_before = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    waiting = list(reversed(requests))
    logs: list[FinishedRollout] = []
    probes = []
    moved = 0
    noise_moved = False

    def probed() -> None:
        nonlocal moved, noise_moved
        states = {name: _num_actions(request) for name, request in scheduler.requests.items()}
        noise = torch.get_rng_state()
        probes.append(engine.probe(probe))
        noise_moved |= not torch.equal(noise, torch.get_rng_state())
        moved += sum(_num_actions(r) != states[name] for name, r in scheduler.requests.items())
        assert scheduler.requests.keys() == states.keys()

    num_steps = 0
    while waiting or engine.num_unfinished:
        while waiting and engine.num_unfinished < 20:
            request = waiting.pop()
            engine.add(request.request_id, request.prompt_ids, request.sampling)
        logs += engine.step()
        num_steps += 1
        if num_steps % 25 == 0 and num_steps // 25 <= len(updates):
            version = num_steps // 25
            assert engine.num_unfinished > 16  # running ones, and some in the queue
            probed()
            engine.load_weights(updates[version - 1].items(), version)
            probed()
    return UpdateOutcome(
        logs,
        probes,
        moved,
        noise_moved,
        free_before,
        scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
    )


def _num_actions(request: object) -> int:
    from actors.engine.backspace_scheduler import decoding_state

    state = decoding_state(request.sampling_params)  # type: ignore[attr-defined]
    assert state is not None
    return state.num_actions


@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", False), ("llama", True), ("gpt2", True)], ids=["untied", "tied", "gpt2"]
)
def test_updates_in_flight(kind: str, tied: bool, tmp_path: Path) -> None:
    """Each action has the probability of the weights whose version it carries; probes see the newest weights."""
    model = tiny_model(kind, tied=tied, backspace_rate=0.25)  # type: ignore[arg-type]
    models = {0: model, 1: perturbed(model, seed=1), 2: perturbed(model, seed=2)}
    requests = rollouts(40, seed=10, max_new_tokens=50, max_actions=80)
    outcome = in_engine_process(
        update_in_flight,
        small_engine(save_tiny_model(tmp_path, model)),
        [_parameters(models[1]), _parameters(models[2])],
        requests,
        PROBE,
    )
    samplings = {request.request_id: request.sampling for request in requests}
    result = compare(outcome.logs, samplings, models)
    assert not result.errors, "\n".join(result.errors[:10])
    assert {log.request_id for log in outcome.logs} == samplings.keys()
    versions = np.concatenate([log.policy_version for log in outcome.logs])
    assert np.bincount(versions).min() > 100
    assert sum(len(set(log.policy_version.tolist())) > 1 for log in outcome.logs) > 10
    assert all((np.diff(log.policy_version) >= 0).all() for log in outcome.logs)
    for values, version in zip(outcome.probes, [0, 1, 1, 2], strict=True):
        expected = sequence_logprobs(models[version], PROBE.tolist()).numpy()
        assert np.abs(values - expected).max() <= TOLERANCE
    # A check that can't fail proves nothing: the versions do differ.
    assert np.abs(outcome.probes[0] - outcome.probes[1]).max() > 0.01
    assert outcome.actions_moved_by_probes == 0
    assert not outcome.noise_moved_by_probes
    assert outcome.free_blocks_before == outcome.free_blocks_after


def start_without_weights(settings: EngineSettings, tensors: Tensors, probe: Int32) -> tuple[list[str], Float32]:
    engine = fresh_engine(settings)
    refused = [message_of(engine.step), message_of(lambda: engine.probe(probe))]
    engine.load_weights(tensors.items(), 5)
    assert engine.version == 5
    return refused, engine.probe(probe)


@pytest.mark.parametrize(
    ("tied", "both_names"), [(False, False), (True, False), (True, True)], ids=["untied", "tied", "both names"]
)
def test_an_engine_born_with_config_json_alone_takes_weights(tied: bool, both_names: bool, tmp_path: Path) -> None:
    model = tiny_model(tied=tied)
    model.config.save_pretrained(tmp_path)
    settings = replace(small_engine(tmp_path), load_format="dummy")
    tensors = dict(model.state_dict()) if both_names else _parameters(model)
    assert ("lm_head.weight" in tensors) == (both_names or not tied)
    refused, values = in_engine_process(start_without_weights, settings, tensors, PROBE)
    assert len(refused) == 2
    assert all("call load_weights first" in text for text in refused)
    assert np.abs(values - sequence_logprobs(model, PROBE.tolist()).numpy()).max() <= TOLERANCE


def bad_updates(settings: EngineSettings, tensors: Tensors, probe: Int32) -> tuple[dict[str, str], Float32, list[str]]:
    engine = fresh_engine(settings)
    first = next(iter(tensors))
    updates = {
        "missing": [(n, t) for n, t in tensors.items() if n != "model.layers.1.self_attn.k_proj.weight"],
        "unknown": [*tensors.items(), ("model.layers.9.mlp.up_proj.weight", tensors[first])],
        "repeated": [*tensors.items(), (first, tensors[first])],
        "misshapen": [(n, t[1:] if n == first else t) for n, t in tensors.items()],
    }
    messages = {
        name: message_of(lambda update=update: engine.load_weights(update, 1)) for name, update in updates.items()
    }
    engine.load_weights(tensors.items(), 3)
    messages["older"] = message_of(lambda: engine.load_weights(tensors.items(), 2))
    assert engine.version == 3
    values = engine.probe(probe)
    # A load that breaks half-way leaves a model that must not be used again.
    broken = [(n, _Unreadable(t) if n == "model.layers.1.mlp.down_proj.weight" else t) for n, t in tensors.items()]
    attempts = (lambda: engine.load_weights(broken, 4), engine.step, lambda: engine.probe(probe))
    fenced = [message_of(attempt) for attempt in attempts]
    return messages, values, fenced


class _Unreadable(torch.Tensor):
    """A tensor whose memory can't be read, as after the loss of a shared segment."""

    @staticmethod
    def __new__(cls, tensor: torch.Tensor) -> _Unreadable:
        return tensor.as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if getattr(func, "__name__", "") == "copy_":
            raise RuntimeError("segment lost")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_incomplete_or_foreign_updates_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny_model()
    settings = small_engine(save_tiny_model(tmp_path, model))
    messages, values, fenced = in_engine_process(bad_updates, settings, _parameters(model), PROBE)
    assert "lacks model.layers.1.self_attn.k_proj.weight" in messages["missing"]
    assert "model.layers.9.mlp.up_proj.weight does not belong" in messages["unknown"]
    assert "model.embed_tokens.weight came twice" in messages["repeated"]
    assert "has shape (255, 64), the model needs (256, 64)" in messages["misshapen"]
    assert "version 2 are older than the engine's version 3" in messages["older"]
    assert np.abs(values - sequence_logprobs(model, PROBE.tolist()).numpy()).max() <= TOLERANCE
    assert "segment lost" in fenced[0]
    assert [text for text in fenced[1:] if "version 4 failed half-way" in text] == fenced[1:]
    assert len(fenced) == 3


def skip_the_cache_reset(settings: EngineSettings, tensors: Tensors, requests: list[Request]) -> list[FinishedRollout]:
    """Negative control: load as `load_weights` does, but keep the key-value cache of the old weights."""
    from actors.engine.weights import load_in_place

    engine = fresh_engine(settings)
    for request in requests:
        engine.add(request.request_id, request.prompt_ids, request.sampling)
    for _ in range(20):
        engine.step()
    load_in_place(engine._core.model_executor.driver_worker.get_model(), engine._llm.model_config, tensors.items())
    engine._set_version(1)
    return answer(engine)


def test_the_check_sees_a_stale_cache(tmp_path: Path) -> None:
    model = tiny_model()
    moved = perturbed(model, seed=1)
    requests = rollouts(16, seed=12, max_new_tokens=50, max_actions=80)
    logs = in_engine_process(
        skip_the_cache_reset, small_engine(save_tiny_model(tmp_path, model)), _parameters(moved), requests
    )
    result = compare(logs, {r.request_id: r.sampling for r in requests}, {0: model, 1: moved})
    assert result.worst > 100 * TOLERANCE
