"""The two ends of the weight benchmark: a learner that publishes, and Ray actors that take.

All clocks are `time.perf_counter`, which processes of one host share on Linux.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from actors.engine.weights import prove
from buffer.weights import WeightHandle, WeightManifest, WeightReceiver, pack_tensors, unpack, verify_fingerprint
from tests.benchmarks.models import BACKSPACE_ID, contract_of

if TYPE_CHECKING:
    import ray
    from ray.actor import ActorHandle
    from transformers import LlamaConfig

    from actors.engine.interface import EngineSettings


@dataclass(frozen=True)
class Taken:
    """One publication at one actor. verified_s: when its bytes were found to be right. done_s: when the engine had
    proved itself, or without one, the same. parts_s: seconds of `transfer`, `verify`, `load`, `engine_probe`.
    """

    verified_s: float
    done_s: float
    parts_s: dict[str, float]


class PublishingLearner:
    """Holds a random model and publishes it as the learner does. relay: the Ray actor of a `Relay`."""

    def __init__(self, config: LlamaConfig, dtype: str, relay: ActorHandle, seed: int) -> None:
        import torch
        from transformers import LlamaForCausalLM

        from learner.publication import WeightPublisher, make_probe
        from learner.state_tree.policy import TreePolicy

        torch.set_num_threads(1)
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(getattr(torch, dtype)).requires_grad_(False)
        self._policy = TreePolicy(model, BACKSPACE_ID)
        self._relay = relay
        self._publisher = WeightPublisher(relay, make_probe(contract_of(config.vocab_size), seed))
        self._copy = {name: np.zeros(tensor.nbytes, np.uint8) for name, tensor in model.named_parameters()}
        self.size_bytes = sum(array.nbytes for array in self._copy.values())

    def copy_s(self) -> float:
        """Seconds of one copy of the same bytes between memory that is already mapped: the fastest there is."""
        payload, _ = pack_tensors(self._policy.model.named_parameters())
        started_s = time.perf_counter()
        for name, array in payload.items():
            np.copyto(self._copy[name], array.reshape(-1).view(np.uint8))
        return time.perf_counter() - started_s

    def fresh_copy_s(self) -> float:
        """The same into new memory, whose pages the system has to provide first."""
        payload, _ = pack_tensors(self._policy.model.named_parameters())
        started_s = time.perf_counter()
        copies = [array.copy() for array in payload.values()]
        elapsed_s = time.perf_counter() - started_s
        assert len(copies) == len(payload)
        return elapsed_s

    def push(self, timeout_s: float) -> dict[str, float]:
        """Move the weights a little, publish them, and wait until the actors have them.

        Gives seconds of the learner's parts, and of those of the actors, each at the one that took longest for it;
        `channel`: until the last actor has the right bytes, the probe's computation aside; `push`: until the last one
        can generate, with engines only.
        """
        import ray
        import torch

        with torch.no_grad():
            self._policy.model.model.norm.weight.add_(0.01)
        started_s = time.perf_counter()
        self._publisher.publish(self._policy)
        held_s = time.perf_counter() - started_s
        times = self._publisher.newest_times
        taken: list[Taken] = ray.get(ray.get(self._relay.newest.remote(), timeout=timeout_s), timeout=timeout_s)
        parts_s = {"learner_held": held_s, **times}
        parts_s |= {part: max(each.parts_s[part] for each in taken) for part in taken[0].parts_s}
        if "load" in parts_s:
            parts_s["push"] = max(each.done_s for each in taken) - started_s
        return parts_s | {"channel": max(each.verified_s for each in taken) - started_s - times["learner_probe"]}


class TakingActor:
    """Takes weights as a rollout actor does, and notes when. settings: of an engine that loads them; None = the bytes
    are taken and verified only.
    """

    def __init__(self, config: LlamaConfig, settings: EngineSettings | None) -> None:
        self._receiver = WeightReceiver()
        self._engine = None
        if settings is not None:
            from actors.engine.engine import BackspaceEngine

            with tempfile.TemporaryDirectory() as folder:
                config.save_pretrained(folder)
                self._engine = BackspaceEngine(replace(settings, model_dir=folder), contract_of(config.vocab_size))

    def ready(self) -> int:
        """Process id, once the engine stands."""
        return os.getpid()

    def take(self, manifest: WeightManifest, handle: WeightHandle) -> Taken:
        """The steps of `actors.engine.weights`, with a look at the clock after each."""
        moments = [time.perf_counter()]
        payload = self._receiver.fetch(handle)
        moments.append(time.perf_counter())
        verify_fingerprint(payload, manifest)
        moments.append(time.perf_counter())
        if self._engine is not None:
            self._engine.load_weights(unpack(payload, manifest), manifest.version)
            moments.append(time.perf_counter())
            prove(manifest, self._engine.probe(manifest.probe_token_ids), None, self._engine.dtype)
            moments.append(time.perf_counter())
        parts_s = dict(zip(("transfer", "verify", "load", "engine_probe"), np.diff(moments).tolist(), strict=False))
        return Taken(moments[2], moments[-1], parts_s)


class Relay:
    """In the place of the actor pool: told of a publication, it tells the actors."""

    def __init__(self, actors: Sequence[ActorHandle]) -> None:
        self._actors = actors
        self._taken: list[ray.ObjectRef[Taken]] = []

    def notify(self, manifest: WeightManifest, handle: WeightHandle) -> None:
        self._taken = [actor.take.remote(manifest, handle) for actor in self._actors]

    def newest(self) -> list[ray.ObjectRef[Taken]]:
        """Of each actor, what happened to the newest publication."""
        return self._taken
