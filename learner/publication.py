"""Publishing the current weights: the learner notifies the actor pool and does not wait for actors.

Engines, checkpoints and exports read neither adapters nor 4-bit layers nor shards. They get plain tensors under the
names of the base model: W + (alpha / rank) B A of an adapted layer, W dequantized if it is quantized, gathered from all
ranks if it is sharded, and rounded to `model.dtype` if training holds it in float32.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from ray.actor import ActorHandle
from torch import Tensor
from transformers import PreTrainedModel

from buffer.processes import RemoteCall
from buffer.trajectory.schema import TokenContract
from buffer.weights import (
    LowRankUpdate,
    TensorEntry,
    WeightManifest,
    WeightPayload,
    WeightSender,
    combined_fingerprint,
    digest_tensors,
    merge_low_rank,
    pack_tensors,
)
from learner.model.adapters import ADAPTER_NAME, adapted_layers, dequantize, is_quantized
from learner.precision import published_dtype
from learner.ranks import Ranks, gathered
from learner.settings.stages import PublishMode
from learner.state_tree.policy import TreePolicy

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

PROBE_TOKENS = 16
NOTIFY_TIMEOUT_S = 60.0


class WeightPublisher:
    """Numbers the publications of a run and notifies the actor pool of each. Every rank makes the same calls. Only rank
    0 sends, and it sends a copy, so the optimizer may change the weights as soon as `publish` returns."""

    def __init__(
        self,
        pool: ActorHandle,
        probe_token_ids: tuple[int, ...],
        first_version: int = 0,
        mode: PublishMode = "full",
        ranks: Ranks | None = None,
    ) -> None:
        """probe_token_ids: [P] fixed sequence whose log-probabilities every engine must reproduce. first_version: that
        of the next publication (beyond 0 when a run resumes). mode: see `learner.publish`."""
        self._pool = pool
        self._probe_token_ids = probe_token_ids
        self._next_version = first_version
        self._mode = mode
        self._ranks = ranks or Ranks()
        self._sender = WeightSender()
        self._static_entries: tuple[TensorEntry, ...] | None = None  # None: not sent yet
        self._static_digests: dict[str, bytes] = {}
        self._notified: RemoteCall[None] | None = None
        self.newest_times: dict[str, float] = {}
        """Seconds that the learner spent on each part of the newest publication. pack: merging and gathering.
        fingerprint: the rest of it after the probe, which runs at the same time. offer: the snapshot, and the call to
        the pool.
        """

    @property
    def newest_version(self) -> int:
        """Version of the newest publication; -1 before the first."""
        return self._next_version - 1

    def publish(self, policy: TreePolicy) -> int:
        """Publish the weights without waiting for any actor; gives their version. All ranks call this together.
        TimeoutError where the pool has not answered the previous announcement yet, RankLostError where another rank
        failed."""
        if self._notified is not None:
            self._notified.result(NOTIFY_TIMEOUT_S)
        with self._ranks.exchange("a publication"):
            self._publish(policy)
        self._next_version += 1
        return self.newest_version

    def resume_rollouts(self, first_version: int) -> None:
        """Let the actors generate, with weights of `first_version` or newer."""
        if self._ranks.leads:
            self._pool.resume.remote(first_version)

    def _publish(self, policy: TreePolicy) -> None:
        started = time.perf_counter()
        alone = self._mode == "adapter"
        if self._static_entries is None:
            static, self._static_entries = self._pack(frozen_tensors(policy.model) if alone else ())
            self._static_digests = digest_tensors(self._static_entries, static)
            if static:
                self._sender.set_static(static)
        payload, entries = self._pack(trained_tensors(policy.model) if alone else publication_tensors(policy.model))
        packed = time.perf_counter()
        with ThreadPoolExecutor(1) as beside:  # hashing releases the interpreter lock for the probe's forward pass
            hashing = beside.submit(digest_tensors, entries, payload)
            probe_logprobs = tuple(policy.sequence_logprobs(self._probe_token_ids).tolist())
            probed = time.perf_counter()
            digests = self._static_digests | hashing.result()
        hashed = time.perf_counter()
        if not self._ranks.leads:
            return
        manifest = WeightManifest(
            version=self._next_version,
            fingerprint=combined_fingerprint(digests),
            tensors=(*self._static_entries, *entries),
            probe_token_ids=self._probe_token_ids,
            probe_logprobs=probe_logprobs,
            updates=low_rank_updates(policy.model) if alone else (),
        )
        announced = self._pool.notify.remote(manifest, self._sender.publish(payload))
        self._notified = RemoteCall("the actor pool", announced, f"take weights version {manifest.version}")
        times = (packed - started, probed - packed, hashed - probed, time.perf_counter() - hashed)
        self.newest_times = dict(zip(("pack", "learner_probe", "fingerprint", "offer"), times, strict=True))

    def _pack(self, tensors: Iterable[tuple[str, Tensor]]) -> tuple[WeightPayload, tuple[TensorEntry, ...]]:
        """Other ranks than 0 keep nothing, but gather every tensor in the same order."""
        if self._ranks.leads:
            return pack_tensors(tensors)
        for _ in tensors:
            pass
        return {}, ()


def make_probe(contract: TokenContract, seed: int) -> tuple[int, ...]:
    """A fixed pseudo-random text of PROBE_TOKENS ids, without backspace and `<eos>`."""
    candidates = np.setdiff1d(np.flatnonzero(contract.has_token()), [contract.backspace_id, contract.eos_id])
    return tuple(np.random.default_rng(seed).choice(candidates, size=PROBE_TOKENS).tolist())


def publication_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter and persistent buffer; of tied ones only the first.

    Names are those of the base model's `state_dict`. A tensor may be the model's own memory: copy it before the next
    optimizer step. All ranks of a sharded model must iterate to the end, in step.
    """
    for source in _sources(model):
        yield source.name, source.merged()


