"""The two ends of the weight benchmark: a learner that publishes, and Ray actors that take.

All clocks are `time.perf_counter`, which processes of one host share on Linux.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from actors.engine.weights import prove
from buffer.trajectory.schema import TokenContract
from buffer.weights.format import WeightManifest, pack_tensors, unpack, verify_fingerprint
from buffer.weights.object_store import WeightHandle, WeightReceiver

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from transformers import LlamaConfig

    from actors.engine.settings import EngineSettings
    from learner.publication.publisher import PublicationTimes


@dataclass(frozen=True)
class Published:
    """One publication. started_s: when `publish` was called. held_s: seconds that the learner waited for it."""

    version: int
    started_s: float
    held_s: float
    times: PublicationTimes


@dataclass(frozen=True)
class Taken:
    """One publication at one actor. verified_s: when its bytes were found to be right. done_s: when the engine had
    proved itself, or without one, the same. parts_s: seconds of `transfer`, `verify`, `load`, `engine_probe`.
    """

    version: int
    verified_s: float
    done_s: float
    parts_s: dict[str, float]


class PublishingLearner:
    """Holds a random model and publishes it as the learner does."""

    def __init__(self, config: LlamaConfig, dtype: str, receivers: Sequence[ActorHandle], seed: int) -> None:
        import ray
        import torch
        from transformers import LlamaForCausalLM

        from learner.publication.publisher import WeightPublisher, make_probe
        from learner.state_tree.policy import TreePolicy

        torch.set_num_threads(1)
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(getattr(torch, dtype)).requires_grad_(False)
        self._policy = TreePolicy(model, backspace_id=3)
        relay = ray.remote(_Relay).options(num_cpus=0).remote(receivers)
        self._publisher = WeightPublisher(relay, make_probe(TokenContract(config.vocab_size, 3, 2, "random"), seed))
        self._copy = {name: np.zeros(tensor.nbytes, np.uint8) for name, tensor in model.named_parameters()}

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

    def publish(self) -> Published:
        """Move the weights a little and publish them."""
        import torch

        with torch.no_grad():
            self._policy.model.model.norm.weight.add_(0.01)
        started_s = time.perf_counter()
        version = self._publisher.publish(self._policy)
        held_s = time.perf_counter() - started_s
        times = self._publisher.newest_times
        assert times is not None
        return Published(version, started_s, held_s, times)


class TakingActor:
    """Takes weights as a rollout actor does, and notes when."""

    def __init__(self, config: LlamaConfig, settings: EngineSettings | None) -> None:
        """settings: of an engine that loads them; None = the bytes are taken and verified only."""
        self._receiver = WeightReceiver()
        self._changed = threading.Condition()
        self._taken: list[Taken] = []
        self._engine = None
        if settings is not None:
            from actors.engine.engine import BackspaceEngine

            with tempfile.TemporaryDirectory() as folder:
                config.save_pretrained(folder)
                self._engine = BackspaceEngine(
                    replace(settings, model_dir=folder), TokenContract(config.vocab_size, 3, 2, "random")
                )

    def ready(self) -> int:
        """Process id, once the engine stands."""
        return os.getpid()

    def announce(self, manifest: WeightManifest, handle: WeightHandle) -> None:
        """The steps of `RolloutActor`, with a look at the clock after each."""
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
        with self._changed:
            self._taken.append(Taken(manifest.version, moments[2], moments[-1], parts_s))
            self._changed.notify_all()

    def taken(self, version: int, timeout_s: float) -> Taken:
        """What happened to `version`.

        Raises:
            TimeoutError: it was not taken in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: any(each.version == version for each in self._taken), timeout_s):
                raise TimeoutError(f"weights version {version} were not taken within {timeout_s:.0f} s")
            return next(each for each in self._taken if each.version == version)


class _Relay:
    """Stands where the actor pool does: hears of a publication and tells the actors."""

    def __init__(self, receivers: Sequence[ActorHandle]) -> None:
        self._receivers = receivers

    def announce(self, manifest: WeightManifest, handle: WeightHandle) -> None:
        for receiver in self._receivers:
            receiver.announce.remote(manifest, handle)
