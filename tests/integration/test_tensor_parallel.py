"""An engine that is divided over two processes, against transformers: backspaces, forced and banned tokens, aborts, and
new weights in mid-flight.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest
import ray
from ray.actor import ActorHandle
from transformers import PreTrainedModel

from actors.engine.interface import SamplingSettings, engine_environment
from buffer.weights import WeightSender
from tests.integration.local_ray import ROOT, local_ray
from tests.integration.rank_group_worker import Publication, RankGroupWorker
from tests.integration.reference import compare
from tests.integration.test_weight_push import publication
from tests.integration.traffic import Request, rollouts, shared_prompts
from tests.tiny_models import CONTRACT, FIRST_TEXT_ID, VOCAB_SIZE, perturbed, tiny_model

SIZE = 2
TIMEOUT_S = 300.0


@pytest.fixture(scope="module")
def models() -> dict[int, PreTrainedModel]:
    """By version. Their head is tied, and their only head of keys and values is on both ranks."""
    first = tiny_model(tied=True, backspace_rate=0.25)
    return {0: first, 1: perturbed(first, seed=1, scale=0.02)}


@pytest.fixture(scope="module")
def worker(models: dict[int, PreTrainedModel]) -> Iterator[ActorHandle]:
    environment = engine_environment() | {"PYTHONPATH": str(ROOT)}
    process = ray.remote(RankGroupWorker).options(num_cpus=SIZE, runtime_env={"env_vars": environment})
    with local_ray(num_cpus=2 * SIZE):
        yield process.remote(models[0].config.to_json_string(use_diff=False), CONTRACT, SIZE)


def offered(sender: WeightSender, model: PreTrainedModel, version: int) -> Publication:
    manifest, payload = publication(model, version)
    return manifest, sender.publish(payload)


def test_the_layers_are_divided_and_every_action_is_that_of_the_whole_model(
    worker: ActorHandle, models: dict[int, PreTrainedModel]
) -> None:
    senders = WeightSender(), WeightSender()
    ray.get(worker.load.remote(offered(senders[0], models[0], 0)), timeout=TIMEOUT_S)
    shapes = ray.get(worker.tensor_shapes.remote(), timeout=TIMEOUT_S)
    assert shapes["model.embed_tokens.weight"][0] == VOCAB_SIZE // SIZE
    random_state = random.Random(3)
    requests, forced_prefixes = [], {}
    for request in rollouts(60, seed=3, share_plain=0.1):
        banning = request.sampling.backspace and random_state.random() < 0.3
        sampling = request.sampling.model_copy(update={"ban_deleted": banning})
        requests.append(replace(request, sampling=sampling))
        forced = random_state.randrange(4) if random_state.random() < 0.3 else 0
        forced_prefixes[request.request_id] = [random_state.randrange(FIRST_TEXT_ID, VOCAB_SIZE) for _ in range(forced)]
    call = worker.generate.remote(requests, forced_prefixes, 13, 60, offered(senders[1], models[1], 1))
    logs = ray.get(call, timeout=TIMEOUT_S)
    samplings = {request.request_id: request.sampling for request in requests}
    assert sorted(log.request_id for log in logs) == sorted(samplings)
    result = compare(logs, samplings, models, forced_prefixes=forced_prefixes)
    assert not result.errors, "\n".join(result.errors[:10])
    assert result.worst <= 1e-4
    assert result.num_backspaces > 0.05 * result.num_actions
    assert result.num_returns_to_floor > 2
    assert result.num_back_over_block_edge > 2
    assert any(set(log.policy_version) == {0, 1} for log in logs), "no rollout lived through the update"
    assert sum(log.finish_reason == "aborted" for log in logs) > 3
    assert sum(min(len(log.actions), len(forced_prefixes[log.request_id])) for log in logs) > 5


def test_ranks_that_draw_other_tokens_are_found_out(worker: ActorHandle) -> None:
    sampling = SamplingSettings(max_new_tokens=20, max_actions=20, backspace=False, ban_eos=True)
    request = Request("parting", shared_prompts(1, 8, seed=0)[0], sampling)
    told = ray.get(worker.part.remote(request), timeout=TIMEOUT_S)
    assert "rank 1 of the actor sampled other tokens than rank 0" in told


def test_an_actor_that_dies_takes_its_other_processes_along(worker: ActorHandle) -> None:
    ray.get(worker.tensor_shapes.remote(), timeout=TIMEOUT_S)  # all of it stands
    (leader,) = processes("RankGroupWorker")
    (other,) = processes("EngineRank")
    leader.kill()
    psutil.wait_procs([other], timeout=60.0)
    assert not other.is_running()


def processes(title: str) -> list[psutil.Process]:
    """Of this test's Ray."""
    return [p for p in psutil.Process().children(recursive=True) if title in " ".join(p.cmdline())]