def low_rank_updates(model: PreTrainedModel) -> tuple[LowRankUpdate, ...]:
    """The updates that actors merge if frozen and trained tensors are sent separately."""
    updates = []
    for source in _sources(model):
        if source.adapter is not None:
            a, b = source.factors()
            scaling, transposed = source.adapter.scaling[ADAPTER_NAME], source.adapter.fan_in_fan_out
            updates.append(LowRankUpdate(source.name, a, b, scaling, transposed))
    return tuple(updates)


def frozen_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of frozen weights, without adapters; they are sent once. All ranks iterate."""
    for source in _sources(model):
        if not source.tensor.requires_grad:
            yield source.name, source.base()


def trained_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of trained weights: A and B of each adapter, other trained tensors. All ranks iterate."""
    for source in _sources(model):
        yield from ((name, gathered(factor)) for name, factor in source.factors().items())
        if source.tensor.requires_grad:
            yield source.name, source.base()


@dataclass(frozen=True)
class _Source:
    """One tensor of the base model before publication. adapter: the adapter of its layer, if it has one."""

    name: str
    tensor: Tensor
    dtype: torch.dtype
    adapter: LoraLayer | None

    def base(self) -> Tensor:
        """Without the adapter."""
        return dequantize(self.tensor) if is_quantized(self.tensor) else gathered(self.tensor).to(self.dtype)

    def factors(self) -> dict[str, Tensor]:
        """A and B of the adapter by their published names, as this rank holds them."""
        if self.adapter is None:
            return {}
        layers = {"lora_A": self.adapter.lora_A, "lora_B": self.adapter.lora_B}
        return {f"{self.name}.{part}": layer[ADAPTER_NAME].weight for part, layer in layers.items()}

    def merged(self) -> Tensor:
        """W, or W + (alpha / rank) B A in a new tensor."""
        if self.adapter is None:
            return self.base()
        a, b = (gathered(factor) for factor in self.factors().values())
        return merge_low_rank(self.base(), a, b, self.adapter.scaling[ADAPTER_NAME], self.adapter.fan_in_fan_out)


def _sources(model: PreTrainedModel) -> Iterator[_Source]:
    adapters = dict(adapted_layers(model))
    factors = {
        factor for layer in adapters.values() for part in (layer.lora_A, layer.lora_B) for factor in part.values()
    }
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):  # of tied ones the first
        path, _, own_name = name.rpartition(".")
        module = model.get_submodule(path)
        if module in factors or own_name in module._non_persistent_buffers_set:
            continue
        layer = path.removesuffix(".base_layer")  # where an adapter keeps what it adapts
        adapter = adapters.get(layer)
        yield _Source(
            name if adapter is None else f"{layer}.{own_name}",
            tensor,
            published_dtype(model, tensor),
            adapter if own_name == "weight" else None,
        )
